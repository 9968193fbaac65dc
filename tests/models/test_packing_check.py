"""The check that packing holds: families that pack, families that do not, what is said of these, and that the check
reaches beyond windows and leaves the model as it was."""

import pytest
import torch
from tiny_packed import FALCON, GQA, each_alone, model_of, responses_alone, row, three_samples
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3Config,
    Qwen3NextConfig,
    StableLmConfig,
    XGLMConfig,
)

from pocl_fast.data.packed import Rows, pack
from pocl_fast.inputs.left_to_right import check_left_to_right
from pocl_fast.models import packed_attention, packing_check
from pocl_fast.models.lm_head import check_head, loss_within_forward
from pocl_fast.models.packed_attention import BY_SAMPLE, VARLEN, Way, enable_packing
from pocl_fast.models.packed_forward import forward_kwargs, supervised_hidden, supervised_logits
from pocl_fast.models.packing_check import (
    EXACT_TOLERANCE,
    KERNEL_TOLERANCE,
    PackingErrors,
    Probe,
    packing_errors,
    packing_holds,
    packing_ready,
)
from pocl_fast.system.errors import InputError


def test_the_check_accepts_a_family_that_packs_and_finds_one_that_does_not():
    bloom = BloomConfig(
        vocab_size=97, hidden_size=32, n_layer=2, n_head=4
    )  # its biases count from the beginning of the row
    good, bad = model_of(LlamaConfig(**GQA)), model_of(bloom)
    want = responses_alone(bad, three_samples())
    for model in (good, bad):
        enable_packing(model)
    assert packing_holds(good) == Rows.PACKED
    said = []
    assert packing_holds(bad, said.append) == Rows.PADDED
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
    with torch.no_grad():
        probe = Probe.of(model)
        errors = packing_errors(model, probe)
    assert not probe.exact
    assert errors.leak == 0
    assert errors.packed > 1e-3  # else this shows nothing
    assert errors.hold(KERNEL_TOLERANCE)
    assert not errors.hold(EXACT_TOLERANCE)


@pytest.mark.parametrize(
    "errors", [(1e-6, 1e-6, True), (2e-4, 1e-6, False), (0, 2e-4, False), (0, float("nan"), False)]
)
def test_packing_does_not_hold_where_samples_leak_or_move(errors):
    assert PackingErrors(0, 1e-6).hold(EXACT_TOLERANCE)
    assert PackingErrors(1e-6, 1e-6, depends=False).hold(EXACT_TOLERANCE)  # experts with other numbers of tokens
    assert not PackingErrors(*errors).hold(EXACT_TOLERANCE)


# ---- what a probe must reach ----


@pytest.mark.parametrize("window", [16, 4096])
def test_a_window_that_is_lost_is_found_however_long_it_is(monkeypatch, window):
    sound = packed_attention._sample_masks
    monkeypatch.setattr(packed_attention, "_sample_masks", lambda mask, lengths, _, at: sound(mask, lengths, None, at))
    model, said = model_of(MistralConfig(**GQA, sliding_window=window)), []
    assert packing_ready(model, said.append)
    assert model.config._attn_implementation != BY_SAMPLE
    assert "over a mask of the whole row" in said[-1]
    assert model.config.sliding_window == window
    assert {
        layer.self_attn.sliding_window for layer in model.model.layers if hasattr(layer.self_attn, "sliding_window")
    } <= {window}


@pytest.mark.parametrize("chunk", [8, 8192])
def test_a_chunk_that_is_lost_is_found_however_long_it_is(monkeypatch, chunk):
    from transformers import Llama4TextConfig

    config = Llama4TextConfig(
        **GQA, head_dim=8, attention_chunk_size=chunk, intermediate_size_mlp=48, num_local_experts=2
    )
    model = model_of(config)
    if packed_attention.why_never_packed(model):
        pytest.skip("before transformers 5.18 chunks count from the beginning of the row")
    with monkeypatch.context() as patched:
        patched.setattr(packed_attention, "_is_plain", lambda model: True)
        packing_ready(model, lambda _: None)
        assert model.config._attn_implementation != BY_SAMPLE
    assert model.config.attention_chunk_size == chunk
    model = model_of(config)
    assert packing_ready(model, lambda _: None)
    assert model.config._attn_implementation == BY_SAMPLE
    assert model.config.attention_chunk_size == chunk


