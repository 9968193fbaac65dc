"""Cutting a student out of a larger model."""

from typing import NamedTuple

import pytest
import torch
from tiny import tiny_model
from tiny_family import FAMILIES, TEXT, tiny_family, with_seed
from transformers import Gemma3Config

from pocl_fast.cutting.cut import chosen_layers, cut_layers, evenly_spaced_layers
from pocl_fast.cutting.cut_check import passed_over
from pocl_fast.models.parameters import num_parameters
from pocl_fast.system.errors import InputError


def test_the_first_and_the_last_layer_stay_and_the_others_are_evenly_spread():
    assert evenly_spaced_layers(30, 6) == [0, 6, 12, 17, 23, 29]
    assert evenly_spaced_layers(4, 4) == [0, 1, 2, 3]
    assert evenly_spaced_layers(5, 1) == [0]


@pytest.mark.parametrize("keep", [0, -1, 6])
def test_an_impossible_number_of_layers_is_refused(keep):
    with pytest.raises(InputError, match="the model to cut from has 5 layers"):
        evenly_spaced_layers(5, keep)


def test_a_cut_model_computes_with_exactly_the_chosen_layers():
    teacher = tiny_model(layers=5)
    student = cut_layers(teacher, 3)
    by_hand = tiny_model(layers=5)
    by_hand.model.layers = torch.nn.ModuleList([by_hand.model.layers[i] for i in (0, 2, 4)])
    by_hand.config.num_hidden_layers = 3
    for new, layer in enumerate(by_hand.model.layers):
        layer.self_attn.layer_idx = new
    tokens = torch.arange(1, 20)[None]
    assert torch.equal(student(input_ids=tokens).logits, by_hand(input_ids=tokens).logits)
    assert student.config.num_hidden_layers == 3


def test_the_cut_model_shares_nothing_with_its_teacher_and_keeps_its_tied_head():
    teacher = tiny_model(layers=3)
    student = cut_layers(teacher, 1)
    student.get_input_embeddings().weight.data.zero_()
    assert teacher.get_input_embeddings().weight.abs().sum() > 0
    assert student.lm_head.weight.data_ptr() == student.get_input_embeddings().weight.data_ptr()
    layer = sum(p.numel() for p in teacher.model.layers[0].parameters())
    assert num_parameters(teacher) - num_parameters(student) == 2 * layer


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def without(source, layers, dropped, tokens):
    """The source's logits where some of its layers add nothing: their output is their input."""

    def pass_on(layer, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    hooks = [layers[i].register_forward_hook(pass_on, with_kwargs=True) for i in dropped]
    try:
        return logits(source, tokens)
    finally:
        for hook in hooks:
            hook.remove()


def layers_of(model):
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    stacks = [module for name, module in model.named_modules() if name.rpartition(".")[2] in ("layers", "h", "blocks")]
    return next(stack for stack in stacks if len(stack) == count and "Siglip" not in type(stack[0]).__name__)


def check_cut(source, keep, folder):
    """The cut student is its source without the other layers, also from its folder; the source is as it was."""
    before = {name: weight.clone() for name, weight in source.state_dict().items()}
    said = source.config.to_json_string()
    state = torch.get_rng_state()
    student = cut_layers(source, keep)
    assert torch.equal(state, torch.get_rng_state())
    assert source.config.to_json_string() == said
    assert all(torch.equal(weight, before[name]) for name, weight in source.state_dict().items())
    layers = layers_of(source)
    dropped = [i for i in range(len(layers)) if i not in chosen_layers(source, keep)]
    tokens = torch.randint(0, 250, (2, 25), generator=torch.Generator().manual_seed(1))
    want = without(source, layers, dropped, tokens)
    assert float(logits(source, tokens).sub(want).abs().max()) > 0.1  # the layers tell
    torch.testing.assert_close(logits(student, tokens), want, rtol=1e-5, atol=1e-5)
    student.save_pretrained(folder)
    again = type(source).from_pretrained(folder, attn_implementation="eager")
    torch.testing.assert_close(logits(again, tokens), want, rtol=1e-5, atol=1e-5)
    return student


# lists of types, of layers' numbers, of runs, and of settings; the first n, every n-th; a scale of the depth
QUICK = ["deepseek_v3", "gpt_neo", "jamba", "llama4_text", "minicpm3", "qwen3_moe", "smollm3"]
REFUSED = {"gpt2": {"scale_attn_by_inverse_layer_idx": True}, "diffllama": {}}


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.full) for family in FAMILIES]
)
def test_the_settings_of_the_kept_layers_follow_them(family, tmp_path):
    check_cut(tiny_family(family), 3, tmp_path)


