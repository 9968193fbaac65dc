"""A tiny model of any family of causal language models that the installed transformers has, made by rule.

The rule: of `SMALL`, a family's configuration gets the settings that it has, its nested configurations too. Windows and
chunks are shorter than the tests' samples, caps and multipliers are not 1, weights are large, and layers are of mixed
types where a family has several: so that what a way of running leaves out shows in the logits.
"""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 259  # of tiny.tiny_tokenizer
WINDOW = 16  # shorter than all long samples of the tests
LAYERS = 4
LARGEST = 10_000_000  # parameters; a family that takes more has a size that no setting of `SMALL` reaches

SMALL: dict[str, Any] = {
    # sizes
    "vocab_size": VOCABULARY, "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32, "model_dim": 32,
    "word_embed_proj_dim": 32, "emb_dim": 32, "dim": 32, "attention_hidden_size": 32, "lru_width": 32, "dim_model": 32,
    "hidden_size_global": 32, "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "dff": 48,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "ffn_hidden_size": 48, "feed_forward_size": 48, "d_inner": 48, "block_ff_dim": 48, "dim_ff": 48,
    "feed_forward_proj_dim": 48, "intermediate_size_mlp": 48, "dense_intermediate_size": 48,
    "moe_intermediate_size": 16, "expert_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "moe_ffn_hidden_size": 16,
    "expert_ffn_hidden_size": 16, "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS,
    "num_layers": LAYERS, "decoder_layers": LAYERS, "num_decoder_layers": LAYERS, "encoder_layers": LAYERS,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2,
    "num_global_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "dim_head": 8, "attention_head_dim": 8,
    "rotary_dim": 4, "max_position_embeddings": 512, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256,
    "max_sequence_length": 256, "max_target_positions": 256, "max_source_positions": 32, "block_size": 16,
    # windows and chunks
    "sliding_window": WINDOW, "window_size": WINDOW, "local_attention": WINDOW, "sliding_window_size": WINDOW,
    "attention_window_size": WINDOW, "attention_chunk_size": WINDOW, "use_sliding_window": True, "max_window_layers": 1,
    "chunk_size": WINDOW, "mamba_chunk_size": WINDOW,
    # multipliers, caps and biases
    "initializer_range": 0.2, "init_std": 0.2, "initializer_factor": 1.0,
    "final_logit_softcapping": 3.0, "attn_logit_softcapping": 3.0, "logits_soft_cap": 3.0, "logit_softcap": 3.0,
    "logit_scale": 0.7, "logits_scaling": 1.7, "embedding_multiplier": 1.3, "residual_multiplier": 0.8,
    "attention_multiplier": 0.4, "lm_head_multiplier": 0.6, "key_multiplier": 0.9, "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.8, "attention_in_multiplier": 1.1, "attention_out_multiplier": 0.9,
    "scale_emb": 1.3, "scale_depth": 1.4, "dim_model_base": 16, "routed_scaling_factor": 1.2,
    "scale_attn_by_inverse_layer_idx": True,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_top_k": 2, "moe_k": 2, "top_k_experts": 2, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "zero_expert_num": 2, "expert_retrieval_size": 8, "enable_moe_block": True,
    # attention through a low rank, and indexers
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "o_lora_rank": 8, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8,
    # states
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "mamba_headdim": 16, "mamba_ngroups": 1, "n_mamba_heads": 2, "mamba_dt_rank": 4,
    "n_groups": 1, "ssm_state_size": 8, "state_size": 8, "time_step_rank": 4, "expand": 2, "conv_L_cache": 3,
    # Gemma 3n and 4
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
    "num_kv_shared_layers": 2,
    # tokens
    "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256, "decoder_start_token_id": 257,
    # a decoder by itself
    "is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False, "use_cache": True,
    # pictures and sounds
    "image_size": 16, "patch_size": 8, "num_channels": 3, "depth": 2, "projector_input_dim": 32,
    "projector_output_dim": 32, "vision_output_dim": 32, "audio_channels": 1, "num_codebooks": 1,
}  # fmt: skip

