"""Whether a model has positions for the tokens that it will see.

Knows transformers. Does not know samples.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pocl_fast.system.errors import InputError


def check_positions(model: Any, tokens: int, whose: str) -> None:
    """Raises `InputError` where a model with learned positions (GPT-2, OPT) has fewer than `tokens`."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or tokens <= limit:
        return
    words = model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words)
    if any(limit <= table.num_embeddings <= limit + 2 for table in tables):  # OPT's begin at 2
        raise InputError(
            f"the {whose} has learned {limit} positions, and prompt and response may take {tokens} tokens: lower"
            " max_length, max_prompt_length or max_new_tokens"
        )
