"""What `linear_distillation_loss` is to autograd and the compiler, other ways to give it the weight, its errors.
Numbers: reference/test_linear.py. What it saves: test_linear_work.py."""

import copy

import pytest
import torch
from linear_batch import OBJECTIVE, Batch, H, N, V, assert_close
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pocl_fast.loss import linear_operator
from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.teacher_output import DenseTeacher, LinearTeacher, TopKTeacher

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture
def batch(seed):
    return Batch()


# ---- autograd ----


def test_only_the_loss_is_part_of_the_graph(batch):
    batch.teacher.hidden.requires_grad_(True)
    batch.teacher.weight.requires_grad_(True)
    out = batch.loss()
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in (out.ce, out.divergence, *out.metrics.values(), *out.per_token.values()))
    out.loss.backward()
    assert batch.teacher.hidden.grad is None
    assert batch.teacher.weight.grad is None


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_of_ignored_tokens_costs_nothing(batch, backend, reduction):
    out = batch.loss(labels=torch.full_like(batch.labels, -100), backend=backend, reduction=reduction)
    out.loss.sum().backward()
    assert out.loss.count_nonzero() == 0
    assert (out.ce, out.divergence, out.num_tokens) == (0, 0, 0)
    assert all(leaf.grad.count_nonzero() == 0 for leaf in batch.leaves())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_retained_graph_gives_its_gradient_again(dtype, reduction):
    batch = Batch(dtype)
    want = batch.gradients(reduction=reduction)
    loss = batch.loss(reduction=reduction).loss.sum()
    for factor, keep in ((1.0, True), (4.0, True), (2.0, False)):
        again = torch.autograd.grad(factor * loss, batch.leaves(), retain_graph=keep)
        assert_close(again, [factor * gradient for gradient in want])


def test_a_second_backward_without_retained_graph_says_so(batch):
    loss = batch.loss().loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = batch.loss(reduction="none").loss
    loss.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_differentiation_says_that_there_is_none(batch, reduction):
    loss = batch.loss(reduction=reduction).loss.sum()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, batch.hidden, create_graph=True)


def test_gradients_accumulate_over_parts_of_a_step(batch):
    want = batch.gradients()
    items = (batch.labels != -100).sum()
    for part in (slice(0, 3), slice(3, N)):
        teacher = LinearTeacher(batch.teacher.hidden[part], batch.teacher.weight)
        hidden = batch.hidden[part]
        batch.loss(student_hidden=hidden, teacher=teacher, labels=batch.labels[part], num_items=items).loss.backward()
    assert_close([leaf.grad for leaf in batch.leaves()], want)


def test_a_loss_used_twice_has_both_gradients(batch):
    loss = batch.loss().loss
    got = torch.autograd.grad(loss + 3 * loss, batch.leaves())
    assert_close(got, [4 * gradient for gradient in batch.gradients()])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_loss_may_be_inside_a_checkpoint(batch, use_reentrant):
    want = batch.gradients()
    checkpoint(lambda x: batch.loss(student_hidden=x).loss, batch.hidden, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(batch.leaves(), want, strict=True))


