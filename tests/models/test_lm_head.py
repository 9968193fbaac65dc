"""The lm_head: its scale and cap by family, the check that nothing else makes the logits, and a loss at its place."""

import pytest
import torch
from tiny import tiny_model
from tiny_packed import GQA, model_of, three_samples
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, PhiConfig

from pocl_fast.data.packed import pack
from pocl_fast.models.lm_head import causal_lm, check_head, lm_head, loss_within_forward
from pocl_fast.models.packed_attention import enable_packing
from pocl_fast.system.errors import InputError


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        (LlamaConfig(**GQA), 1.0, None),
        (CohereConfig(**GQA, logit_scale=0.25), 0.25, None),
        (GraniteConfig(**GQA, logits_scaling=8.0), 0.125, None),
        (Gemma2Config(**GQA, head_dim=8, final_logit_softcapping=3.0), 1.0, 3.0),
        (PhiConfig(**GQA), 1.0, None),  # its lm_head has a bias
    ],
    ids=["plain", "scaled", "divided", "capped", "bias"],
)
def test_logits_are_the_lm_head_on_the_last_hidden_states(config, scale, softcap):
    model = model_of(config)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    head, ids = lm_head(model), torch.arange(3, 20)[None]
    assert (head.logit_scale, head.logit_softcap) == (scale, softcap)
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(head.logits(hidden), model(input_ids=ids, use_cache=False).logits)
    check_head(model)


def test_a_model_that_does_more_to_its_logits_is_refused_and_keeps_its_mode():
    model = tiny_model().train()
    check_head(model)
    assert model.training
    model.lm_head.register_forward_hook(lambda _, __, logits: logits + 1)
    with pytest.raises(InputError, match="LlamaForCausalLM does more to its logits than apply its lm_head"):
        check_head(model)


def test_a_model_without_an_lm_head_is_refused():
    model = tiny_model()
    model.get_output_embeddings = lambda: None
    with pytest.raises(InputError, match="LlamaForCausalLM has no lm_head that pocl-fast finds"):
        lm_head(model)


def test_a_detached_lm_head_shares_no_memory_with_its_model():
    model = tiny_model()
    head = lm_head(model)
    assert head.weight is model.get_output_embeddings().weight
    copy = head.detached()
    assert torch.equal(copy.weight, head.weight)
    assert copy.weight.data_ptr() != head.weight.data_ptr()
    assert not copy.weight.requires_grad


def test_the_transformers_model_is_found_within_its_wrappers():
    model = tiny_model()
    wrapped = torch.nn.Module()
    wrapped.module = torch.compile(model)
    assert causal_lm(wrapped) is model
    assert causal_lm(model) is model


def test_adapters_on_the_lm_head_are_in_its_weight_and_must_have_no_dropout():
    peft = pytest.importorskip("peft")
    ids = torch.arange(3, 20)[None]

    def adapted(dropout):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=dropout, init_lora_weights=False)
        return peft.get_peft_model(tiny_model(tied=False), config).eval()

    model = adapted(0.0)
    inner = causal_lm(model)
    with torch.no_grad():
        hidden = inner.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(lm_head(inner).logits(hidden), model(input_ids=ids).logits)
    with pytest.raises(InputError, match="LoRA on the lm_head must have no dropout"):
        lm_head(causal_lm(adapted(0.1)))


@pytest.mark.parametrize("packed", [True, False])
def test_a_loss_within_the_forward_has_the_gradients_of_one_on_the_logits(packed):
    batch = pack(three_samples())
    models = [tiny_model(tied=False) for _ in range(2)]
    for model in models:
        enable_packing(model)

    def loss(hidden, head):
        return torch.nn.functional.cross_entropy(head.logits(hidden), batch.labels, reduction="sum")

    value = loss_within_forward(models[0], batch, loss, packed=packed)
    value.backward()
    want = 0.0
    for sample in three_samples():
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        labels = ids.clone()
        labels[:, : len(sample.prompt_ids)] = -100
        want = want + models[1](input_ids=ids, labels=labels).loss * len(sample.response_ids)
    want.backward()
    torch.testing.assert_close(value, want)
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert "forward" not in vars(models[0])
    assert "forward" not in vars(models[0].lm_head)
