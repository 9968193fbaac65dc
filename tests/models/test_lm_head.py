"""The lm_head: its scale and cap by family, the check that nothing else makes the logits, and a loss at its place."""

import pytest
import torch
from tiny import tiny_model
from tiny_packed import GQA, model_of, three_samples
from transformers import (
    AutoConfig,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    ModernBertDecoderConfig,
    NanoChatConfig,
    PhiConfig,
    Qwen2MoeConfig,
    RecurrentGemmaConfig,
)

from pocl_fast.data.packed import Rows, pack
from pocl_fast.models.lm_head import adds_router_loss, causal_lm, check_head, lm_head, loss_within_forward
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
        (
            FalconH1Config(
                **GQA,
                head_dim=8,
                lm_head_multiplier=0.1,
                mamba_d_ssm=32,
                mamba_n_heads=4,
                mamba_d_head=8,
                mamba_d_state=8,
            ),
            0.1,
            None,
        ),
        ("hyperclovax", 0.25, None),  # the name by which Granite divides
        (RecurrentGemmaConfig(**GQA, lru_width=32, logits_soft_cap=2.0), 1.0, 2.0),
        (NanoChatConfig(**GQA, final_logit_softcapping=1.5), 1.0, 1.5),
        ("nested", 1.0, None),  # a class that does not do what its configuration says
    ],
    ids=[
        "plain",
        "scaled",
        "divided",
        "capped",
        "bias",
        "multiplied",
        "by-name",
        "by-another-name",
        "always",
        "nested",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_lm_head_on_the_last_hidden_states(config, scale, softcap, dtype):
    if config == "hyperclovax":
        config = AutoConfig.for_model("hyperclovax", **GQA, head_dim=8, logits_scaling=0.25)
    if config == "nested":
        text, vision = (
            {**GQA, "head_dim": 8, "final_logit_softcapping": 0.5},
            {"hidden_size": 16, "num_hidden_layers": 1},
        )
        vision |= {"intermediate_size": 16, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=96)
    model = model_of(config, dtype)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    head, ids = lm_head(model), torch.arange(3, 20)[None]
    assert (head.logit_scale, head.logit_softcap) == (scale, softcap)
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits.to(dtype)
        torch.testing.assert_close(head.logits(hidden), logits)
    check_head(model)


class Cooled(LlamaForCausalLM):
    """A model with code of its own: a scale that is in no configuration."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.3
        return output


class Capped(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 7.7 * torch.tanh(output.logits * 1.3 / 7.7)
        return output


class Bent(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.1 * output.logits.relu()
        return output


@pytest.mark.parametrize(("kind", "want"), [(Cooled, (0.3, None)), (Capped, (1.3, 7.7))])
def test_a_scale_and_a_cap_that_nothing_names_are_found(kind, want):
    model = kind(tiny_model().config).eval()
    head = lm_head(model)
    assert head.logit_scale == pytest.approx(want[0], rel=1e-5)
    assert head.logit_softcap == (want[1] and pytest.approx(want[1], rel=1e-5))
    check_head(model)


def test_a_head_that_is_more_than_a_matrix_is_refused_by_name():
    with pytest.raises(InputError, match=r"Bent does more to its logits .* off by [1-9]\.\de-02"):
        check_head(Bent(tiny_model().config).eval(), "student")
    sizes = {name: value for name, value in GQA.items() if name != "num_key_value_heads"}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4}
    with pytest.raises(InputError, match="ModernBertDecoderForCausalLM does more to its logits"):
        check_head(model_of(ModernBertDecoderConfig(**sizes, **tokens)))


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


ADAPTERS = {
    "dora": ("LoraConfig", {"r": 2, "target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    "rank-stabilised": ("LoraConfig", {"r": 2, "target_modules": ["lm_head"], "use_rslora": True}),
    "whole": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "lora's bias": ("LoraConfig", {"r": 2, "target_modules": ["lm_head"], "lora_bias": True}),
    "ia3": ("IA3Config", {"target_modules": ["lm_head"], "feedforward_modules": []}),
    "oft": ("OFTConfig", {"target_modules": ["lm_head"], "oft_block_size": 8, "r": 0}),
    "vera": ("VeraConfig", {"r": 2, "target_modules": ["lm_head"]}),
    "fourier": ("FourierFTConfig", {"n_frequency": 10, "target_modules": ["lm_head"]}),
    "tokens of a tied head": ("TrainableTokensConfig", {"token_indices": [1, 2], "target_modules": ["embed_tokens"]}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_on_the_lm_head_are_right_once_trained_or_refused_before(name):
    peft = pytest.importorskip("peft")
    kind, options = ADAPTERS[name]
    model = peft.get_peft_model(tiny_model(tied="tied" in name), getattr(peft, kind)(task_type="CAUSAL_LM", **options))
    inner, before = causal_lm(model), {key: value.clone() for key, value in model.state_dict().items()}
    try:
        check_head(inner, "student")
        refused = False
    except InputError as error:
        refused = "the adapters of its lm_head (peft.tuners." in str(error)
        assert refused
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert refused == (name not in ("dora", "rank-stabilised", "whole"))
    if not refused:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=generator) * p.requires_grad)
            ids = torch.arange(3, 20)[None]
            hidden = inner.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            torch.testing.assert_close(lm_head(inner).logits(hidden), model.eval()(input_ids=ids).logits)


def test_doras_gradients_are_those_of_its_own_forward():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(tied=False), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data.add_(0.2 * torch.randn(p.shape))
    ids = torch.arange(3, 20)[None]
    hidden = causal_lm(model).get_decoder()(input_ids=ids).last_hidden_state
    ours, theirs = lm_head(causal_lm(model)).logits(hidden), model(input_ids=ids).logits
    upstream = torch.randn(ours.shape)
    for a, b in zip(*(torch.autograd.grad((x * upstream).sum(), trained) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_adapters_that_are_switched_off_are_not_in_the_weight():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(tied=False), config)
    with model.disable_adapter():
        head = lm_head(causal_lm(model))
        assert torch.equal(head.weight, causal_lm(model).lm_head.get_base_layer().weight)


# ---- a loss within the forward ----


@pytest.mark.parametrize("rows", list(Rows))
@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5),
        Qwen2MoeConfig(**GQA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, router_aux_loss_coef=0.5),
    ],
    ids=lambda config: config.model_type,
)
def test_the_routers_loss_is_that_of_the_models_own_forward_over_all_tokens(config, rows):
    config.output_router_logits = True
    model, said = model_of(config), []
    enable_packing(model)
    assert adds_router_loss(model, said.append)
    assert "is added, as in its own forward" in said[0]
    samples = three_samples()
    batch = pack(samples)
    total = [
        loss_within_forward(model, batch, lambda h, _: h.sum() * 0.0, packed=rows, router_weight=w) for w in (0.0, 2.0)
    ]
    longest = max(len(sample) for sample in samples)
    ids = [[*s.prompt_ids, *s.response_ids, *[0] * (longest - len(s))] for s in samples]
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in samples])
    model.set_attn_implementation("eager")
    want = model(input_ids=torch.tensor(ids), attention_mask=mask).aux_loss  # masks are transformers' own way to pad
    torch.testing.assert_close(total[1] - total[0], 2.0 * 0.5 * want)
    gates = [p for name, p in model.named_parameters() if name.endswith(("mlp.gate.weight", "moe.gate.weight"))]
    assert gates
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(total[1], gates))


def test_a_routers_loss_that_is_not_found_is_said_not_to_be_added():
    model, said = model_of(LlamaConfig(**GQA, output_router_logits=True)), []
    assert not adds_router_loss(model, said.append)
    assert "is not added" in said[0]


def test_a_routers_loss_of_a_sharded_model_is_said_not_to_be_added():
    model, said = model_of(MixtralConfig(**GQA, num_local_experts=4, output_router_logits=True)), []
    model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks its parts
    assert not adds_router_loss(model, said.append)
    assert "is not added: the model is sharded already" in said[0]


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