@pytest.mark.parametrize("family", REFUSED)
def test_layers_that_compute_by_their_place_are_not_cut(family):
    source = tiny_family(family, **REFUSED[family])
    with pytest.raises(InputError, match=f"cannot cut {type(source).__name__} to 2 of its 4 layers .0, 3.: "):
        cut_layers(source, 2)


# 5 of 6: a period alone cannot say it, but the list of the other layers can
def test_a_list_says_which_layers_have_no_experts_where_a_period_cannot(tmp_path):
    source = tiny_family("qwen3_moe", layers=6, decoder_sparse_step=2)
    student = check_cut(source, 5, tmp_path)  # 0, 1, 2, 4, 5
    assert student.config.decoder_sparse_step == 1
    assert student.config.mlp_only_layers == [0, 2, 3]


TENTHS = ["sliding_attention"] * 4 + ["full_attention"]
TEN = {"layers": 10, "layer_types": TENTHS * 2, "num_kv_shared_layers": 5}  # layers 5 to 8 read 3, layer 9 reads 4
WIDE = {**TEN, "use_double_wide_mlp": True}
SPARSE = {"activation_sparsity_pattern": [0.5, 0.25] + [0.0] * 8}


# of four layers, the last one reads the keys of layer 1
@pytest.mark.parametrize(
    ("family", "settings", "chosen"),
    [
        ("gemma4_text", {}, [0, 1, 3]),
        ("gemma4_text", {}, [1, 3]),
        ("gemma4_text", WIDE, [0, 4, 9]),
        ("gemma4_text", WIDE, [0, 3, 4, 9]),
        ("gemma4_text", TEN, [0, 3, 4, 7, 9]),
        ("gemma4_text", WIDE, [0, 1, 3, 4, 5, 6, 8, 9]),
        ("gemma3n_text", {**TEN, **SPARSE}, [0, 3, 4, 7, 9]),
        ("gemma3n_text", {**TEN, **SPARSE}, [0, 2, 3, 4, 6, 8, 9]),
    ],
)
def test_a_layer_that_reads_the_keys_of_another_stays_with_it(family, settings, chosen, tmp_path):
    source = tiny_family(family, **settings)
    assert chosen_layers(source, len(chosen)) == chosen
    student = check_cut(source, len(chosen), tmp_path)
    first_shared = source.config.num_hidden_layers - source.config.num_kv_shared_layers
    assert student.config.num_kv_shared_layers == sum(layer >= first_shared for layer in chosen)
    assert student.config.layer_types == [source.config.layer_types[layer] for layer in chosen]


class Sharing:
    """A configuration whose last layers have no keys of their own."""

    def __init__(self, kinds, shared):
        self.layer_types, self.num_hidden_layers, self.num_kv_shared_layers = kinds, len(kinds), shared

    def get_text_config(self, decoder):
        return self


# the sizes of Gemma 4 E2B and E4B, Gemma 3n E2B and E4B
@pytest.mark.parametrize(("layers", "period", "shared"), [(35, 5, 20), (42, 6, 18), (30, 5, 10), (35, 5, 15)])
def test_of_every_number_of_layers_those_are_chosen_that_run(layers, period, shared):
    kinds = ["full_attention" if i % period == period - 1 else "sliding_attention" for i in range(layers)]
    own = layers - shared
    owner = {kind: max(i for i in range(own) if kinds[i] == kind) for kind in kinds}
    source = torch.nn.Module()
    source.config = Sharing(kinds, shared)
    source.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in kinds)
    for keep in range(1, layers + 1):
        chosen = chosen_layers(source, keep)
        even = evenly_spaced_layers(layers, keep)
        assert len(chosen) == keep
        assert chosen == sorted({*chosen})
        assert {owner[kinds[i]] for i in chosen if i >= own} <= {*chosen}
        assert chosen[-1] == even[-1]
        assert chosen[0] == even[0] or keep == 2
        assert len({*chosen} - {*even}) <= 2  # an owner of each kind


