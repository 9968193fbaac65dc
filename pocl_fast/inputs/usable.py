"""What a user gives as a model or a tokenizer, checked before anything is computed with it: whether it is one.

Knows transformers. Does not know teacher from student, nor what a model is used for.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from pocl_fast.models.lm_head import causal_lm
from pocl_fast.system.errors import InputError


def check_model(model: Any, argument: str, *, may_be_offloaded: bool = False) -> None:
    """Raises `InputError` unless `model`, given as `argument`, is a causal language model with its weights in memory;
    those of a model that accelerate has placed may be elsewhere where it `may_be_offloaded`."""
    kind = model.__name__ if isinstance(model, type) else type(model).__name__
    expected = "give a transformers causal language model (AutoModelForCausalLM.from_pretrained(...)), or its name"
    if isinstance(model, type):
        raise InputError(f"{argument} is the class {kind}, and no model of it: {expected}")
    if not isinstance(model, nn.Module):
        raise InputError(f"{argument} is a {kind}, and no model: {expected}")
    inner = causal_lm(model)
    if not hasattr(inner, "config") or not hasattr(inner, "get_output_embeddings"):
        raise InputError(f"{argument} is a {kind}, and no model of transformers: {expected}")
    if getattr(inner.config, "is_encoder_decoder", False):
        raise InputError(f"{argument} is a {kind}, which has an encoder of its own: {expected}")
    head = inner.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise InputError(f"{argument} is a {kind}, which has no lm_head: {expected}")
    placed = may_be_offloaded and getattr(inner, "hf_device_map", None) is not None
    empty = [name for name, parameter in inner.named_parameters() if parameter.is_meta]
    if empty and not placed:
        raise InputError(
            f"{argument} has no weights in memory: {empty[0]} and {len(empty) - 1} more are on the meta device. Load it"
            " whole, without init_empty_weights, torch.device('meta') or a device_map that offloads"
        )


def check_tokenizer(tokenizer: Any, argument: str) -> None:
    """Raises `InputError` unless `tokenizer`, given as `argument`, is one of transformers."""
    from transformers import PreTrainedTokenizerBase

    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    if isinstance(tokenizer, (str, os.PathLike)):
        instead = f"give the tokenizer itself, AutoTokenizer.from_pretrained({str(tokenizer)!r})"
    elif hasattr(tokenizer, "tokenizer"):
        instead = f"give its tokenizer, {argument}=processor.tokenizer"
    elif hasattr(tokenizer, "get_vocab_size"):  # of the library tokenizers
        instead = "wrap it, transformers.PreTrainedTokenizerFast(tokenizer_object=...)"
    else:
        instead = "give the tokenizer that belongs to the model, AutoTokenizer.from_pretrained(...)"
    kind = tokenizer.__name__ if isinstance(tokenizer, type) else type(tokenizer).__name__
    raise InputError(f"{argument} is a {kind}, and no tokenizer of transformers: {instead}")
