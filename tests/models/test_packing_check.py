"""The check that packing holds: families that pack, families that do not, and what is said of these."""

import pytest
import torch
from tiny_packed import FALCON, GQA, model_of, responses_alone, row, three_samples
from transformers import (
    BloomConfig,
    FalconConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    Qwen3Config,
    StableLmConfig,
)

from pocl_fast.data.packed import pack
from pocl_fast.models import packed_attention
from pocl_fast.models.packed_attention import VARLEN, enable_packing
from pocl_fast.models.packed_forward import forward_kwargs, supervised_logits
from pocl_fast.models.packing_check import PackingErrors, packing_errors, packing_holds, packing_ready


def test_the_check_accepts_a_family_that_packs_and_finds_one_that_does_not():
    bloom = BloomConfig(
        vocab_size=97, hidden_size=32, n_layer=2, n_head=4
    )  # its biases count from the beginning of the row
    good, bad = model_of(LlamaConfig(**GQA)), model_of(bloom)
    want = responses_alone(bad, three_samples())
    for model in (good, bad):
        enable_packing(model)
    assert max(packing_errors(good, 97)) < 1e-4
    assert packing_holds(good)
    said = []
    assert not packing_holds(bad, said.append)
    assert said == ["BloomForCausalLM does not support packed batches: they are padded instead, which is slower"]
    torch.testing.assert_close(supervised_logits(bad, pack(three_samples()), packed=False), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config_class", [MixtralConfig, OlmoeConfig])
def test_a_model_with_the_loss_of_its_router_packs(config_class):
    experts = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
    model = model_of(config_class(**GQA, **experts, output_router_logits=True))
    assert packing_ready(model, lambda _: None)


def test_packing_holds_where_its_kernel_rounds_as_a_deep_model_in_bf16_does(flash_on_a_cpu):
    """Eight layers in bf16, whose logits by flash attention and by sdpa are a hundredth apart or so."""
    config = Qwen3Config(**GQA | {"hidden_size": 256, "num_hidden_layers": 8}, head_dim=64)
    model = model_of(config, torch.bfloat16)
    packed_attention.register()
    model.config._attn_implementation = VARLEN
    errors = packing_errors(model, 97)
    assert errors.leak == 0
    assert errors.alone > 1e-3  # else this shows nothing
    assert errors.hold


@pytest.mark.parametrize("errors", [(0.02, 0.001, 0.001), (0, 0.2, 0.01), (0, 0.15, 0.15), (0, float("nan"), 0.001)])
def test_packing_does_not_hold_where_samples_leak_or_move_or_the_kernel_is_wrong(errors):
    assert PackingErrors(0, 1e-6, 1e-6).hold
    assert not PackingErrors(*errors).hold


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [StableLmConfig(**GQA), LlamaConfig(**GQA)], ids=["lengths lost", "plain"])
def test_the_check_leaves_a_model_in_the_mode_it_was_in(config, training):
    model = model_of(config).train(training)
    assert packing_ready(model, lambda _: None)
    assert model.training is training


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FalconConfig(**FALCON, alibi=True), "its biases (ALiBi) lose digits along a row"),
        (LlamaConfig(**GQA, index_topk=4), "its indexer chooses among all tokens of a row"),
    ],
)
def test_a_model_whose_long_rows_would_leak_is_padded_with_the_reason(config, reason):
    model, said = model_of(config), []
    assert not packing_ready(model, said.append)
    assert said == [
        f"{type(model).__name__} does not support packed batches ({reason}): they are padded instead, which is slower"
    ]
    assert model.config._attn_implementation == "eager"


def test_a_model_that_refuses_packed_rows_is_padded_in_its_own_words(monkeypatch):
    model, said, forward = model_of(LlamaConfig(**GQA)), [], LlamaForCausalLM.forward

    def refuses(self, *args, packed_lengths=None, **kwargs):
        if packed_lengths:
            raise ValueError("cannot keep packed sequences apart\nwithout a kernel")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", refuses)
    assert not packing_ready(model, said.append)
    assert "(cannot keep packed sequences apart): they are padded instead" in said[-1]


def test_a_model_that_loses_the_lengths_computes_nothing_wrong():
    model = model_of(StableLmConfig(**GQA))
    enable_packing(model)
    with pytest.raises(packed_attention.LengthsLost, match="StableLmAttention is given no lengths"):
        model(**forward_kwargs(model, pack(row(3, 4))))
    assert packing_holds(model)
