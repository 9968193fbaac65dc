"""A model's forward over a packed row gives what it gives each sample alone."""

import pytest
import torch
import transformers
from tiny import tiny_model
from tiny_packed import GQA, LENGTHS, MIXED_LAYERS, SMALL, each_alone, model_of, responses_alone, row, three_samples
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhimoeConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    masking_utils,
)

from pocl_fast.data.packed import pack
from pocl_fast.models import packed_attention
from pocl_fast.models.lm_head import loss_within_forward
from pocl_fast.models.packed_attention import BY_MASK, BY_SAMPLE, VARLEN, enable_packing
from pocl_fast.models.packed_forward import forward_kwargs, supervised_hidden, supervised_logits
from pocl_fast.models.packing_check import packing_ready

CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "mistral-window-4": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
}

ATTENDING = pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**GQA),
        MistralConfig(**GQA, sliding_window=4),
        Qwen2Config(**GQA, **MIXED_LAYERS, sliding_window=4),
        Qwen3Config(**GQA, head_dim=12),  # padded to 16 for the kernel
    ],
    ids=["full", "windows", "both", "head of 12"],
)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_at_supervised_positions_are_those_of_each_sample_alone(name, packed):
    model = model_of(CONFIGS[name])
    want = responses_alone(model, three_samples())
    enable_packing(model)
    got = supervised_logits(model, pack(three_samples()), packed=packed)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    head = model.get_output_embeddings()
    hidden = supervised_hidden(model.get_decoder(), pack(three_samples()), packed=packed)
    torch.testing.assert_close(head(hidden), want, rtol=1e-4, atol=1e-5)
    seen = loss_within_forward(model, pack(three_samples()), lambda hidden, lm_head: hidden, packed=packed)
    torch.testing.assert_close(seen, hidden)
    assert "forward" not in vars(model)


def test_gradients_do_not_cross_from_one_sample_to_another():
    model = tiny_model()
    enable_packing(model)
    batch = pack(three_samples())
    embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_(True)
    arguments = {k: v for k, v in forward_kwargs(model, batch).items() if k != "input_ids"}
    first = batch.lengths[0]
    model(inputs_embeds=embedded, **arguments).logits[0, :first].sum().backward()
    assert embedded.grad[0, :first].abs().sum() > 0
    assert embedded.grad[0, first:].abs().sum() == 0


def test_generation_is_unchanged_by_packing_being_enabled():
    model = tiny_model()
    prompt = torch.arange(1, 9)[None]
    before = model.generate(prompt, max_new_tokens=8, do_sample=False)
    enable_packing(model)
    assert torch.equal(before, model.generate(prompt, max_new_tokens=8, do_sample=False))


@ATTENDING
def test_by_flash_attention_the_logits_are_those_of_each_sample_alone(flash_on_a_cpu, config):
    model, samples = model_of(config, torch.bfloat16), row(*LENGTHS)
    want = each_alone(model.float(), samples)
    model.to(torch.bfloat16).config._attn_implementation = VARLEN
    packed_attention.register()
    with torch.no_grad():
        got = model(**forward_kwargs(model, pack(samples))).logits[0].float()
    assert (got - want).norm() <= 2e-2 * want.norm()  # of bf16; a window off by one moves it by 0.3


@pytest.mark.gpu
@ATTENDING
def test_on_a_gpu_the_logits_are_those_of_each_sample_alone(config):
    samples = row(*LENGTHS)
    exact, model = model_of(config, torch.bfloat16).float(), model_of(config, torch.bfloat16).to("cuda")
    said = []
    assert packing_ready(model, said.append)
    assert "flash" in said[0]
    with torch.no_grad():
        got = model(**forward_kwargs(model, pack(samples).to("cuda"))).logits[0].float().cpu()
    want = each_alone(exact, samples)
    assert (got - want).norm() <= 3e-2 * want.norm()


@pytest.mark.parametrize("name", [BY_SAMPLE, VARLEN])
@pytest.mark.parametrize(
    "config", [LlamaConfig(**GQA), MistralConfig(**GQA, sliding_window=4)], ids=["full", "windows"]
)
def test_no_mask_of_the_whole_row_is_made_nor_positions_looked_at(monkeypatch, config, name):
    model, samples = model_of(config), row(*LENGTHS)
    want = each_alone(model, samples)

    def never(*args, **kwargs):
        raise AssertionError("transformers was asked for a mask")

    enable_packing(model)
    model.config._attn_implementation = name
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", never)
    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, never)
    with torch.no_grad():
        torch.testing.assert_close(model(**forward_kwargs(model, pack(samples))).logits[0], want, rtol=1e-4, atol=1e-4)
        supervised_hidden(model.get_decoder(), pack(samples), packed=True)
        with pytest.raises(AssertionError, match="asked for a mask"):  # and is where rows are padded
            model(input_ids=torch.ones(1, 3, dtype=torch.int64), attention_mask=torch.ones(1, 3))


# ---- families that need transformers' masks ----


@pytest.mark.parametrize(
    ("config", "implementation"),
    [
        (StableLmConfig(**GQA), BY_MASK),  # its layers drop what they do not know
        (PhimoeConfig(**GQA, sliding_window=4, num_local_experts=2), BY_SAMPLE),  # its windows are in masks alone
        ("llama4", BY_SAMPLE),  # chunks
    ],
    ids=["lengths lost", "windows unnamed", "chunks"],
)
def test_a_family_that_needs_masks_gets_them(config, implementation):
    if config == "llama4":
        from transformers import Llama4TextConfig

        config = Llama4TextConfig(
            **GQA, head_dim=8, attention_chunk_size=4, intermediate_size_mlp=48, num_local_experts=2
        )
    model, samples = model_of(config), row(*LENGTHS)
    want = each_alone(model, samples)
    said = []
    if packed_attention.why_never_packed(model):  # before transformers 5.18
        pytest.skip("its masks count chunks from the beginning of the row")
    packed = packing_ready(model, said.append)
    if config.model_type.startswith("llama4") and not packed:
        assert "they are padded instead" in said[-1]
        pytest.skip(
            f"transformers {transformers.__version__} counts chunks from the row's beginning: padded, and says so"
        )
    assert packed
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        got = model(**forward_kwargs(model, pack(samples))).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert ("over a mask of the whole row, which is slow" in said[-1]) == (implementation == BY_MASK)


def test_a_family_whose_scores_are_capped_keeps_its_own_attention_and_says_so():
    config = Gemma2Config(**GQA, attn_logit_softcapping=2.0)
    model, samples = model_of(config, attention=None), row(*LENGTHS)  # as transformers would load it
    want = each_alone(model_of(config), samples)
    said = []
    assert packing_ready(model, said.append)
    assert said == [
        "Gemma2ForCausalLM attends to packed rows by its own attention, over a mask of the whole row: sdpa does not cap"
        " its scores"
    ]
    with torch.no_grad():
        got = model(**forward_kwargs(model, pack(samples))).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
