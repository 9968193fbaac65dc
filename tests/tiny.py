"""Tiny models and data for the tests: a two-layer Llama with random weights and a byte-level tokenizer, made in
milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Every byte a token, and three special ones; with or without a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "<|pad|>", "<|start|>", "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|start|>"],
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


# the paper's stages, which many tests count steps and weights of
PAPERS_STAGES: dict[str, Any] = {
    "pacing": "baby-steps", "temperature": [1.0, 2.0], "alpha": [0.3, 0.0],
    "fresh_optimizer": True, "fresh_learning_rate": True,
}  # fmt: skip


def tiny_model(
    layers: int = 2, vocab_size: int = 259, seed: int = 0, hidden: int = 32, tied: bool = True
) -> LlamaForCausalLM:
    """A Llama with random weights, four heads over two key/value heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        pad_token_id=256,
        bos_token_id=None,
        eos_token_id=258,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path, **kwargs: int) -> Path:
    """A tiny model and its tokenizer as a model folder."""
    tiny_model(**kwargs).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def arithmetic(count: int, start: int = 0) -> list[dict[str, str]]:
    """Instruction samples of varying length, all different."""
    return [
        {"instruction": f"Say {n}", "input": "twice" if n % 3 == 0 else "", "output": " ".join([str(n)] * (1 + n % 4))}
        for n in range(start, start + count)
    ]
