"""Layers that train with products of bf16 on a CPU, against torch's own autocast and float64."""

import pytest
import torch
from precise import relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from pocl_fast.models.frozen import frozen_linears
from pocl_fast.models.rounded import rounded_linears

BF16 = 2.0**-8  # relative: half of the distance between two numbers, and a little for sums


def run(layer, x, context):
    """Output, and the gradients of a random linear function of it."""
    x = x.clone().requires_grad_(True)
    layer.zero_grad()
    with context:
        y = layer(x)
        torch.manual_seed(5)
        (y.float() * torch.randn(y.shape)).sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("shape", [(33, 70), (2, 7, 70), (0, 70), (70,)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_autocast_and_stay_fp32(shape, bias):
    layer, x = nn.Linear(70, 45, bias=bias), torch.randn(shape)
    got = run(layer, x, rounded_linears(layer))
    want = run(layer, x, torch.autocast("cpu", dtype=torch.bfloat16))
    exact = run(layer.double(), x.double(), rounded_linears(layer))  # float64 is not rounded
    assert all(one.dtype == torch.float32 for one in got)
    for ours, theirs, true in zip(got, want, exact, strict=True):
        assert ours.shape == true.shape
        assert relative_error(ours, theirs) <= 2 * BF16
        assert relative_error(ours, true) <= 2 * BF16
    if len(x) and not bias:
        assert relative_error(got[0], exact[0]) > 1e-5
        torch.testing.assert_close(got[0], want[0].float(), rtol=0, atol=0)


def test_a_weight_or_an_input_that_does_not_train_gets_no_gradient():
    layer = nn.Linear(16, 8).requires_grad_(False)
    x = torch.randn(4, 16, requires_grad=True)
    with rounded_linears(layer):
        layer(x).sum().backward()
        assert not layer(x.detach()).requires_grad
    assert layer.weight.grad is None
    assert relative_error(x.grad, layer.weight.double().sum(0).expand(4, 16)) <= 2 * BF16
    layer.requires_grad_(True)
    with rounded_linears(layer):
        layer(x.detach()).sum().backward()
    assert relative_error(layer.weight.grad, x.detach().double().sum(0).expand(8, 16)) <= 2 * BF16


def test_layers_with_a_forward_of_their_own_and_other_dtypes_stay_as_they_are():
    frozen, half, plain = nn.Linear(32, 32), nn.Linear(32, 32).bfloat16(), nn.Linear(32, 32)
    model = nn.ModuleList([frozen, half, plain, nn.Embedding(4, 32)])
    with frozen_linears(frozen):
        own = frozen.forward
        with rounded_linears(model):
            assert frozen.forward is own
            assert "forward" not in vars(half)
            assert "forward" in vars(plain)
        assert frozen.forward is own
    assert "forward" not in vars(plain)


def test_layers_are_as_before_after_an_error():
    layer = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="shape"), rounded_linears(layer):
        layer(torch.randn(2, 5))
    assert "forward" not in vars(layer)


def test_activations_may_be_computed_again_on_the_way_back():
    torch.manual_seed(0)
    layers, x = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32)), torch.randn(6, 32)
    kept = run(layers, x, rounded_linears(layers))
    model = _Checkpointed(layers)
    again = run(model, x, rounded_linears(model))
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class _Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_layers_keep_no_rounded_copy_of_what_they_share():
    """Three layers of one input keep that input, as fp32 layers do."""
    layers, x = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3)), torch.randn(8, 64, requires_grad=True)
    kept = []
    with rounded_linears(layers), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sum(layer(x) for layer in layers).sum()
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), *(layer.weight.data_ptr() for layer in layers)}


def test_a_layer_that_does_not_train_keeps_no_input():
    """Most layers under adapters; what it was given may then be changed in place, as torch allows."""
    layer, x = nn.Linear(64, 32, bias=False).requires_grad_(False), torch.randn(8, 64, requires_grad=True)
    given = x * 1
    with rounded_linears(layer):
        y = layer(given)
        given.zero_()
        y.sum().backward()
    assert relative_error(x.grad, layer.weight.double().sum(0).expand(8, 64)) <= 2 * BF16