def test_of_choices_with_every_owner_that_of_the_same_kinds_is_taken():
    source = torch.nn.Module()
    source.config = Sharing(["sliding", "full", "sliding", "sliding", "full", "full", "sliding", "full"], 2)
    source.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(8))
    assert evenly_spaced_layers(8, 5) == [0, 2, 4, 5, 7]
    assert chosen_layers(source, 5) == [0, 2, 4, 5, 7]  # layer 7 reads layer 5
    assert evenly_spaced_layers(8, 6) == [0, 1, 3, 4, 6, 7]
    assert chosen_layers(source, 6) == [0, 1, 3, 5, 6, 7]  # a full one goes, the nearest


def test_a_refusal_says_which_numbers_of_layers_are_right():
    source = tiny_family("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InputError, match=r"It can be cut to 1, or give a smaller model"):
        cut_layers(source, 2)


# layer 7 reads the keys of layer 5, and both stay
def test_layers_that_share_keys_are_cut_together(tmp_path):
    source = tiny_family("gemma4_text", layers=8, layer_types=["sliding_attention", "full_attention"] * 4)
    check_cut(source, 7, tmp_path)


def gemma3(layers=4):
    """Gemma 3 that takes pictures: text and pictures have as many layers."""
    text = TEXT | {
        "num_hidden_layers": layers,
        "sliding_window": 8,
        "layer_types": (["sliding_attention", "full_attention"] * layers)[:layers],
        "final_logit_softcapping": 3.0,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=255)


def test_of_a_model_that_takes_pictures_the_text_part_is_cut(tmp_path):
    source = with_seed(gemma3())
    student = check_cut(source, 3, tmp_path)
    assert student.config.text_config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert student.config.vision_config.num_hidden_layers == 4
    kept = student.model.vision_tower.state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in source.model.vision_tower.state_dict().items())


def test_weights_keep_their_dtypes_and_generation_its_settings():
    source = tiny_family("mamba").bfloat16()
    for layer in source.backbone.layers:
        layer.mixer.A_log.data = layer.mixer.A_log.data.float()
    source.generation_config.max_new_tokens = 77
    student = cut_layers(source, 2)
    assert student.backbone.layers[1].mixer.A_log.dtype == torch.float32
    assert student.backbone.layers[1].mixer.in_proj.weight.dtype == student.lm_head.weight.dtype == torch.bfloat16
    assert student.generation_config.max_new_tokens == 77
    student.generation_config.max_new_tokens = 1
    assert source.generation_config.max_new_tokens == 77


def test_frequencies_are_as_precise_as_those_of_the_source():
    loaded = tiny_family("llama")
    for weight in loaded.parameters():  # as a folder in bf16 is loaded: frequencies in fp32
        weight.data = weight.data.bfloat16()
    assert torch.equal(cut_layers(loaded, 2).model.rotary_emb.inv_freq, loaded.model.rotary_emb.inv_freq)
    for rounded in (loaded.bfloat16(), loaded.bfloat16().float()):
        assert torch.equal(cut_layers(rounded, 2).model.rotary_emb.inv_freq, rounded.model.rotary_emb.inv_freq)


def test_an_adapter_or_a_model_that_does_not_run_is_refused():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(InputError, match="merge its adapter first"):
        cut_layers(get_peft_model(tiny_model(layers=3), LoraConfig(target_modules=["q_proj"])), 2)
    with pytest.raises(InputError, match="DeepseekV3ForCausalLM: it does not run on 24 tokens"):
        cut_layers(tiny_family("deepseek_v3", num_key_value_heads=2), 2)


class Layer(torch.nn.Module):
    def forward(self, hidden):
        return LayerOutput(hidden + 1, 7)


class LayerOutput(NamedTuple):
    hidden: torch.Tensor
    more: int


def test_a_layer_is_passed_over_whatever_tuple_it_gives():
    layer, hidden = Layer(), torch.ones(2, 3)
    with passed_over([layer]):
        output = layer(hidden)
    assert isinstance(output, LayerOutput)
    assert torch.equal(output.hidden, hidden)
    assert output.more == 7


def test_a_model_that_needs_more_than_tokens_is_refused_in_its_own_words():
    model = tiny_model(layers=4)
    model.model.others = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))  # which list runs on text?

    def forward(**given):
        raise RuntimeError("give pixel_values\nand more")

    model.forward = forward
    says = r"layers from LlamaForCausalLM: it does not run on tokens alone \(RuntimeError: give pixel_values\)"
    with pytest.raises(InputError, match=says):
        cut_layers(model, 2)
