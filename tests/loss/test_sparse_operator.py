"""The operator of the sparse teacher: autograd, tracing, and what it shares with the dense one."""

import pytest
import torch

from pocl_fast.loss import reference, row_operator
from pocl_fast.loss.arguments import Settings, Tokens
from pocl_fast.loss.dense import DistillationLoss, distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective
from pocl_fast.loss.teacher_output import TAILS, TopKTeacher

pytestmark = pytest.mark.usefixtures("seed")

N, V, K = 5, 203, 7


def arguments(tail="bucket", needs_grad=True, student=None, reduced=False):
    if student is None:
        student = torch.randn(N, V, requires_grad=needs_grad)
    log_probs, indices = torch.log_softmax(torch.randn(N, V), -1).topk(K)
    labels = torch.randint(0, V, (N,))
    labels[1] = -100
    tokens = Tokens(labels, torch.tensor([1.3]), torch.tensor([0.3]), torch.rand(N))
    settings = Settings("jsd", 0.3, 2, -100, [1.0, 0.0, 1.0, 0.0], tail)
    return student, log_probs, indices, *tokens, *settings, needs_grad, reduced, "cpp"


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("reduced", [True, False])
def test_the_operator_is_what_torch_asks_of_one(tail, needs_grad, reduced):
    torch.library.opcheck(row_operator.sparse_distillation_rows, arguments(tail, needs_grad, reduced=reduced))


@pytest.mark.parametrize("tail", TAILS)
def test_backward_gives_the_gradient_of_the_weighted_sum(tail):
    student, *rest = arguments(tail)
    loss, stats, _ = row_operator.sparse_distillation_rows(student, *rest)
    upstream = torch.rand(N)
    (loss * upstream).sum().backward()
    s = student.detach().double().requires_grad_(True)
    (log_probs, indices), tokens, settings = rest[:2], Tokens(*rest[2:6]), Settings(*rest[6:12])
    exact = Tokens(tokens.labels, *(value.double() for value in tokens[1:]))
    rows = reference.sparse_distillation_rows(s, log_probs, indices, exact, settings)
    row_scale = tokens.row_scale
    (rows.loss * row_scale * upstream).sum().backward()
    torch.testing.assert_close(student.grad.double(), s.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(loss.double(), rows.loss * row_scale, rtol=1e-5, atol=1e-6)
    assert not stats.requires_grad


def test_a_second_backward_is_an_error_unless_the_graph_is_kept():
    given = arguments()
    loss = row_operator.sparse_distillation_rows(*given)[0].sum()
    loss.backward(retain_graph=True)
    first = given[0].grad.clone()
    loss.backward()
    torch.testing.assert_close(given[0].grad, 2 * first)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_compiled_code_takes_the_operator_without_a_graph_break():
    given = arguments()

    def loss(student):
        return row_operator.sparse_distillation_rows(student, *given[1:])[0].sum()

    plain, compiled = (given[0].detach().clone().requires_grad_(True) for _ in range(2))
    loss(plain).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad)


# -- through distillation_loss -----------------------------------------------------------------------------------------


def relative_error(got, want):
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def a_batch(dtype=torch.float32, B=2, T=4, K=7):
    student = (3 * torch.randn(B, T, V)).to(dtype).requires_grad_(True)
    log_probs, indices = torch.log_softmax(3 * torch.randn(B, T, V), -1).topk(K)
    labels = torch.randint(0, V, (B, T))
    labels[0, 1] = -100
    return student, log_probs, indices, labels


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_loss_of_logits_takes_the_k_best_of_each_token(divergence, tail, dtype, inplace):
    student, log_probs, indices, labels = a_batch(dtype)
    objective = Objective(divergence, temperature=1.7, alpha=0.3)
    options = {"token_weights": torch.rand(labels.shape), "logit_scale": 0.5, "logit_softcap": 9.0}
    exact = student.detach().double().requires_grad_(True)
    want = distillation_loss(exact, TopKTeacher(log_probs.double(), indices, tail), labels, objective, **options)
    logits = student * 1
    teacher = TopKTeacher(log_probs, indices.int(), tail)
    got = distillation_loss(logits, teacher, labels, objective, inplace=inplace, backend="cpp", **options)
    (3 * want.loss).backward()
    (3 * got.loss).backward()
    assert relative_error(got.loss, want.loss) <= 2e-6
    assert relative_error(got.divergence, want.divergence) <= 2e-6
    # rounded twice to the logits' dtype: by the kernel, and when it was multiplied by 3
    twice = {torch.float32: 2e-6, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11 + 2e-4}  # fp16: and subnormals
    assert relative_error(student.grad, exact.grad) <= twice[dtype]


def test_all_entries_listed_are_the_dense_teacher():
    student, log_probs, indices, labels = a_batch(K=V)
    dense = torch.empty_like(log_probs).scatter_(-1, indices, log_probs)
    objective = Objective("jsd", temperature=1.3, alpha=0.2)
    losses = [
        distillation_loss(student, teacher, labels, objective, reduction="none").loss
        for teacher in (dense, TopKTeacher(log_probs, indices), TopKTeacher(log_probs, indices, "renormalise"))
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_loss_with_the_k_best_compiles_without_a_graph_break(inplace):
    student, log_probs, indices, labels = a_batch()
    loss = DistillationLoss(Objective("reverse_kl", temperature=1.3), inplace=inplace)

    def of(x):
        return loss(x * 1, TopKTeacher(log_probs, indices), labels).loss

    plain, compiled = (student.detach().clone().requires_grad_(True) for _ in range(2))
    of(plain).backward()
    torch.compile(of, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"indices": torch.zeros(2, 4, 6, dtype=torch.int64)}, {}, "teacher.indices must be int32 or int64"),
        ({"tail": "drop"}, {}, 'teacher.tail must be "bucket" or "renormalise"'),
        ({"log_probs": torch.zeros(2, 3, 7), "indices": torch.zeros(2, 3, 7, dtype=torch.int64)}, {}, "log_probs"),
        ({"indices": torch.full((2, 4, 7), V)}, {}, "outside|vocabulary"),
        ({}, {"teacher_logit_scale": 0.5}, "a TopKTeacher has log-probabilities"),
    ],
)
def test_k_best_that_do_not_fit_are_refused(change, options, message):
    student, log_probs, indices, labels = a_batch()
    teacher = TopKTeacher(**({"log_probs": log_probs, "indices": indices} | change))
    with pytest.raises(ValueError, match=message):
        distillation_loss(student, teacher, labels, Objective(), **options)
