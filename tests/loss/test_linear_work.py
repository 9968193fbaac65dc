"""What `linear_distillation_loss` does not do: products that nobody needs, rows that do not count, all logits."""

import pytest
import torch
from linear_batch import H_T, Batch, H, N, V, assert_close
from memory import peak_of

from pocl_fast.loss import linear_operator
from pocl_fast.loss.arguments import Tokens
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.teacher_output import DenseTeacher, LinearTeacher

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture
def batch(seed):
    return Batch()


# ---- work that is not done ----


@pytest.fixture
def products(monkeypatch):
    """The products with the lm_heads, in order: what for, and how many rows."""
    seen = []

    def spy(owner, name, what, rows_at):
        real = getattr(owner, name)

        def counted(*arguments, **options):
            seen.append((what, len(arguments[rows_at])))
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    spy(linear_operator.HeadProducts, "logits", "logits", 1)
    spy(linear_operator.HeadProducts, "hidden_grad", "hidden", 1)
    spy(linear_operator, "weight_grad_", "weight", 1)
    return seen


def test_only_supervised_rows_are_multiplied(batch, products):
    batch.loss(chunk_tokens=3)
    a_chunk = ["logits", "logits", "hidden", "weight"]  # the student's and the teacher's
    assert products == [(what, 3) for what in a_chunk] + [(what, 2) for what in a_chunk]


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_skips_its_product(batch, products, frozen):
    _, *want = (batch.loss().loss, *batch.gradients())
    products.clear()
    getattr(batch, frozen).requires_grad_(False)
    batch.loss().loss.backward()
    assert [what for what, _ in products] == ["logits", "logits", {"hidden": "weight", "weight": "hidden"}[frozen]]
    assert getattr(batch, frozen).grad is None
    for leaf, gradient in zip(batch.leaves(), want, strict=True):
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)


def test_without_grad_no_gradient_is_computed(batch, products):
    with torch.no_grad():
        quiet = batch.loss()
    assert [what for what, _ in products] == ["logits", "logits"]
    assert not quiet.loss.requires_grad
    assert torch.equal(quiet.loss, batch.loss().loss)
    for leaf in batch.leaves():
        leaf.requires_grad_(False)
    assert not batch.loss().loss.requires_grad


def test_a_dense_teacher_and_none_need_one_product(batch, products):
    with torch.no_grad():
        batch.loss(teacher=DenseTeacher(torch.randn(N, V)))
        batch.loss(teacher=None, objective=Objective(alpha=1.0))
    assert [what for what, _ in products] == ["logits", "logits"]


# of one loss a token the gradient is known only in backward, where the work is done again
def test_a_loss_of_each_token_multiplies_in_backward(batch, products):
    loss = batch.loss(reduction="none").loss
    assert [what for what, _ in products] == ["logits", "logits"]
    products.clear()
    loss.sum().backward()
    assert [what for what, _ in products] == ["logits", "logits", "hidden", "weight"]


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_matrix_of_all_logits_is_allocated(dtype, teacher_dtype, reduction):
    """Beyond the gradients, a step holds two chunks of logits; the logits of all tokens would be 64 chunks."""
    N, V, H, chunk = 512, 4096, 8, 8
    batch = Batch(dtype, N, V, H)
    teacher = LinearTeacher(torch.randn(N, H_T).to(teacher_dtype), torch.randn(V, H_T).to(teacher_dtype))
    labels = torch.randint(0, V, (N,))  # all are supervised

    def step():
        batch.loss(teacher=teacher, labels=labels, chunk_tokens=chunk, reduction=reduction).loss.sum().backward()

    step()
    for leaf in batch.leaves():
        leaf.grad = None
    logits_of_a_chunk = 4 * chunk * V
    # in fp32, and once more in the weight's dtype; a slice of either lm_head in fp32; hidden states and a row's numbers
    others = 2 * 4 * V * (H + 1) + 4 * V * (H + H_T) + 4 * N * (3 * H + 30)
    assert peak_of(step) <= 2 * logits_of_a_chunk + others
    assert 2 * logits_of_a_chunk + others < 4 * N * V / 8


# ---- rows on a GPU, which are not counted ----


@pytest.fixture
def uncounted(monkeypatch):
    """Rows of CPU tensors are chosen as a GPU's are."""
    monkeypatch.setattr(linear_operator, "on_cpu", lambda _: False)


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("max_supervised", [None, 5, 6, 20])
def test_so_many_rows_are_multiplied_as_may_be_supervised(batch, products, monkeypatch, reduction, max_supervised):
    out = batch.loss(max_supervised=max_supervised, reduction=reduction)
    assert {rows for _, rows in products} == {min(max_supervised or N, N)}
    got = torch.autograd.grad(out.loss.sum(), batch.leaves())
    monkeypatch.setattr(linear_operator, "on_cpu", lambda _: True)
    want = batch.loss(reduction=reduction)
    torch.testing.assert_close(out.loss, want.loss)
    assert_close(out.per_token.values(), want.per_token.values())
    assert_close(got, batch.gradients(reduction=reduction), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_supervised_rows_than_that_make_the_loss_nan(batch, reduction):
    out = batch.loss(max_supervised=4, reduction=reduction)
    assert out.loss.isnan().any()


def test_the_rows_of_a_gpu_are_chosen_without_looking_at_a_value():
    with torch.device("meta"):  # where what needs a value raises
        tokens = Tokens(torch.zeros(9, dtype=torch.int64), torch.ones(1), torch.ones(1), torch.ones(9))
        rows = linear_operator._Rows(tokens, -100, 4, V)
        taken = rows.take(torch.zeros(9, H), slice(0, 3))
    assert (rows.count, taken.shape) == (4, (3, H))