HALVES = LAYERS // 2
OUT = object()  # a setting that a family computes itself

# What a family's configuration asks for beyond that: types of layers that are not among its defaults, and sizes that
# depend on each other.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "patch_size": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
    "dots3_note_text": {
        "num_key_value_heads": 4, "index_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_head_dim": 8, "swa_qk_nope_head_dim": 4, "swa_v_head_dim": 8,
        "layer_types": ["indexed_attention", "sliding_attention"] * HALVES, "shared_experts_intermediate_size": 16,
    },
    "dots3_note": {"pad_token_id": 256},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"num_hidden_layers": OUT, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], HALVES]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * HALVES},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 64},
    "inkling2_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 64,
        "unpadded_vocab_size": VOCABULARY, "n_layers_per_attn_res_block": 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * HALVES},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * HALVES},
    "longcat_flash": {"head_dim": 4, "num_hidden_layers": OUT, "num_key_value_heads": 4},
    "mamba2": {"head_dim": 16},
    "prophetnet": {"num_hidden_layers": OUT, "num_encoder_layers": LAYERS},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "hc_lowrank": 8,
    },
    "reformer": {"axial_pos_embds": False, "attention_head_size": 8, "attn_layers": ["local", "lsh"] * HALVES},
    "roc_bert": {
        "pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY, "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xlnet": {"max_position_embeddings": OUT},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
    "zamba2": {
        "head_dim": OUT, "attention_head_dim": OUT, "attention_hidden_size": OUT, "mamba_headdim": OUT,
        "num_key_value_heads": 4, "layer_types": OUT, "layers_block_type": ["linear_attention", "hybrid"] * HALVES,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * HALVES},
}  # fmt: skip
SPECIAL["inkling2_loop_text"] = SPECIAL["inkling2_text"]

# Rows beside the families: a family with other settings.
THETA = {"rope_theta": 10000.0}
ROPE = {**THETA, "original_max_position_embeddings": 32}  # tokens: fewer than the longest samples have
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA}}),
    "llama-rope-dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **THETA}, "max_position_embeddings": 32},
    ),
    "llama-rope-yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, **ROPE}}),
    "llama-rope-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE
            }
        },
    ),
    "phi3-rope-longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
                **ROPE,
            },
            "original_max_position_embeddings": 32,
        },
    ),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "falcon-new-decoder": ("falcon", {"new_decoder_architecture": True}),
    "mixtral-router-loss": ("mixtral", {"output_router_logits": True}),
    "gemma2-no-caps": ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "qwen2-no-window": ("qwen2", {"use_sliding_window": False, "layer_types": None}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "gemma3-both-ways": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4-own-keys": ("gemma4", {"text_config": {"num_kv_shared_layers": 0}}),
    "gemma4_text-own-keys": ("gemma4_text", {"num_kv_shared_layers": 0}),
    "bert-both-ways": ("bert", {"is_decoder": False}),
}  # fmt: skip

# Rows of models that see pictures too, which people give as an object: transformers makes no causal language model of
# their configuration, or another one.
CONDITIONAL = {f"{name}-conditional": name for name in ("llava", "mistral3", "qwen2_5_vl", "qwen3_5")}

RANDOM = re.compile("drop|jitter")  # in the names of settings by which training is random

# Why families cannot be built tiny, in words, where what transformers raises does not say it.
NOT_TINY = {
    "gemma3n": "its vision model needs the package timm",
    "gemma4_assistant": "transformers refuses its default configuration",
    "gemma4_unified_assistant": "it runs on another model's keys and values",
    "musicgen": "transformers builds its decoder from the configuration of the whole model, which does not fit",
    "musicgen_melody": "transformers builds its decoder from the configuration of the whole model, which does not fit",
}


class NotTiny(Exception):
    """A family that cannot be built tiny, or that does not run on tokens alone."""


