"""Tiny models of families whose layers are not all the same: windows and chunks of 8 tokens, large random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TEXT: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LOW_RANK = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
HALF = ["linear_attention", "full_attention"]
GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256}

# what a family's configuration needs beside TEXT
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "bloom": {"n_layer": 4, "n_head": 4},
    "deepseek_v3": {
        **LOW_RANK,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 2,
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "key_multiplier": 0.9, "lm_head_multiplier": 0.6},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3n_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.25, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 259,
        "laurel_rank": 8,
        "num_kv_shared_layers": 1,
    },
    "gemma4_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 259,
        "num_kv_shared_layers": 1,
    },
    "gpt2": GPT,
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "window_size": 8, "attention_types": [[["global", "local"], 2]]},
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": HALF * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "num_experts": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3},
    "llama": {},
    "llama4_text": {
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "moe_layers": [1, 2],
        "no_rope_layers": [1, 0, 1, 0],
        "layer_types": ["chunked_attention", "full_attention"] * 2,
    },
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2, "chunk_size": 8},
    "minicpm3": {**LOW_RANK, "scale_depth": 1.4, "scale_emb": 1.3, "dim_model_base": 16},
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": HALF * 2, "block_size": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "mpt": {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 256},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 8,
    },
    "olmo_hybrid": {**LINEAR, "layer_types": HALF * 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen2_moe": {**EXPERTS, "mlp_only_layers": [0, 1]},
    "qwen3_5_text": {**LINEAR, "layer_types": HALF * 2},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 2},
    "qwen3_next": {**LINEAR, **EXPERTS, "layer_types": HALF * 2},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "num_key_value_heads": 1},
    "rwkv": {"attention_hidden_size": 32, "rescale_every": 2},
    "smollm3": {"no_rope_layers": [1, 1, 0, 0], "layer_types": None},
    "xglm": {"d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "head_dim": None,
    },
}


def tiny_family(family: str, layers: int = 4, **changes: Any) -> Any:
    """A model of a family in eager attention and fp32, whose weights are so large that every layer tells."""
    given = {**TEXT, "num_hidden_layers": layers, **FAMILIES.get(family, {}), **changes}
    known = type(AutoConfig.for_model(family))
    given = {name: value for name, value in given.items() if _has(known, name) and value is not None}
    return with_seed(AutoConfig.for_model(family, **given))


def with_seed(config: Any, seed: int = 0) -> Any:
    """A model of a configuration, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                module.weight.normal_(std=0.25)
    return model


def _has(known: type, name: str) -> bool:
    """Whether a configuration has a setting; one by another name of its own is given by that name alone."""
    names = getattr(known, "attribute_map", {})
    return name not in names and name in {*getattr(known, "__dataclass_fields__", {})}
