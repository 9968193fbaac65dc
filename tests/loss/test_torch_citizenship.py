"""The losses as torch wants them: autograd, autocast, GradScaler, checkpoints, torch.compile, torch.library."""

import pytest
import torch
from loss_batch import BACKENDS, FUSED, N, V, gradient, some_logits, some_step
from memory import peak_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from pocl_fast.loss import row_operator
from pocl_fast.loss.arguments import Settings, Tokens
from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import Objective

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture
def batch(seed):
    return some_logits()


# ---- autograd ----


def test_only_the_loss_is_part_of_the_graph(batch):
    student, teacher, labels = batch
    out = distillation_loss(student.requires_grad_(True), teacher.requires_grad_(True), labels, Objective(alpha=0.3))
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in (out.ce, out.divergence, *out.metrics.values(), *out.per_token.values()))
    out.loss.backward()
    assert teacher.grad is None


def test_without_need_of_a_gradient_the_loss_is_the_same(batch):
    student, teacher, labels = batch
    with torch.no_grad():
        quiet = distillation_loss(student.clone().requires_grad_(True), teacher, labels, Objective(alpha=0.3)).loss
    assert not quiet.requires_grad
    assert torch.equal(
        quiet, distillation_loss(student.requires_grad_(True), teacher, labels, Objective(alpha=0.3)).loss.detach()
    )


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_loss_used_twice_has_both_gradients(batch, factor):
    student, teacher, labels = batch
    s = student.clone().requires_grad_(True)
    loss = distillation_loss(s, teacher, labels, Objective(alpha=0.3)).loss
    (loss + factor * loss).backward()
    torch.testing.assert_close(s.grad, (1 + factor) * gradient(student, teacher, labels))


def test_a_retained_graph_gives_its_gradient_again(batch):
    student, teacher, labels = batch
    s = student.clone().requires_grad_(True)
    loss = distillation_loss(s, teacher, labels, Objective(alpha=0.3)).loss
    (once,) = torch.autograd.grad(loss, s, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, s)
    assert torch.equal(once, gradient(student, teacher, labels))
    torch.testing.assert_close(thrice, 3 * once)


def test_a_second_backward_without_retained_graph_says_so(batch):
    student, teacher, labels = batch
    loss = distillation_loss(student.requires_grad_(True), teacher, labels, Objective()).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_second_differentiation_says_that_there_is_none(batch, backend, dtype):
    student, teacher, labels = batch
    student = student.to(dtype).requires_grad_(True)
    loss = distillation_loss(student, teacher, labels, Objective(), backend=backend).loss
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("backend", FUSED)
def test_a_derivative_that_the_fused_gradient_knows_nothing_of_is_refused(batch, backend):
    student, teacher, labels = batch

    def loss(s, backend=backend):
        return distillation_loss(s, teacher, labels, Objective(alpha=0.3), backend=backend).loss

    for transform in (torch.func.grad(loss), lambda s: torch.func.jvp(loss, (s,), (s,))):
        with pytest.raises(RuntimeError, match="backend='reference'"):
            transform(student)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="forward-mode"):
            loss(forward_ad.make_dual(student, student))
        loss(student)  # carries no tangent
    slope = torch.func.jvp(lambda s: loss(s, "reference"), (student,), (student,))[1]
    gradient = torch.func.grad(lambda s: loss(s, "reference"))(student)
    torch.testing.assert_close(slope, (gradient * student).sum())


