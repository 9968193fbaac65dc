"""A model's forward over a packed batch: its arguments, and the logits or hidden states at the supervised positions.

Knows transformers' arguments. Does not know how a model attends (packed_attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pocl_fast.data.packed import PackedBatch, padded_kwargs
from pocl_fast.models.packed_attention import needs_no_mask


def forward_kwargs(model: Any, batch: PackedBatch) -> dict[str, Any]:
    """The arguments with which a transformers model with packing enabled, or its decoder, runs on a packed batch."""
    device = batch.input_ids.device
    ends = torch.tensor((0, *batch.lengths), device=device).cumsum(0).to(torch.int32)
    longest = max(batch.lengths)
    # transformers takes a mask of four dimensions as it is, and makes none; ours looks at no mask of one entry
    mask = {"attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)} if needs_no_mask(model) else {}
    return {
        **mask,
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "packed_lengths": batch.lengths,
    }


def supervised_logits(model: nn.Module, batch: PackedBatch, *, packed: bool) -> Tensor:
    """Logits [N, V] at the supervised positions; where `packed`, the lm_head runs on these positions alone.

    `packed=False` pads the samples into a rectangle instead, for the few families where packing does not hold.
    """
    if packed:
        return model(**forward_kwargs(model, batch), logits_to_keep=batch.supervised).logits[0]
    padded, where = padded_kwargs(batch)
    return model(**padded).logits.flatten(0, 1)[where]


def supervised_hidden(body: nn.Module, batch: PackedBatch, *, packed: bool) -> Tensor:
    """Final hidden states [N, H] at the supervised positions, from a model's body (all but the lm_head)."""
    if packed:
        hidden = body(**forward_kwargs(body, batch)).last_hidden_state[0]
        return hidden[batch.supervised.to(hidden.device)]  # the body's layers may lie on several devices
    padded, where = padded_kwargs(batch)
    hidden = body(**padded).last_hidden_state.flatten(0, 1)
    return hidden[where.to(hidden.device)]
