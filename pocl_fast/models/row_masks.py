"""Masks of packed rows for the families that ask transformers for masks without saying where a row's samples begin.

Knows transformers' masks and the source of its families. Does not know how a model attends by a mask.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocl_fast.models.packed_attention import BY_SAMPLE, VARLEN, source_of


def gives_row_masks(model: Any) -> bool:
    """Whether a model, or its decoder, is to be given the mask of a packed row: its family asks transformers for masks
    without the positions that tell where samples begin."""
    return model.config._attn_implementation not in (VARLEN, BY_SAMPLE) and _masks(model).lack_positions


def row_masks(model: Any, position_ids: Tensor) -> Any:
    """transformers' mask of a packed row (`position_ids` [1, T]) for such a model; where its layers have several kinds
    and it takes a mask for each, these by name."""
    from transformers import masking_utils

    config = model.config.get_text_config()
    hidden = torch.empty((*position_ids.shape, 0), dtype=model.dtype, device=position_ids.device)
    known = inspect.signature(masking_utils.create_causal_mask).parameters
    no_cache = {name: None for name in ("cache", "past_key_values") if name in known}
    given = {"config": config, "inputs_embeds": hidden, "attention_mask": None, "position_ids": position_ids}
    full = masking_utils.create_causal_mask(**given, **no_cache)
    if not _masks(model).by_kind:
        return full
    masks = {"full_attention": full}
    if getattr(config, "sliding_window", None) is not None:
        masks["sliding_attention"] = masking_utils.create_sliding_window_causal_mask(**given, **no_cache)
    return masks


class _Masks(NamedTuple):
    """How a family asks transformers for masks."""

    lack_positions: bool
    by_kind: bool  # whether it takes a mask for each kind of layer


def _masks(model: Any) -> _Masks:
    modules = (one.__module__ for one in type(model).__mro__)
    return next((found for module in modules if (found := _masks_of(module)) is not None), _Masks(False, False))


@functools.cache
def _masks_of(module: str) -> _Masks | None:
    """Told by a family's source; None where it asks for no masks."""
    source = source_of(module)
    calls = re.findall(r"(?<!def )create_causal_mask\(((?:[^()]|\([^()]*\))+)\)", source)
    if not calls:
        return None
    calls += re.findall(r"mask_kwargs = \{([^}]*)\}", source)
    knows = all("**mask_kwargs" in call or "position_ids" in call for call in calls)
    return _Masks(not knows, re.search(r"isinstance\(\w+ := attention_mask, dict\)", source) is not None)