def test_a_cap_of_scores_that_sdpa_would_lose_is_computed_by_the_familys_own_attention(monkeypatch):
    config = Gemma2Config(**GQA, head_dim=8, attn_logit_softcapping=2.0, sliding_window=4096)
    model, samples, said = model_of(config), row(5, 12), []
    want = each_alone(model, samples)
    monkeypatch.setattr(
        packing_check, "enable_packing", lambda model, *_, **__: packed_attention.use(model, Way(BY_SAMPLE, ""))
    )
    assert packing_ready(model, said.append)
    assert said == [
        "Gemma2ForCausalLM attends to packed rows by its own attention, over a mask of the whole row: sdpa computes"
        " something else"
    ]
    with torch.no_grad():
        got = model(**forward_kwargs(model, pack(samples))).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


JAMBA = {
    "num_experts": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 8,
    "use_mamba_kernels": False,
}


@pytest.mark.parametrize(
    "config",
    [Lfm2Config(**GQA, layer_types=["conv", "full_attention"]), JambaConfig(**GQA, **JAMBA)],
    ids=["convolution", "mamba"],
)
def test_a_small_leak_between_samples_is_found_and_padding_is_right(config):
    config.initializer_range = 0.02  # of a new model: the leak is small
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    model, samples = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), three_samples()
    want = responses_alone(model, samples)
    rows = packing_ready(model, lambda _: None)
    assert rows == Rows.PADDED
    with torch.no_grad():
        torch.testing.assert_close(supervised_logits(model, pack(samples), packed=rows), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        GptOssConfig(**GQA, head_dim=8, sliding_window=4, num_local_experts=4, num_experts_per_tok=2),
        XGLMConfig(vocab_size=97, d_model=32, num_layers=2, attention_heads=4, ffn_dim=48),
    ],
    ids=["two kinds of layers", "one"],
)
def test_a_family_that_asks_for_masks_without_positions_is_given_them_and_packs(config):
    model, samples = model_of(config), row(5, 1, 12)
    want = each_alone(model, samples)
    assert packing_ready(model, lambda _: None)
    with torch.no_grad():
        got = model(**forward_kwargs(model, pack(samples))).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- RoPE by the longest sample of a forward ----

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}


def by_longest(kind):
    if kind == "longrope":
        from transformers import Phi3Config

        rope = LONG | {"original_max_position_embeddings": 8}
        return Phi3Config(**GQA, rope_parameters=rope, original_max_position_embeddings=8, pad_token_id=0)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return LlamaConfig(**GQA, rope_parameters=dynamic, max_position_embeddings=8)


@pytest.mark.parametrize("rows", list(Rows))
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_sample_does_not_depend_on_the_longest_of_its_batch(kind, rows):
    samples = row(5, 12, 30, 9, 12)  # on both sides of the 8 tokens from which RoPE is another
    alone = torch.cat([each_alone(model_of(by_longest(kind)), [one])[:-1] for one in samples])  # of a new model each
    model = model_of(by_longest(kind))
    assert packing_ready(model, lambda _: None)
    with torch.no_grad():
        for _ in range(2):  # a model that has seen longer samples is no other
            got = supervised_logits(model, pack(samples), packed=rows)
            torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)


# ---- batches that are neither packed nor padded ----


def test_samples_of_one_length_share_a_forward_where_an_indexer_chooses_the_keys():
    model, said = model_of(LlamaConfig(**GQA, index_topk=4)), []
    rows = packing_ready(model, said.append)
    assert rows == Rows.BY_LENGTH
    assert not rows
    assert said == [
        "LlamaForCausalLM supports neither packed nor padded batches (its indexer chooses among all tokens of a row):"
        " samples of one length share a forward instead, which is slow"
    ]


