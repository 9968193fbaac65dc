"""A model's forward over a packed batch: its arguments, and the logits or hidden states at the supervised positions.

Knows transformers' arguments, and which samples may not share a forward. Does not know how a model attends
(packed_attention.py).
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pocl_fast.data.packed import PackedBatch, Rows, padded_kwargs
from pocl_fast.models.packed_attention import BY_SAMPLE, VARLEN, needs_no_mask, source_of
from pocl_fast.system.errors import InputError


def forward_kwargs(model: Any, batch: PackedBatch) -> dict[str, Any]:
    """The arguments with which a transformers model with packing enabled, or its decoder, runs on a packed batch."""
    device = batch.input_ids.device
    ends = torch.tensor((0, *batch.lengths), device=device).cumsum(0).to(torch.int32)
    longest = max(batch.lengths)
    mask: dict[str, Any] = {}
    if needs_no_mask(model):
        # transformers takes a mask of four dimensions as it is, and makes none; ours looks at no mask of one entry
        mask = {"attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)}
    elif gives_row_masks(model):
        mask = {"attention_mask": row_masks(model, batch.position_ids)}
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


def decoder_of(model: Any) -> Any:
    """What of a causal language model gives its last hidden states: all but its lm_head. A few families name another
    part as their decoder, or none."""
    found = model.get_decoder()
    if found is not model and hasattr(found, "get_input_embeddings"):
        return found
    inner = [child for child in model.children() if hasattr(child, "get_input_embeddings")]
    return inner[0] if len(inner) == 1 else found


class Forward(NamedTuple):
    """One forward of a model over some of a batch's samples."""

    kwargs: dict[str, Any]
    where: Tensor  # [n]: its supervised positions in its flattened output
    places: Tensor | None  # [n]: these among the batch's N; None where they are all of it, in order


def forwards(body: Any, batch: PackedBatch, packed: Rows | bool) -> list[Forward]:
    """The forwards of a model, or its decoder, that compute a batch. One, but for samples that may not share one: those
    of other lengths where `packed` says so, and those that would have another RoPE (see `rope_groups`)."""
    groups = rope_groups(body.config, batch.lengths)
    if packed == Rows.BY_LENGTH:
        groups = _equal(batch.lengths, batch.lengths)
    if len(groups) == 1:
        return [_forward(body, batch, packed, None)]
    return [_forward(body, part, packed, places) for part, places in map(batch.part, groups)]


def _forward(body: Any, batch: PackedBatch, packed: Rows | bool, places: Tensor | None) -> Forward:
    if packed == Rows.PACKED:
        return Forward(forward_kwargs(body, batch), batch.supervised, places)
    return Forward(*padded_kwargs(batch), places)


def in_batch_order(outputs: list[Tensor], parts: list[Forward]) -> Tensor:
    """[N, ...] from the outputs [n, ...] of a batch's forwards at their supervised positions."""
    if parts[0].places is None:
        return outputs[0]
    places = torch.cat([part.places for part in parts if part.places is not None])
    return torch.cat(outputs)[places.argsort().to(outputs[0].device)]


def supervised_logits(model: nn.Module, batch: PackedBatch, *, packed: Rows | bool) -> Tensor:
    """Logits [N, V] at the supervised positions; where `packed`, the lm_head runs on these positions alone.

    `packed=False` pads the samples into a rectangle instead, for the few families where packing does not hold.
    """
    outputs, parts = [], forwards(model, batch, packed)
    for kwargs, where, _ in run_anew(model, parts):
        if packed == Rows.PACKED:
            outputs.append(model(**kwargs, logits_to_keep=where).logits[0])
        else:
            outputs.append(model(**kwargs).logits.flatten(0, 1)[where])
    return in_batch_order(outputs, parts)


def supervised_hidden(body: nn.Module, batch: PackedBatch, *, packed: Rows | bool) -> Tensor:
    """Final hidden states [N, H] at the supervised positions, from a model's body (all but the lm_head)."""
    outputs, parts = [], forwards(body, batch, packed)
    for kwargs, where, _ in run_anew(body, parts):
        hidden = body(**kwargs).last_hidden_state.flatten(0, 1)
        outputs.append(hidden[where.to(hidden.device)])  # the body's layers may lie on several devices
    return in_batch_order(outputs, parts)


# ---- the loss of a router over experts ----


