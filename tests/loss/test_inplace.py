"""`inplace=True`: the gradient takes the place of the logits, and autograd, compilers and callers are told."""

import pytest
import torch
from loss_batch import FUSED, N, V, some_step
from memory import peak_of
from torch.utils.checkpoint import checkpoint

from pocl_fast.loss import row_operator
from pocl_fast.loss.arguments import Settings, Tokens
from pocl_fast.loss.dense import DistillationLoss, distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective

pytestmark = pytest.mark.usefixtures("seed")


def step(hidden, head, teacher, labels, *, inplace, objective=None, factor=1.0, **options):
    """Loss, and the gradients of hidden states and head."""
    hidden.grad = head.grad = None
    objective = objective or Objective(alpha=0.3)
    loss = distillation_loss(hidden @ head.T, teacher, labels, objective, inplace=inplace, **options).loss
    (loss.sum() * factor).backward()
    return loss.detach(), hidden.grad, head.grad


def assert_same(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- the same numbers ----


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_have_the_same_bits(backend, divergence, dtype):
    batch = some_step(dtype)
    objective = Objective(divergence, temperature=1.3, alpha=0.3)
    results = [step(*batch, inplace=inplace, objective=objective, backend=backend) for inplace in (False, True)]
    assert_same(*results)


# a factor that backward must multiply by, one a row, and the logits' own scale and softcap
@pytest.mark.parametrize(
    "options",
    [
        {"factor": -2.5},
        {"factor": 0.0},
        {"reduction": "none", "token_weights": torch.rand(N)},
        {"logit_scale": 0.5, "logit_softcap": 2.0},
    ],
)
def test_so_they_have_whatever_the_options(options):
    batch = some_step()
    assert_same(*(step(*batch, inplace=inplace, **options) for inplace in (False, True)))


@pytest.mark.parametrize("V_t", [V - 20, V + 20])
def test_so_they_have_with_another_vocabulary(V_t):
    hidden, head, _, labels = some_step()
    teacher = torch.randn(N, V_t)
    assert_same(*(step(hidden, head, teacher, labels, inplace=inplace) for inplace in (False, True)))


# whole sequences are seen as rows where they lie; without their last token they are copied first
@pytest.mark.parametrize("shorter", [0, 1])
def test_so_they_have_in_sequences(shorter):
    hidden, head, teacher, labels = some_step()
    tokens = slice(0, 3 - shorter)
    results = []
    for inplace in (False, True):
        head.grad = None
        logits = (hidden @ head.T).view(2, 3, V)[:, tokens]
        module = DistillationLoss(Objective(alpha=0.3), inplace=inplace)
        module(logits, teacher.view(2, 3, V)[:, tokens], labels.view(2, 3)[:, tokens]).loss.backward()
        results.append((head.grad,))
    assert_same(*results)


def test_a_retained_graph_gives_its_gradient_again():
    hidden, head, teacher, labels = some_step()
    _, want, _ = step(hidden, head, teacher, labels, inplace=False)
    loss = distillation_loss(hidden @ head.T, teacher, labels, Objective(alpha=0.3), inplace=True).loss
    for factor, keep in ((1.0, True), (3.0, True), (2.0, False)):
        (again,) = torch.autograd.grad(factor * loss, hidden, retain_graph=keep)
        torch.testing.assert_close(again, factor * want)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, hidden)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_it_may_be_inside_a_checkpoint(use_reentrant):
    hidden, head, teacher, labels = some_step()
    _, want, _ = step(hidden, head, teacher, labels, inplace=False)
    hidden.grad = None

    def part(hidden):
        return distillation_loss(hidden @ head.T, teacher, labels, Objective(alpha=0.3), inplace=True).loss

    checkpoint(part, hidden, use_reentrant=use_reentrant).backward()
    assert torch.equal(hidden.grad, want)


# ---- memory ----


@pytest.mark.parametrize("compiled", [False, True])
def test_there_is_no_second_matrix_of_logits(compiled):
    """Below the size from which the C++ backend keeps its buffers, so that the profiler sees them."""
    hidden, head = torch.randn(64, 2, requires_grad=True), torch.randn(4096, 2)
    teacher, labels = torch.randn(64, 4096), torch.zeros(64, dtype=torch.int64)

    def loss(inplace):
        out = distillation_loss(hidden @ head.T, teacher, labels, Objective(alpha=0.3), inplace=inplace)
        return 2 * out.loss  # which backward must multiply by

    call = torch.compile(loss, fullgraph=True) if compiled else loss
    for inplace, matrices in ((False, 2), (True, 1)):
        call(inplace).backward()
        peak = peak_of(lambda inplace=inplace: call(inplace).backward())
        assert matrices <= peak / teacher.nbytes < matrices + 0.1


def test_the_logits_hold_their_gradient():
    hidden, head, teacher, labels = some_step()
    logits = hidden @ head.T
    logits.retain_grad()
    values = logits.detach().clone()
    distillation_loss(logits, teacher, labels, Objective(alpha=0.3), inplace=True).loss.backward()
    assert torch.equal(logits.detach(), logits.grad)
    assert not torch.equal(logits.detach(), values)