def test_chunks_of_other_sizes_change_rounding_alone(batch):
    want = batch.gradients(chunk_tokens=N)
    for chunk in (1, 2, 3, None):
        assert_close(batch.gradients(chunk_tokens=chunk), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_repeated_has_the_same_bits(dtype):
    batch = Batch(dtype, N=70, V=4200, H=64)
    first = (batch.loss().loss.detach(), *batch.gradients())
    for _ in range(3):
        again = (batch.loss().loss.detach(), *batch.gradients())
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# not the same bits: MKL splits a small product of fp32 matrices by its threads
def test_the_number_of_threads_changes_rounding_alone(batch):
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append((batch.loss().loss.detach(), *batch.gradients()))
    torch.set_num_threads(threads)
    assert_close(*results, rtol=1e-5, atol=1e-6)


# ---- the weight, in other ways ----


class Tied(nn.Module):
    """A model that embeds its tokens with its lm_head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.body = nn.Linear(H, H)

    def forward(self, tokens):
        return torch.tanh(self.body(self.embedding(tokens)))


def test_the_gradients_of_tied_embeddings_add_up(batch):
    model = Tied()
    twin = copy.deepcopy(model)
    tokens = torch.randint(0, V, (N,))
    teacher_logits = F.linear(batch.teacher.hidden, batch.teacher.weight)
    batch.loss(student_hidden=model(tokens), student_weight=model.embedding.weight, student_bias=None).loss.backward()
    logits = F.linear(twin(tokens), twin.embedding.weight)
    distillation_loss(logits, teacher_logits, batch.labels, OBJECTIVE, backend="reference").loss.backward()
    assert_close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


def test_a_low_rank_update_of_a_frozen_lm_head_is_trained(batch):
    weight = batch.weight.detach()
    A, B = torch.randn(2, H, requires_grad=True), torch.randn(V, 2, requires_grad=True)
    got = batch.loss(student_weight=lambda: weight + 0.5 * B @ A).loss
    want = batch.loss(student_weight=weight + 0.5 * B @ A, backend="reference").loss
    assert_close(torch.autograd.grad(got, (A, B, batch.hidden)), torch.autograd.grad(want, (A, B, batch.hidden)))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_autocast_rounds_what_is_multiplied_and_leaves_fp32_gradients(batch, backend):
    with torch.no_grad():  # so that rounding the weight changes nothing here, and rounding the logits would
        for leaf in batch.leaves():
            leaf.copy_(leaf.bfloat16())
    want = batch.gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = batch.loss(backend=backend)
        got = torch.autograd.grad(out.loss, batch.leaves())
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, batch.loss().loss, rtol=2e-6, atol=0)
    assert [gradient.dtype for gradient in got] == [torch.float32] * 3
    for gradient, exact in zip(got, want, strict=True):
        assert (gradient - exact).norm() <= 5e-3 * exact.norm()


def test_under_autocast_hidden_states_and_weight_may_differ_in_dtype(batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = batch.hidden.detach().bfloat16().requires_grad_(True)
        batch.loss(student_hidden=hidden).loss.backward()
    assert (hidden.grad.dtype, batch.weight.grad.dtype) == (torch.bfloat16, torch.float32)


# ---- compilation ----


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_compiles_without_a_break(reduction, dtype):
    batch = Batch(dtype)
    temperature = torch.tensor(1.3)

    def step(hidden, weight, bias, temperature):
        objective = Objective("reverse_kl", temperature=temperature, alpha=0.3)
        out = linear_distillation_loss(
            torch.tanh(hidden), weight, batch.teacher, batch.labels, objective, student_bias=bias, reduction=reduction
        )
        return out.loss.sum() * 0.5, out.metrics["agreement"]

    compiled = torch.compile(step, fullgraph=True)
    for value in (1.3, 2.0):  # a new temperature is data
        temperature.fill_(value)
        results = []
        for function in (step, compiled):
            loss, agreement = function(*batch.leaves(), temperature)
            results.append((loss.detach(), agreement, *torch.autograd.grad(loss, batch.leaves())))
        assert_close(*results)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", ["linear", "dense", "none"])
def test_the_operator_is_registered_as_torch_wants_it(batch, per_token, kind):
    tensors = {
        "linear": [batch.teacher.hidden, batch.teacher.weight],
        "dense": [torch.randn(N, V)],
        "none": [],
    }
    calls = []
    real = linear_operator.linear_distillation

    def spy(*arguments):
        calls.append(arguments)
        return real(*arguments)

    teacher = {"linear": batch.teacher, "dense": DenseTeacher(tensors["dense"][0] if kind == "dense" else None)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_operator, "linear_distillation", spy)
        batch.loss(
            teacher=teacher.get(kind),
            objective=OBJECTIVE if kind in teacher else Objective(alpha=1.0),
            reduction="none" if per_token else "mean",
        )
    torch.library.opcheck(real, calls[0])


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden": torch.zeros(H)}, r"student_hidden must be \[N, H\] or \[B, T, H\], got shape \(12,\)"),
        ({"student_weight": torch.zeros(V, H + 1)}, r"student_weight must be \[V, 12\] for student_hidden of size 12"),
        ({"student_weight": torch.zeros(V * H)}, r"student_weight must be \[V, 12\]"),
        ({"student_weight": torch.zeros(0, H)}, r"student_weight must be \[V, 12\]"),
        ({"student_weight": torch.zeros(V, H).bfloat16()}, "convert one, or use torch.autocast"),
        (
            {"student_weight": torch.zeros(V, H, dtype=torch.int8)},
            "must be floating-point, got torch.float32, torch.int8",
        ),
        ({"student_weight": torch.zeros(V, H, device="meta")}, "on cpu and student_weight on meta"),
        ({"student_bias": torch.zeros(V + 1)}, r"student_bias must be \[83\], got \(84,\)"),
        ({"student_bias": torch.zeros(V, device="meta")}, "on cpu and student_bias on meta"),
        ({"labels": torch.zeros(N + 1, dtype=torch.int64)}, r"labels must be \(7,\), one a row of student_hidden"),
        ({"labels": torch.zeros(N)}, "labels must be int32 or int64, got torch.float32"),
        ({"labels": torch.zeros(N, dtype=torch.int64, device="meta")}, "on cpu and labels on meta"),
        ({"labels": torch.full((N,), V)}, "label 83 at token 0 is outside the student's vocabulary of 83"),
        ({"labels": torch.full((N,), -1)}, "label -1 at token 0"),
        ({"labels": torch.full((N,), V), "backend": "reference"}, "label 83 at token 0 is outside"),
        ({"teacher": None}, "without a teacher the objective's alpha must be 1, got 0.3"),
        ({"teacher": None, "objective": Objective(alpha=torch.ones(N))}, "alpha must be 1"),
        ({"teacher": DenseTeacher(torch.zeros(N + 1, V))}, r"teacher.logits must be \[7, '...'\]"),
        ({"teacher": DenseTeacher(torch.zeros(N, 0))}, r"teacher.logits must be \[7, '...'\]"),
        ({"teacher": DenseTeacher(torch.zeros(N, V, device="meta"))}, "on cpu and teacher.logits on meta"),
        ({"teacher": DenseTeacher(torch.zeros(N, V), logit_scale=0.0)}, "teacher.logit_scale must be positive"),
        ({"teacher": DenseTeacher(torch.zeros(N, V), logit_softcap=0.0)}, "teacher.logit_softcap must be positive"),
        ({"teacher": DenseTeacher(torch.zeros(N, V, dtype=torch.int64))}, "fp32, bf16, fp16 or float64"),
        ({"teacher": LinearTeacher(torch.zeros(N, 5), torch.zeros(V, 4))}, r"teacher_weight must be \[V, 5\]"),
        ({"teacher": LinearTeacher(torch.zeros(N - 1, 5), torch.zeros(V, 5))}, r"teacher.hidden must be \[7, '...'\]"),
        (
            {"teacher": LinearTeacher(torch.zeros(N, 5), torch.zeros(V, 5).half())},
            "teacher.weight torch.float16; convert",
        ),
        (
            {"teacher": LinearTeacher(torch.zeros(N, 5), torch.zeros(V, 5), torch.zeros(4))},
            r"teacher_bias must be \[83\]",
        ),
        (
            {"teacher": TopKTeacher(torch.zeros(N, 4), torch.zeros(N, 5, dtype=torch.int64))},
            r"teacher.indices must be int32 or int64 of teacher.log_probs' shape \(7, 4\)",
        ),
        ({"teacher": TopKTeacher(torch.zeros(N, 4), torch.zeros(N, 4))}, "teacher.indices must be int32 or int64"),
        (
            {"teacher": TopKTeacher(torch.zeros(N, 4), torch.zeros(N, 4, dtype=torch.int64), tail="drop")},
            'teacher.tail must be "bucket" or "renormalise"',
        ),
        ({"token_weights": torch.ones(N - 1)}, "token_weights must be one value or one a token"),
        ({"objective": Objective(temperature=torch.ones(N + 1))}, "temperature must be one value"),
        ({"objective": Objective(alpha=torch.ones(2))}, "alpha must be one value"),
        ({"num_items": 0}, "num_items must be positive"),
        ({"reduction": "median"}, "reduction must be"),
        ({"backend": "cuda"}, "backend must be"),
        ({"logit_scale": 0.0}, "logit_scale must be positive"),
        ({"logit_softcap": -1.0}, "logit_softcap must be positive"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, or None; got 0"),
        ({"max_supervised": 0}, "max_supervised must be at least 1, or None; got 0"),
        ({"max_supervised": 4}, "max_supervised is 4, and 7 tokens are supervised"),
    ],
)
def test_a_wrong_argument_is_refused_at_the_door(change, message):
    arguments = {
        "student_hidden": torch.zeros(N, H),
        "student_weight": torch.zeros(V, H),
        "teacher": DenseTeacher(torch.zeros(N, V)),
        "labels": torch.zeros(N, dtype=torch.int64),
        "objective": OBJECTIVE,
    }
    with pytest.raises(ValueError, match=message):
        linear_distillation_loss(**(arguments | change))


def test_logits_are_no_teacher_without_their_class(batch):
    with pytest.raises(TypeError, match="teacher must be a DenseTeacher, LinearTeacher, TopKTeacher or None"):
        batch.loss(teacher=torch.zeros(N, V))