def test_gradients_accumulate_over_parts_of_a_step(batch):
    """Divided by the whole step's tokens, two parts give what one batch gives."""
    student, teacher, labels = batch
    s = student.clone().requires_grad_(True)
    items = (labels != -100).sum()
    for part in (slice(0, 2), slice(2, N)):
        distillation_loss(s[part], teacher[part], labels[part], Objective(alpha=0.3), num_items=items).loss.backward()
    torch.testing.assert_close(s.grad, gradient(student, teacher, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_the_gradient_buffer_is_handed_over_and_not_copied(dtype, factor):
    """Besides the logits a step holds one [N, V] buffer, its gradient: no zeros for the op's other outputs, no copy."""
    student = torch.randn(64, 4096).to(dtype).requires_grad_(True)
    labels = torch.zeros(64, dtype=torch.int64)

    def step():
        (factor * distillation_loss(student, student.detach(), labels, Objective(alpha=0.3)).loss).backward()

    assert 1 <= peak_of(step) / student.nbytes < 1.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_upstream_gradient_of_each_token_is_multiplied_on(batch, backend):
    student, teacher, labels = batch
    upstream = torch.tensor([1.0, 1.0, 0.0, -2.0, 0.5, 1.0])
    s = student.clone().requires_grad_(True)
    options = {"reduction": "none", "backend": backend}
    distillation_loss(s, teacher, labels, Objective(alpha=0.3), **options).loss.backward(upstream)
    want = gradient(student, teacher, labels, **options) * upstream[:, None]
    torch.testing.assert_close(s.grad, want)
    assert s.grad[2].count_nonzero() == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_loss_may_be_inside_a_checkpoint(use_reentrant):
    hidden, head, teacher, labels = some_step()

    def part(hidden):
        return distillation_loss(hidden @ head.T, teacher, labels, Objective(alpha=0.3)).loss

    gradients = []
    for loss in (part(hidden), checkpoint(part, hidden, use_reentrant=use_reentrant)):
        hidden.grad = head.grad = None
        loss.backward()
        gradients.append((hidden.grad, head.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---- mixed precision ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(batch, backend):
    student, teacher, labels = batch
    options = {"backend": backend}
    plain = distillation_loss(student, teacher, labels, Objective("jsd", alpha=0.3), **options).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = distillation_loss(student, teacher, labels, Objective("jsd", alpha=0.3), **options).loss
        through = gradient(student, teacher, labels, **options)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    assert torch.equal(through, gradient(student, teacher, labels, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_under_autocast_hands_over_half_logits_and_gets_their_gradient(dtype):
    hidden, head, teacher, labels = some_step()
    results = []
    for autocast in (True, False):
        hidden.grad = head.grad = None
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            kind = torch.float32 if autocast else dtype
            logits = torch.nn.functional.linear(hidden.to(kind), head.to(kind))
            loss = distillation_loss(logits, teacher, labels, Objective(alpha=0.3)).loss
        loss.backward()
        assert (logits.dtype, loss.dtype, head.grad.dtype) == (dtype, torch.float32, torch.float32)
        results.append((loss.detach(), hidden.grad, head.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_grad_scaler_saves_the_digits_of_fp16_gradients(inplace):
    """Of a mean over many tokens most of the gradient is below fp16's smallest number, until the scaler multiplies."""
    N, V = 512, 4096
    logits, teacher, labels = torch.randn(N, V) * 3, torch.randn(N, V) * 3, torch.randint(0, V, (N,))
    logits = logits.half().float().requires_grad_(True)
    want = gradient(logits.double(), teacher.double(), labels)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    loss = distillation_loss(logits.half(), teacher, labels, Objective(alpha=0.3), inplace=inplace).loss
    scaler.scale(loss).backward()
    optimizer = torch.optim.SGD([logits], lr=1.0)
    scaler.unscale_(optimizer)
    error = (logits.grad.double() - want).norm() / want.norm()
    assert error <= 4e-4  # two roundings to fp16; 1e-3, and 56 % zeros, if the division by the tokens comes first
    before = logits.detach().clone()
    scaler.step(optimizer)
    torch.testing.assert_close(logits.detach(), before - logits.grad)


def test_a_grad_scaler_passes_over_a_step_with_nan():
    logits = torch.randn(N, V, requires_grad=True)
    teacher, before = torch.randn(N, V), logits.detach().clone()
    teacher[2, 3] = torch.nan
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**16), torch.optim.SGD([logits], lr=1.0)
    loss = distillation_loss(logits.half(), teacher, torch.zeros(N, dtype=torch.int64), Objective()).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(logits, before)
    assert scaler.get_scale() == 2.0**15


# ---- compilation ----


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_compiles_without_a_break(batch, reduction):
    student, teacher, labels = batch
    temperature = torch.tensor(1.3)

    def step(hidden, weight, temperature):
        objective = Objective("reverse_kl", temperature=temperature, alpha=0.3)
        out = distillation_loss(hidden @ weight, teacher, labels, objective, reduction=reduction)
        return out.loss.sum() * 0.5, out.metrics["agreement"]

    compiled = torch.compile(step, fullgraph=True)
    for value in (1.3, 2.0):  # a new temperature is data
        temperature.fill_(value)
        results = []
        for function in (step, compiled):
            hidden = student[:, :5].clone().requires_grad_(True)
            weight = teacher[:5].clone()
            loss, agreement = function(hidden, weight, temperature)
            loss.backward()
            results.append((loss.detach(), agreement, hidden.grad))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("inplace", [False, True])
def test_another_number_of_tokens_compiles_nothing_anew(inplace):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden, head, teacher, labels):
        out = distillation_loss(hidden @ head.T, teacher, labels, Objective("jsd", alpha=0.3), inplace=inplace)
        return 3 * out.loss

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for tokens in (N, 2, 5):
        hidden, head, teacher, labels = some_step()
        hidden, teacher, labels = (x.detach()[:tokens].clone() for x in (hidden, teacher, labels))
        gradients = [
            torch.autograd.grad(function(hidden.requires_grad_(True), head, teacher, labels), (hidden, head))
            for function in (step, compiled)
        ]
        torch.testing.assert_close(*gradients)
        compilations.append(counter.frame_count)
    assert compilations[0] > 0
    assert compilations == compilations[:1] * 3


def test_another_number_in_the_objective_compiles_nothing_anew(batch):
    """Plain numbers: the second value makes torch.compile take them for data, and no further one compiles again."""
    torch._dynamo.reset()
    student, teacher, labels = batch
    counter = CompileCounterWithBackend("aot_eager")

    def step(s, temperature, alpha, num_items):
        objective = Objective("jsd", temperature=temperature, alpha=alpha)
        return distillation_loss(s, teacher, labels, objective, num_items=num_items).loss

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    compilations = []
    for number in range(5):
        values = (1.1 + 0.3 * number, 0.1 + 0.1 * number, 7 + number)
        gradients = []
        for function in (step, compiled):
            s = student.clone().requires_grad_(True)
            function(s, *values).backward()
            gradients.append(s.grad)
        torch.testing.assert_close(*gradients)
        compilations.append(counter.frame_count)
    assert compilations[1:] == compilations[1:2] * 4
    assert compilations[1] <= 2


def test_a_compiled_loss_refuses_a_label_outside_the_vocabulary(batch):
    student, teacher, labels = batch
    labels[3] = V
    compiled = torch.compile(lambda s: distillation_loss(s, teacher, labels, Objective()).loss, fullgraph=True)
    with pytest.raises(ValueError, match=f"label {V} at token 3"):
        compiled(student)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_the_operators_are_registered_as_torch_wants_them(batch, needs_grad, reduced):
    student, teacher, labels = batch
    one = torch.ones(1)
    scale = torch.rand(N)
    arguments = (
        student.requires_grad_(needs_grad),
        teacher,
        *Tokens(labels, one, 0.3 * one, scale),
        *Settings("forward_kl", 0.5, 2, -100, [1.0, 0.0, 1.0, 0.0])[:-1],
        needs_grad,
        reduced,
        "cpp",
    )
    torch.library.opcheck(row_operator.distillation_rows, arguments)
    for factors in (scale, scale[:1]):
        torch.library.opcheck(row_operator.scale_rows, (torch.randn(N, V), factors, "cpp"))
