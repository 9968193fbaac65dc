"""Packed batches: the layout, and that packing changes nothing a model computes."""

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from pocl_fast.data.packed import (
    forward_kwargs,
    pack,
    packing_errors,
    packing_holds,
    supervised_hidden,
    supervised_logits,
    token_budget_batches,
)
from pocl_fast.data.records import EncodedSample
from pocl_fast.models.lm_head import loss_within_forward
from pocl_fast.models.packed_attention import enable_packing

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "mistral-window-4": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
}


def samples():
    generator = torch.Generator().manual_seed(3)
    sizes = [(3, 4), (1, 9), (12, 1)]
    rows = [torch.randint(0, 97, (p + r,), generator=generator).tolist() for p, r in sizes]
    return [
        EncodedSample(i, tuple(row[:p]), tuple(row[p:]), False)
        for i, (row, (p, _)) in enumerate(zip(rows, sizes, strict=True))
    ]


def small_model(config):
    torch.manual_seed(0)
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config).eval()


def test_the_layout_supervises_each_response_token_from_the_token_before_it():
    batch = pack([EncodedSample(0, (5, 6), (7, 8), False), EncodedSample(1, (1,), (2,), False)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.supervised.tolist() == [1, 2, 4]
    assert batch.labels.tolist() == [7, 8, 2]
    assert (batch.lengths, batch.counts) == ((4, 2), (2, 1))


def test_no_samples_cannot_be_packed():
    with pytest.raises(ValueError, match="no samples"):
        pack([])


def test_token_budget_batches_hold_every_item_once_within_the_budget():
    lengths = [5, 9, 1, 30, 4, 4, 8]
    batches = token_budget_batches(lengths, max_tokens=10)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(sum(lengths[i] for i in batch) <= 10 or len(batch) == 1 for batch in batches)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_at_supervised_positions_are_those_of_each_sample_alone(name, packed):
    model = small_model(CONFIGS[name])
    want = torch.cat(
        [
            model(input_ids=torch.tensor([s.prompt_ids + s.response_ids])).logits[0, len(s.prompt_ids) - 1 : -1]
            for s in samples()
        ]
    )
    enable_packing(model)
    got = supervised_logits(model, pack(samples()), packed=packed)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    head = model.get_output_embeddings()
    hidden = supervised_hidden(model.get_decoder(), pack(samples()), packed=packed)
    torch.testing.assert_close(head(hidden), want, rtol=1e-4, atol=1e-5)
    seen = loss_within_forward(model, pack(samples()), lambda hidden, lm_head: hidden, packed=packed)
    torch.testing.assert_close(seen, hidden)
    assert "forward" not in vars(model)


def test_gradients_do_not_cross_from_one_sample_to_another():
    model = tiny_model()
    enable_packing(model)
    batch = pack(samples())
    embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_(True)
    arguments = {k: v for k, v in forward_kwargs(model, batch).items() if k != "input_ids"}
    first = batch.lengths[0]
    model(inputs_embeds=embedded, **arguments).logits[0, :first].sum().backward()
    assert embedded.grad[0, :first].abs().sum() > 0
    assert embedded.grad[0, first:].abs().sum() == 0


def test_the_check_accepts_a_family_that_packs_and_finds_one_that_does_not():
    bloom = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)  # its biases count from the row's begin
    good, bad = small_model(CONFIGS["llama"]), small_model(bloom)
    want = torch.cat(
        [
            bad(input_ids=torch.tensor([s.prompt_ids + s.response_ids])).logits[0, len(s.prompt_ids) - 1 : -1]
            for s in samples()
        ]
    )
    for model in (good, bad):
        enable_packing(model)
    assert max(packing_errors(good, 97)) < 1e-4
    assert packing_holds(good)
    said = []
    assert not packing_holds(bad, said.append)
    assert said == ["BloomForCausalLM does not support packed batches: they are padded instead, which is slower"]
    torch.testing.assert_close(supervised_logits(bad, pack(samples()), packed=False), want, rtol=1e-4, atol=1e-5)


def test_generation_is_unchanged_by_packing_being_enabled():
    model = tiny_model()
    prompt = torch.arange(1, 9)[None]
    before = model.generate(prompt, max_new_tokens=8, do_sample=False)
    enable_packing(model)
    assert torch.equal(before, model.generate(prompt, max_new_tokens=8, do_sample=False))