def test_without_need_of_a_gradient_nothing_is_written():
    hidden, head, teacher, labels = some_step()
    with torch.no_grad():
        logits = hidden @ head.T
        values = logits.clone()
        distillation_loss(logits, teacher, labels, Objective(), inplace=True)
    distillation_loss(logits, teacher, labels, Objective(), inplace=True)
    assert torch.equal(logits, values)


# ---- what the caller is told ----


def test_what_needed_the_logits_before_cannot_be_differentiated_any_more():
    hidden, head, teacher, labels = some_step()
    logits = hidden @ head.T
    penalty = logits.logsumexp(-1).square().mean()
    loss = distillation_loss(logits, teacher, labels, Objective(), inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + penalty).backward()


def test_a_later_change_of_the_logits_is_an_error_in_backward():
    hidden, head, teacher, labels = some_step()
    logits = hidden @ head.T
    loss = distillation_loss(logits, teacher, labels, Objective(), inplace=True).loss
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_loss_in_the_same_place_is_an_error_in_backward():
    hidden, head, teacher, labels = some_step()
    logits = hidden @ head.T
    losses = [distillation_loss(logits, teacher, labels, Objective(), inplace=True).loss for _ in range(2)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(losses).backward()


def test_a_second_differentiation_says_that_there_is_none():
    hidden, head, teacher, labels = some_step()
    loss = distillation_loss(hidden @ head.T, teacher, labels, Objective(), inplace=True).loss
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(2, 3, V), lambda x: x[:, :40]])
def test_a_leaf_and_its_views_are_not_written_over(view):
    leaf = torch.randn(N, V, requires_grad=True)
    logits = view(leaf)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    with pytest.raises(ValueError, match="are a leaf"):
        distillation_loss(logits, torch.randn(logits.shape), labels, Objective(), inplace=True)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(N, V)])
def test_a_compiled_step_does_not_write_over_them_either(view):
    """Some of them torch itself refuses, with words of its own."""
    _, _, teacher, labels = some_step()
    compiled = torch.compile(lambda x: distillation_loss(x, teacher, labels, Objective(), inplace=True).loss)
    logits = view(torch.randn(N, V, requires_grad=True))
    values = logits.detach().clone()
    with pytest.raises((ValueError, RuntimeError), match="a leaf"):
        compiled(logits)
    assert torch.equal(logits, values)


@pytest.mark.parametrize("options", [{"backend": "reference"}, {"dtype": torch.float64}])
def test_the_reference_does_not_take_it(options):
    hidden, head, teacher, labels = some_step()
    logits = (hidden @ head.T).to(options.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match="needs a fused backend"):
        distillation_loss(logits, teacher, labels, Objective(), inplace=True, **options)


def test_rows_that_share_memory_are_not_written_over():
    hidden, head, teacher, labels = some_step()
    with pytest.raises(ValueError, match="rows of their own"):
        distillation_loss((hidden @ head.T)[:1].expand(N, V), teacher, labels, Objective(), inplace=True)


def test_a_teacher_in_the_same_memory_is_not_written_over():
    hidden, head, _, labels = some_step()
    logits = hidden @ head.T
    with pytest.raises(ValueError, match="share their memory"):
        distillation_loss(logits, logits.detach(), labels, Objective(), inplace=True)


# ---- compilation ----


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_it_compiles_without_a_break(factor):
    batch = some_step()
    want = step(*batch, inplace=False, factor=factor)
    hidden, head, teacher, labels = batch
    hidden.grad = head.grad = None

    @torch.compile(fullgraph=True)
    def compiled(hidden, head):
        return factor * distillation_loss(hidden @ head.T, teacher, labels, Objective(alpha=0.3), inplace=True).loss

    compiled(hidden, head).backward()
    torch.testing.assert_close((hidden.grad, head.grad), want[1:])


def test_logits_that_a_compiled_loss_is_given_are_written_over():
    hidden, head, teacher, labels = some_step()
    _, want, _ = step(hidden, head, teacher, labels, inplace=False)
    hidden.grad = None
    compiled = torch.compile(
        lambda logits: distillation_loss(logits, teacher, labels, Objective(alpha=0.3), inplace=True).loss,
        fullgraph=True,
    )
    logits = hidden @ head.T
    values = logits.detach().clone()
    compiled(logits).backward()
    torch.testing.assert_close(hidden.grad, want)
    assert not torch.equal(logits.detach(), values)


@pytest.mark.parametrize("reduced", [False, True])
def test_the_operators_are_registered_as_torch_wants_them(reduced):
    _, _, teacher, labels = some_step()
    one = torch.ones(1)
    tokens = Tokens(labels, one, 0.3 * one, torch.rand(N))
    settings = Settings("jsd", 0.5, 2, -100, [1.0, 0.0, 1.0, 0.0])
    arguments = (torch.randn(N, V), teacher, *tokens, *settings[:-1], reduced, "cpp")
    torch.library.opcheck(row_operator.distillation_rows_, arguments)
    for needs_grad in (False, True):
        memory = torch.randn(N, V, requires_grad=needs_grad)
        loss = torch.rand(()) if reduced else torch.rand(N)
        torch.library.opcheck(row_operator.with_gradient, (loss, memory, "cpp"))
