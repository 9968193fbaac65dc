"""Products with an lm_head against float64: what comes out is an fp32 sum of products of rounded inputs, whichever way
it is computed. The C++ products run where the processor multiplies bf16 and torch has their micro-kernel."""

from __future__ import annotations

import pytest
import torch

from pocl_fast.loss import cpp, lm_head_products
from pocl_fast.loss.lm_head_products import HeadProducts, weight_grad_

WEIGHTS = (torch.bfloat16, torch.float32)
# each is below, at or past a block of the C++ products: rows 32, columns 64, of K 32 and 1024, panels of the vocabulary
# 128, of the hidden size 768; odd sizes have no pairs and no whole vectors
SIZES = [(1, 1, 1), (2, 64, 32), (31, 63, 37), (33, 129, 65), (64, 257, 1030), (70, 128, 769), (100, 1000, 2049)]


@pytest.fixture(params=["cpp", "torch"])
def way(request, monkeypatch):
    """Both ways to a product of bf16 numbers on a CPU."""
    if request.param == "torch":
        monkeypatch.setattr(cpp, "has_products", lambda: False)
    elif not cpp.has_products():
        pytest.skip("this processor or this torch does not multiply bf16")
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def exact(x):
    """The values that are multiplied."""
    return x.bfloat16().double()


def normal(way, *shape, dtype=torch.float32):
    """torch rounds fp32 or not, by its sizes: it gets numbers that this does not change."""
    x = torch.randn(shape)
    return (x.bfloat16() if way == "torch" else x).to(dtype)


def strided(n, V):
    """[n, V] fp32 within a larger matrix, and that matrix, of sevens."""
    whole = torch.full((n, V + 5), 7.0)
    return whole[:, :V], whole


def assert_sums(got, factors, want):
    """Each number is within fp32's rounding of a sum of K terms, taken in any order."""
    a, b = factors
    bound = 2**-24 * (a.abs() @ b.abs()) * (2 + a.shape[1] ** 0.5)
    assert ((got.double() - want).abs() <= bound + 2**-24 * want.abs()).all()


@pytest.mark.parametrize(("n", "V", "H"), SIZES)
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_not_rounded(way, threads, n, V, H, weight_dtype, bias):
    hidden, weight = normal(way, n, H, dtype=torch.bfloat16), normal(way, V, H, dtype=weight_dtype)
    added = torch.randn(V).to(weight_dtype) if bias else None
    out, whole = strided(n, V)
    HeadProducts(weight, added, torch.bfloat16).logits(hidden, out)
    product = exact(hidden) @ exact(weight).t()
    assert_sums(out, (exact(hidden), exact(weight).t()), product + added.double() if bias else product)
    assert (whole[:, V:] == 7).all()


@pytest.mark.parametrize(("n", "V", "H"), SIZES)
@pytest.mark.parametrize("weight_dtype", WEIGHTS)
def test_gradients_of_hidden_states_are_rounded_once(way, threads, n, V, H, weight_dtype):
    weight, (grad, _) = normal(way, V, H, dtype=weight_dtype), strided(n, V)
    grad.copy_(normal(way, n, V))
    got = HeadProducts(weight, None, torch.bfloat16).hidden_grad(grad, torch.float32)
    assert_sums(got, (exact(grad), exact(weight)), exact(grad) @ exact(weight))


@pytest.mark.parametrize(("n", "V", "H"), SIZES)
@pytest.mark.parametrize("hidden_dtype", WEIGHTS)
@pytest.mark.parametrize("add", [False, True])
def test_gradients_of_an_lm_head_add_up(way, threads, n, V, H, hidden_dtype, add):
    hidden, (grad, _) = normal(way, n, H, dtype=hidden_dtype), strided(n, V)
    grad.copy_(normal(way, n, V))
    total = torch.randn(V, H) if add else torch.full((V, H), torch.nan)  # what was there must not be read
    before = total.double() if add else 0.0
    weight_grad_(total, grad, hidden, torch.bfloat16, add=add)
    factors = exact(grad).t(), exact(hidden)
    assert_sums(total, factors, before + factors[0] @ factors[1])


@pytest.mark.parametrize(("n", "V"), [(0, 5), (3, 0)])
def test_the_sum_of_no_terms_is_zero(way, n, V):
    head, hidden = HeadProducts(torch.randn(V, 40).bfloat16(), None, torch.bfloat16), torch.randn(n, 40).bfloat16()
    grad, total = torch.empty(n, V), torch.ones(V, 40)
    head.logits(hidden, grad)
    assert torch.equal(head.hidden_grad(grad, torch.float32), torch.zeros(n, 40))
    weight_grad_(total, grad, hidden, torch.bfloat16, add=True)
    assert torch.equal(total, torch.ones(V, 40))
    weight_grad_(total, grad, hidden, torch.bfloat16, add=False)
    assert torch.equal(total, torch.zeros(V, 40))


