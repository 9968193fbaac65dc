"""Frozen linear layers give what the plain ones give."""

import pytest
import torch
from tiny import tiny_model
from torch import nn

from pocl_fast.models.frozen import freeze_linears, frozen_linears


# 1 row: a decoding step alone; 128: what the layout is planned for; 300: past it, and not a multiple of anything
@pytest.mark.parametrize("rows", [1, 128, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_layer_gives_the_plain_layers_products(rows, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 70, bias=bias), torch.randn(2, rows, 96)
    want = layer.double()(x.double()).detach()
    layer.float()
    assert freeze_linears(layer) == [layer]
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-6)
    assert not layer(x).requires_grad


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not multiply bf16 for torch"
)
def test_a_layer_frozen_in_bf16_rounds_inputs_weights_and_results_and_gives_fp32():
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 70), torch.randn(5, 96)
    want = nn.functional.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()).float().detach()
    freeze_linears(layer, torch.bfloat16)
    got = layer(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-3)  # sums in another order may round to a neighbour
    assert torch.equal(got, got.bfloat16().float())


def test_a_model_answers_the_same_within_and_learns_and_sees_its_weights_again_after():
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    want = model(ids).logits.detach()
    with frozen_linears(model):
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
        with frozen_linears(model):
            pass
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight *= 2
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)  # the inner block undid nothing
    assert not torch.allclose(model(ids).logits, want, atol=1e-3)
    model(ids).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_layers_that_are_not_plain_fp32_linears_keep_their_own_forward():
    class Other(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert freeze_linears(nn.ModuleList([Other(4, 4), nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4)])) == []