def families() -> list[str]:
    """Every name of a model type that transformers makes a causal language model of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, changes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A family's configuration with the settings of `SMALL` that it has, and changes to it."""
    with _quiet():
        kind = CONFIG_MAPPING[family]
        return kind(**_merged(_settings(kind), changes or {}))


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings with these changes, those of nested configurations too."""
    nested = {
        name: _merged(settings[name], value)
        for name, value in changes.items()
        if name.endswith("_config") and isinstance(value, dict)
    }
    return settings | changes | nested


def _settings(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    default = kind()
    given = {name: value for name, value in SMALL.items() if _settable(default, name)}
    for name, now in vars(default).items():
        if RANDOM.search(name) and isinstance(now, float | int) and not isinstance(now, bool):
            given[name] = type(now)(0)
    for other, own in getattr(default, "attribute_map", {}).items():
        if own in given and other in given:
            given.pop(other)  # two names of one setting
    if _settable(default, "kv_lora_rank"):
        given.pop("head_dim", None)
        given["num_key_value_heads"] = 4
    for part in getattr(kind, "sub_configs", None) or {}:
        if isinstance(now := getattr(default, part, None), PreTrainedConfig):
            given[part] = _settings(type(now)) | ({"model_type": now.model_type} if now.model_type else {})
    if mixed := _mixed_layers(default):
        given["layer_types"] = mixed
    given |= SPECIAL.get(default.model_type or kind.__name__, {})
    return {name: value for name, value in given.items() if value is not OUT}


def _settable(config: PreTrainedConfig, name: str) -> bool:
    """Whether a configuration has a setting, under this name or another, that is not computed from others."""
    own = (getattr(config, "attribute_map", None) or {}).get(name, name)
    computed = getattr(type(config), own, None)
    if isinstance(computed, property) and computed.fset is None:
        return False
    try:
        return hasattr(config, own)
    except Exception:  # of settings that have a value for each layer
        return True


def _mixed_layers(default: PreTrainedConfig) -> list[str] | None:
    """`LAYERS` layers of all types that a family has by default, in turns."""
    if not _settable(default, "layer_types"):
        return None
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if kinds in (["full_attention"], ["sliding_attention"]) and _settable(default, "sliding_window"):
        kinds = ["full_attention", "sliding_attention"]
    return [kinds[i % len(kinds)] for i in range(LAYERS)] if kinds else None


def rows() -> list[str]:
    """The matrix' rows: every family, variants of some, and models that see pictures too."""
    return sorted([*families(), *VARIANTS, *CONDITIONAL])


def row_config(row: str) -> PreTrainedConfig:
    """The configuration of a row: a family's, or a variant's."""
    family, changes = VARIANTS.get(row, (CONDITIONAL.get(row, row), {}))
    return tiny_config(family, changes)


def row_auto_class(row: str) -> Any:
    """What makes and reads the row's model."""
    return AutoModelForImageTextToText if row in CONDITIONAL else AutoModelForCausalLM


@torch.no_grad()
def runnable_model(row: str) -> Any:
    """The model of a row. Raises `NotTiny` where it cannot be built, or where transformers does not run it."""
    try:
        model = row_model(row)
        model(input_ids=torch.arange(3, 3 + 2 * WINDOW)[None], use_cache=False)
    except Exception as error:  # whatever transformers raises
        said = f"{type(error).__name__}: {error}"
        raise NotTiny(NOT_TINY.get(row, " ".join(said.split())[:200])) from error
    return model


def row_model(row: str) -> Any:
    """The model of a row in eager attention, fp32, with random weights, norms and biases too."""
    config, auto = row_config(row), row_auto_class(row)
    with _quiet():
        with torch.device("meta"):
            size = sum(p.numel() for p in auto.from_config(config, attn_implementation="eager").parameters())
        if size > LARGEST:
            raise ValueError(f"{size / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 and parameter.numel():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@contextlib.contextmanager
def _quiet():
    """Without what configurations and models print of settings that are unusual."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