def router_loss(model: Any, routers: list[Any], parts: list[Forward]) -> Tensor:
    """A mixture of experts' own loss for its router (0-d), times its coefficient, from its decoder's `router_logits` in
    each of a batch's forwards: over all tokens but padding. Raises `InputError` where the family has none."""
    config = model.config.get_text_config()
    modules = [sys.modules.get(one.__module__) for one in type(model).__mro__]
    balance = next((f for m in modules if (f := getattr(m, "load_balancing_loss_func", None)) is not None), None)
    experts = _first(model, config, "num_experts", "num_local_experts", "n_routed_experts")
    chosen, coefficient = _first(model, config, "num_experts_per_tok"), _first(model, config, "router_aux_loss_coef")
    if balance is None or None in (experts, chosen, coefficient) or not all(routers):
        raise InputError(f"{type(model).__name__} has no loss of its router that pocl-fast finds")
    logits = tuple(torch.cat([one.flatten(0, -2) for one in layer]) for layer in zip(*routers, strict=True))
    masks = [part.kwargs.get("attention_mask") for part in parts]
    mask = None
    if any(isinstance(one, Tensor) and one.dim() == 2 for one in masks):
        ids = [part.kwargs["input_ids"] for part in parts]
        whole = [torch.ones_like(row) if one is None else one for one, row in zip(masks, ids, strict=True)]
        mask = torch.cat([one.flatten() for one in whole])
    value: Tensor = coefficient * balance(logits, experts, chosen, mask)
    return value


def _first(model: Any, config: Any, *names: str) -> Any:
    found = [getattr(owner, name, None) for owner in (model, config) for name in names]
    return next((one for one in found if one is not None), None)


# ---- RoPE that depends on the longest sample of a forward ----


def rope_groups(config: Any, lengths: tuple[int, ...]) -> list[list[int]]:
    """The samples of a batch, by number, that may share a forward: LongRoPE rotates all tokens of a forward by other
    angles where one sample is longer than a threshold, and dynamic NTK by angles of the longest."""
    keys: list[Any] = [()] * len(lengths)
    for kind, threshold in _batch_ropes(config.get_text_config()):
        beyond = [length if "dynamic" in kind else 1 for length in lengths]
        longer = [one if length > threshold else 0 for one, length in zip(beyond, lengths, strict=True)]
        keys = [(*key, one) for key, one in zip(keys, longer, strict=True)]
    return _equal(keys, lengths)


def _equal(keys: Any, lengths: tuple[int, ...]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for i in range(len(lengths)):
        groups.setdefault(keys[i], []).append(i)
    return list(groups.values())


def length_limit(config: Any) -> int:
    """The number of tokens up to which no sample of a forward changes the RoPE of another."""
    return min((threshold for _, threshold in _batch_ropes(config.get_text_config())), default=sys.maxsize)


def _batch_ropes(config: Any) -> Iterator[tuple[str, int]]:
    """The kinds of RoPE that depend on a forward's longest sample, and beyond how many tokens they do."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(given, dict):
        return
    nested = [one for one in given.values() if isinstance(one, dict)]  # by kind of layer
    for one in nested or [given]:
        kind = str(one.get("rope_type", one.get("type", "")))
        if "dynamic" in kind or kind in ("longrope", "su"):
            original = one.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            whole = getattr(config, "max_position_embeddings", None)
            yield kind, int((whole if "dynamic" in kind else original) or original or whole or sys.maxsize)


def run_anew(body: nn.Module, parts: list[Forward]) -> Iterator[Forward]:
    """The forwards, each begun with the RoPE of a new model: that of dynamic NTK keeps the longest sample seen."""
    ropes = []
    if any("dynamic" in kind for kind, _ in _batch_ropes(body.config.get_text_config())):  # type: ignore[union-attr, operator]
        ropes = [module for module in body.modules() if hasattr(module, "max_seq_len_cached")]
    for part in parts:
        for rope in ropes:
            _reset(rope)
        yield part


def _reset(rope: Any) -> None:
    for name in [name for name in (*vars(rope), *rope._buffers) if name.endswith("original_inv_freq")]:
        prefix = name.removesuffix("original_inv_freq")
        current, original = getattr(rope, f"{prefix}inv_freq"), getattr(rope, name)
        rope.register_buffer(f"{prefix}inv_freq", original.to(current.device), persistent=False)
        setattr(rope, f"{prefix}max_seq_len_cached", rope.original_max_seq_len)


# -- masks for families that ask transformers for them without saying where a row's samples begin ----------------------


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