def test_batches_by_length_are_in_the_samples_order_and_have_their_gradients():
    samples = row(5, 12, 5, 9)
    model = model_of(LlamaConfig(**GQA))
    batch, calls = pack(samples), []
    model.model.register_forward_hook(lambda _, __, output: calls.append(output.last_hidden_state.shape[:2]))
    with torch.no_grad():
        got = supervised_hidden(model.model, batch, packed=Rows.BY_LENGTH)
        want = supervised_hidden(model.model, batch, packed=False)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert calls[:3] == [(2, 5), (1, 12), (1, 9)]

    def loss(hidden, head):
        return torch.nn.functional.cross_entropy(head.logits(hidden), batch.labels)

    weights = list(model.parameters())
    losses = [loss_within_forward(model, batch, loss, packed=rows) for rows in (Rows.BY_LENGTH, Rows.PADDED)]
    for ours, theirs in zip(*(torch.autograd.grad(one, weights) for one in losses), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


# ---- what is said, and what is left as it was ----


@pytest.mark.parametrize(
    "config", [StableLmConfig(**GQA), LlamaConfig(**GQA), MistralConfig(**GQA)], ids=lambda c: c.model_type
)
def test_the_check_leaves_modes_random_numbers_and_weights_as_they_were(config):
    model = model_of(config)
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    modes = [module.training for module in model.modules()]
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    settings = model.config.to_dict()
    assert packing_ready(model, lambda _: None)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == settings


def test_a_model_whose_long_rows_would_leak_is_padded_with_the_reason():
    model, said = model_of(FalconConfig(**FALCON, alibi=True)), []
    assert not packing_ready(model, said.append)
    assert said == [
        "FalconForCausalLM does not support packed batches (its biases (ALiBi) lose digits along a row): they are"
        " padded instead, which is slower"
    ]
    assert model.config._attn_implementation == "eager"


def test_a_model_is_tried_once_and_each_line_said_once(monkeypatch):
    model, said, tried, probe = model_of(FalconConfig(**FALCON, alibi=True)), [], [], packing_check.Probe.of
    monkeypatch.setattr(packing_check.Probe, "of", lambda model: tried.append(model) or probe(model))
    rows = [packing_ready(model, None), packing_ready(model, said.append), packing_holds(model, said.append)]
    assert rows == [Rows.PADDED] * 3
    assert len(tried) == len(said) == 1
    assert model.config._attn_implementation == "eager"


def test_a_fault_of_the_device_is_no_fault_of_the_model(monkeypatch):
    def fails(*args, **kwargs):
        raise torch.AcceleratorError("an illegal memory access")

    for fault in (check_head, check_left_to_right, packing_holds):
        model = model_of(LlamaConfig(**GQA))
        monkeypatch.setattr(model.model.layers[0], "forward", fails)
        with pytest.raises(torch.AcceleratorError, match="illegal"):
            fault(model, "model") if fault is check_left_to_right else fault(model)


def test_a_model_that_refuses_packed_rows_is_padded_in_its_own_words(monkeypatch):
    model, said, forward = model_of(LlamaConfig(**GQA)), [], LlamaForCausalLM.forward

    def refuses(self, *args, packed_lengths=None, **kwargs):
        if packed_lengths:
            raise ValueError("cannot keep packed sequences apart\nwithout a kernel")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", refuses)
    assert not packing_ready(model, said.append)
    assert "(cannot keep packed sequences apart): they are padded instead" in said[-1]
    assert len(said) == 1


def test_a_family_that_wants_a_package_for_packed_rows_is_padded():
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    layers = {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16}
    model = model_of(Qwen3NextConfig(**GQA, **linear, **experts, **layers, head_dim=8))
    samples, said = three_samples(), []
    want = responses_alone(model, samples)
    rows = packing_ready(model, said.append)
    if rows:
        pytest.skip("flash-linear-attention is installed")
    assert "they are padded instead" in said[-1]
    with torch.no_grad():
        torch.testing.assert_close(supervised_logits(model, pack(samples), packed=rows), want, rtol=1e-4, atol=1e-4)


def test_a_model_that_does_not_run_at_all_is_one_clear_error(monkeypatch):
    model = model_of(LlamaConfig(**GQA))

    def never(*args, **kwargs):
        raise ImportError("install a-kernel\nfor this")

    monkeypatch.setattr(model.model.layers[0], "forward", never)
    with pytest.raises(InputError, match=r"LlamaForCausalLM does not run on plain tokens: install a-kernel$"):
        packing_ready(model, lambda _: None)


def test_a_model_that_loses_the_lengths_computes_nothing_wrong():
    model = model_of(StableLmConfig(**GQA))
    enable_packing(model)
    with pytest.raises(packed_attention.LengthsLost, match="StableLmAttention is given no lengths"):
        model(**forward_kwargs(model, pack(row(3, 4))))
    assert packing_holds(model)