# small integers are exact in bf16 and their sums in fp32: one element read from a wrong place changes the result
@pytest.mark.parametrize(("n", "V", "H"), [*SIZES, (257, 4097, 96)])
def test_sums_of_integers_are_exact(way, threads, n, V, H):
    def integers(*shape, dtype):
        return torch.randint(-4, 5, shape).to(dtype)

    hidden, weight = integers(n, H, dtype=torch.bfloat16), integers(V, H, dtype=torch.bfloat16)
    grad = integers(n, V, dtype=torch.float32)
    head, out = HeadProducts(weight, None, torch.bfloat16), strided(n, V)[0]
    head.logits(hidden, out)
    assert torch.equal(out, hidden.float() @ weight.float().t())
    assert torch.equal(head.hidden_grad(grad, torch.float32), grad @ weight.float())
    total = torch.ones(V, H)
    weight_grad_(total, grad, hidden, torch.bfloat16, add=True)
    assert torch.equal(total, 1 + grad.t() @ hidden.float())


@pytest.mark.skipif(not cpp.has_products(), reason="this processor or this torch does not multiply bf16")
def test_the_number_of_threads_changes_no_bit_of_the_cpp_products():
    hidden, weight, grad = torch.randn(70, 769).bfloat16(), torch.randn(1000, 769).bfloat16(), torch.randn(70, 1000)
    results = []
    before = torch.get_num_threads()
    for number in (1, 2, 3, 11):
        torch.set_num_threads(number)
        logits, total = torch.empty(70, 1000), torch.empty(1000, 769)
        cpp.logits_product(hidden, weight, None, logits)
        cpp.weight_grad_product(grad, hidden, total, add=False)
        results.append((logits, cpp.hidden_grad_product(grad, weight), total))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not cpp.has_products(), reason="this processor or this torch does not multiply bf16")
def test_gradients_are_rounded_to_nearest_even():
    # one, and the numbers half way between it and its neighbours in bf16; a little past the half way
    grad = torch.tensor([[1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20, -1.0 - 2**-8]])
    assert torch.equal(cpp.hidden_grad_product(grad, torch.eye(5)), grad.bfloat16().float())


@pytest.mark.skipif(not cpp.has_products(), reason="this processor or this torch does not multiply bf16")
def test_a_nan_or_an_infinity_stays_in_its_row():
    hidden, weight = torch.randn(40, 33).bfloat16(), torch.randn(70, 33).bfloat16()
    hidden[3, 5], hidden[9, 32] = torch.nan, torch.inf
    out = torch.empty(40, 70)
    cpp.logits_product(hidden, weight, None, out)
    assert out.isnan().all(1).nonzero().flatten().tolist() == [3]
    assert (~out.isfinite()).any(1).nonzero().flatten().tolist() == [3, 9]


# as a weight that is the transposed of an embedding, and hidden states sliced out of larger ones
def test_factors_may_lie_in_any_way(way):
    hidden = torch.randn(2, 7, 40).bfloat16()[:, :, ::2].transpose(0, 1)[:, 1]
    weight, out = torch.randn(20, 90).bfloat16().t(), torch.empty(7, 90)
    HeadProducts(weight, None, torch.bfloat16).logits(hidden, out)
    assert_sums(out, (exact(hidden), exact(weight).t()), exact(hidden) @ exact(weight).t())
    out.copy_(normal(way, 7, 90))
    total = torch.empty(90, 20)
    weight_grad_(total, out, hidden, torch.bfloat16, add=False)
    assert_sums(total, (exact(out).t(), exact(hidden)), exact(out).t() @ exact(hidden))


# fp16 has more digits than bf16, and fp32 stays fp32
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_multiplied_as_fp32(dtype):
    weight, hidden, out = torch.randn(130, 33).to(dtype), torch.randn(5, 33).to(dtype), torch.empty(5, 130)
    assert lm_head_products.cpp_products(dtype, weight) is None
    HeadProducts(weight, None, dtype).logits(hidden, out)
    torch.testing.assert_close(out.double(), hidden.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)


def test_products_of_other_shapes_are_refused():
    if not cpp.has_products():
        pytest.skip("this processor or this torch does not multiply bf16")
    with pytest.raises(ValueError, match="logits_product: the arguments' shapes do not fit"):
        cpp.logits_product(torch.zeros(3, 4), torch.zeros(5, 6), None, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="weight_grad_product"):
        cpp.weight_grad_product(torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(4, 5), add=False)
