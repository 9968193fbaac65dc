"""The operator of the sparse teacher: autograd, tracing, and what it shares with the dense one."""

import pytest
import torch

from pocl_fast import reference, sparse_ops

N, V, K = 5, 203, 7


def arguments(tail="bucket", needs_grad=True, student=None):
    if student is None:
        student = torch.randn(N, V, requires_grad=needs_grad)
    log_probs, indices = torch.log_softmax(torch.randn(N, V), -1).topk(K)
    labels = torch.randint(0, V, (N,))
    labels[1] = -100
    values = torch.tensor([1.3]), torch.tensor([0.3]), torch.rand(N)
    return student, log_probs, indices, labels, *values, "jsd", 0.3, 2, -100, tail, [1.0, 0.0], needs_grad, "cpp"


@pytest.mark.parametrize("tail", sparse_ops.TAILS)
@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_operator_is_what_torch_asks_of_one(tail, needs_grad):
    torch.library.opcheck(
        sparse_ops.sparse_distillation_rows,
        arguments(tail, needs_grad),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )


@pytest.mark.parametrize("tail", sparse_ops.TAILS)
def test_backward_gives_the_gradient_of_the_weighted_sum(tail):
    student, *rest = arguments(tail)
    loss, stats, _ = sparse_ops.sparse_distillation_rows(student, *rest)
    upstream = torch.rand(N)
    (loss * upstream).sum().backward()
    s = student.detach().double().requires_grad_(True)
    log_probs, indices, labels, temperature, alpha, row_scale = rest[:6]
    rows = reference.sparse_distillation_rows(
        s, log_probs, indices, labels, temperature.double(), alpha.double(),
        divergence="jsd", teacher_share=0.3, temperature_power=2, tail=tail,
    )  # fmt: skip
    (rows.loss * row_scale * upstream).sum().backward()
    torch.testing.assert_close(student.grad.double(), s.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(loss.double(), rows.loss * row_scale, rtol=1e-5, atol=1e-6)
    assert not stats.requires_grad


def test_a_second_backward_is_an_error_unless_the_graph_is_kept():
    given = arguments()
    loss = sparse_ops.sparse_distillation_rows(*given)[0].sum()
    loss.backward(retain_graph=True)
    first = given[0].grad.clone()
    loss.backward()
    torch.testing.assert_close(given[0].grad, 2 * first)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_compiled_code_takes_the_operator_without_a_graph_break():
    given = arguments()

    def loss(student):
        return sparse_ops.sparse_distillation_rows(student, *given[1:])[0].sum()

    plain, compiled = (given[0].detach().clone().requires_grad_(True) for _ in range(2))
    loss(plain).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad)
