"""Attention over packed rows: how a transformers model attends within each sample of a row and never across two.

Chooses one of four ways for a model, once, and says which. Does not know how a row is laid out (data/packed.py).
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pocl_fast.models.placement import input_device
from pocl_fast.models.precision import exact_backward, exact_products
from pocl_fast.models.probing import say_once

# as transformers' `attn_implementation`
VARLEN, BY_SAMPLE, BY_MASK = "pocl_packed_varlen", "pocl_packed_by_sample", "pocl_packed_by_mask"
LARGEST_HEAD = 256  # of flash attention's kernels
PLAIN_LAYERS = {"full_attention", "sliding_attention"}
NARROW = (torch.bfloat16, torch.float16)


class LengthsLost(RuntimeError):
    """A model's layers did not pass the lengths of the samples on to their attention."""


class NotComputed(RuntimeError):
    """A model's layers ask their attention for something that only their family's own attention computes."""


class Way(NamedTuple):
    """How a model attends over packed rows: transformers' name for it (None: left as it is), and a sentence on it."""

    implementation: str | None
    says: str


def enable_packing(
    model: Any,
    say: Callable[[str], object] | None = None,
    *,
    device: torch.device | str | None = None,
    trains: bool = False,
) -> None:
    """Makes a transformers model attend within each sample of a packed row; `say` is told how, once.

    On a GPU in bf16 or fp16 it attends by flash attention: the flash-attn package's where that is installed, else
    torch's. (The dtype is the weights' or autocast's: call within the autocast that the model will run in.) Elsewhere
    it attends by one causal `sdpa` call per sample. Both cost Σ length² and not (Σ length)². A family without `sdpa`
    or with capped scores (Gemma 2) keeps its own attention, and the mask of the whole row that transformers derives
    from `position_ids`. `device` is where the model will run, if it is not there yet; `trains` says that it will train
    there. Models that are never packed (`why_never_packed`) are left as they are.
    """
    if why_never_packed(model):
        return
    now = input_device(model)
    way = choose_way(model, now if device is None else torch.device(device), here=now, trains=trains)
    use(model, way, say)


def choose_way(model: Any, device: torch.device, *, here: torch.device, trains: bool = False) -> Way:
    """The fastest way that is right for the model on `device`; it is `here` now, where it is tried first."""
    on_gpu, dtype = device.type == "cuda", _computes_in(model.dtype, device)
    if on_gpu and here.type == "cuda" and dtype in NARROW and _has_flash_attn() and _takes_flash_attn(model):
        return Way("flash_attention_2", "flash-attn")
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        # transformers before 5.18 takes sdpa for Gemma 2 by itself, and caps nothing
        return Way("eager", "its own attention, over a mask of the whole row: sdpa does not cap its scores")
    if not _takes_sdpa(model):
        why = "its family does not take sdpa in transformers"
        return Way(None, f"its own attention, over a mask of the whole row: {why}")
    if not on_gpu:
        return Way(BY_SAMPLE, "one sdpa call per sample")
    if reason := _why_not_varlen(model, dtype, device, trains):
        return Way(BY_SAMPLE, f"one sdpa call per sample, which is slower than flash attention: {reason}")
    return Way(VARLEN, "torch's varlen_attn (flash attention)")


def why_never_packed(model: Any) -> str | None:
    """Why the samples of a long row would see each other where a check on short rows finds nothing; None for most."""
    config = model.config.get_text_config()
    if chooses_keys(model):
        return "its indexer chooses among all tokens of a row"
    if getattr(config, "alibi", False):
        return "its biases (ALiBi) lose digits along a row"
    if getattr(config, "attention_chunk_size", None) and _transformers_version() < (5, 18):
        return "before transformers 5.18 its chunks count from the beginning of the row"
    return None


def chooses_keys(model: Any) -> bool:
    """Whether an indexer chooses the keys of a token: where two score alike, also by how many there are in its row."""
    chosen = getattr(model.config.get_text_config(), "index_topk", None)
    return bool(chosen) or any(_asks_for_its_name(one.__module__) for one in type(model).__mro__)


def needs_no_mask(model: Any) -> bool:
    """Whether packed rows need no mask from transformers, which would make one of T × T entries at each forward and
    wait for the GPU to do so: the model attends in one of our ways, fully or within windows alone. (The loss of a
    router over experts looks at the mask, too.)"""
    ours = model.config._attn_implementation in (VARLEN, BY_SAMPLE)
    return ours and _is_plain(model) and not getattr(model.config, "output_router_logits", False)


def slower_ways(model: Any, why: str) -> Iterator[Way]:
    """What a model attends by where the way that was chosen for it does not hold, for this reason if it is known: the
    next is tried after each."""
    why = why or "sample by sample it computes something else"
    if _takes_sdpa(model):
        yield Way(BY_MASK, f"sdpa over a mask of the whole row, which is slow: {why}")
    if model._can_set_attn_implementation():
        yield Way("eager", "its own attention, over a mask of the whole row: sdpa computes something else")


def use(model: Any, way: Way, say: Callable[[str], object] | None = None) -> None:
    """Makes a model attend in a way; `say` is told."""
    if way.implementation is not None:
        register()
        model.set_attn_implementation(way.implementation)
    say_once(model, f"{type(model).__name__} attends to packed rows by {way.says}", say)


# ---- what a model and a machine allow ----


def _transformers_version() -> tuple[int, int]:
    major, minor = version("transformers").split(".")[:2]
    return int(major), int(minor)


def _computes_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In what attention is computed on a device for a model or values of that dtype: autocast's, where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def _takes_sdpa(model: Any) -> bool:
    return bool(getattr(model, "_supports_sdpa", False)) and model._can_set_attn_implementation()


def _supports_flash(model: Any) -> bool:
    return bool(getattr(model, "_supports_flash_attn", False) or getattr(model, "_supports_flash_attn_2", False))


def _takes_flash_attn(model: Any) -> bool:
    """Whether the family runs on flash-attn 2, its windows included."""
    known = getattr(model, "_compatible_flash_implementations", None)
    fits = _is_plain(model) and model._can_set_attn_implementation() and _largest_head(model) <= LARGEST_HEAD
    return fits and (known is None or "flash_attention_2" in known)


def _has_flash_attn() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def _is_plain(model: Any) -> bool:
    """Whether every layer attends to all tokens before its own, or to a window of them that it names to the attention
    function. Chunks and the parts of models that see images need transformers' masks."""
    config = model.config
    if config.get_text_config() is not config or not _supports_flash(model):
        return False
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - PLAIN_LAYERS or getattr(config, "attention_chunk_size", None):
        return False
    has_windows = "sliding_attention" in kinds or getattr(config, "sliding_window", None) is not None
    return not has_windows or any(_names_windows(one.__module__) for one in type(model).__mro__)


@functools.cache
def _names_windows(module: str) -> bool:
    """Whether a family's code gives the attention function its windows; a few (Phi-MoE) have them in masks alone. Told
    by its source, as transformers tells whether a family takes an attention function at all."""
    return re.search(r"attention_interface\((?:[^()]|\([^()]*\))*\bsliding_window=", source_of(module)) is not None


@functools.cache
def _asks_for_its_name(module: str) -> bool:
    """Whether a family's code does something for transformers' own attention functions alone, as those do that choose
    the keys of a token by an indexer."""
    return re.search(r"config\._attn_implementation (?:not )?in\b", source_of(module)) is not None


def source_of(module: str) -> str:
    """The source code of a family of transformers, or of a model with code of its own; "" where there is none."""
    if module.startswith(("torch.", "transformers.modeling_utils", "transformers.generation")):
        return ""
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


def _why_not_varlen(model: Any, dtype: torch.dtype, device: torch.device, trains: bool) -> str | None:
    """None where torch's flash attention over packed rows computes what the model asks for."""
    if dtype not in NARROW:
        return f"that takes bf16 or fp16 alone, and the model computes in {dtype}"
    if _varlen_attn() is None:
        flash = "flash-attn is tried on a GPU alone" if _has_flash_attn() else "flash-attn is not installed"
        return f"torch {torch.__version__} has no varlen_attn (2.10 and later have), and {flash}"
    if not _runs_flash(device):
        return "torch's flash attention needs an NVIDIA GPU of compute capability 8.0 or above"
    if not _is_plain(model):
        return "its layers need masks that varlen_attn does not take"
    if trains and (dropout := _dropout(model)):
        return f"varlen_attn has no dropout, and the model's attention has {dropout}"
    if (size := _largest_head(model)) > LARGEST_HEAD:
        return f"varlen_attn takes heads of {LARGEST_HEAD} numbers at most, and the model's have {size}"
    return None


def _runs_flash(device: torch.device) -> bool:
    """Whether a GPU is one that torch's flash attention is compiled for; one that is not here is taken to be."""
    if torch.version.hip:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def _dropout(model: Any) -> float:
    config = model.config.get_text_config()
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return max(float(getattr(config, name, None) or 0.0) for name in names)


def _largest_head(model: Any) -> int:
    """Numbers of a query in one head."""
    config = model.config.get_text_config()
    of_parts = (getattr(config, name, None) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
    heads = getattr(config, "num_attention_heads", None) or 1
    return max(getattr(config, "head_dim", None) or config.hidden_size // heads, sum(of_parts))


def _takes_flash(value: Tensor, dropout: float) -> bool:
    return value.is_cuda and _computes_in(value.dtype, value.device) in NARROW and not dropout


@functools.cache
def _varlen_attn() -> Callable[..., Any] | None:
    """torch's flash attention over packed rows, with fewer heads of keys and values than of queries; None before torch
    2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 asks for no leave
        return functools.partial(varlen_attn, enable_gqa=True)
    return varlen_attn


# ---- the attention functions ----


def packed_varlen(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, head size]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_lengths: Sequence[int] | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,  # [B + 1] int32: where the samples begin and end
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """torch's flash attention over all samples of the row at once. [1, T, heads, head size]

    Rows that are not packed (answers are decoded from padded ones) go to transformers' sdpa with their mask; so does,
    with a warning, what flash attention cannot compute.
    """
    dtype = _computes_in(value.dtype, value.device)
    special = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    attend = _varlen_attn() if _takes_flash(value, dropout) and not special else None
    if attend is None or packed_lengths is None or cu_seq_lens_q is None:
        if packed_lengths is not None and value.is_cuda:
            warnings.warn(
                f"packed attention of {type(module).__name__} in {dtype} with dropout {dropout} is computed sample by"
                " sample, which is slow on a GPU: flash attention takes bf16 and fp16, without dropout",
                stacklevel=2,
            )
        options = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, **kwargs}
        return packed_by_sample(module, query, key, value, attention_mask, packed_lengths, **options)
    size, value_size = query.shape[-1], value.shape[-1]
    wide = -(-max(size, value_size) // 8) * 8  # the kernels want one size, a multiple of 8
    q, k, v = (nn.functional.pad(x[0].transpose(0, 1).to(dtype), (0, wide - x.shape[-1])) for x in (query, key, value))
    longest = max(packed_lengths)
    output = attend(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        longest,
        longest,
        scale=size**-0.5 if scaling is None else scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),  # the token itself is in its window
    )
    return output[None, ..., :value_size].contiguous(), None  # a few families view it as rows


def packed_by_sample(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, head size]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' own sdpa, sample by sample: causal, or with its own block of a mask. [1, T, heads, head size]"""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer: Any = type(module)
    if lost := [name for name in _only_eager_takes(layer) if _is_set(kwargs.get(name))]:
        raise NotComputed(f"sdpa does not compute the {lost[0]} of {type(module).__name__}")
    with exact_products():
        if packed_lengths is None:
            if attention_mask is not None and attention_mask.shape[-1] == 1 < key.shape[2]:  # a packed row's
                raise LengthsLost(
                    f"{type(module).__name__} is given no lengths of samples: call packing_holds before the model runs"
                )
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        kwargs.pop("is_causal", None)
        # split, not slices: a slice's gradient is as long as the whole row, and all of them would be added
        samples = zip(*(x.split(tuple(packed_lengths), dim=2) for x in (query, key, value)), strict=True)
        masks = _sample_masks(attention_mask, packed_lengths, kwargs.get("sliding_window"), query.device)
        outputs = [
            sdpa_attention_forward(module, q, k, v, mask, is_causal=mask is None, **kwargs)[0]
            for (q, k, v), mask in zip(samples, masks, strict=True)
        ]
    output = torch.cat(outputs, dim=1)
    exact_backward(output, query, key, value)
    return output, None


@functools.cache
def _only_eager_takes(layer: type) -> frozenset[str]:
    """What a family's own attention function takes by name and sdpa does not, as caps of scores."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    own = getattr(sys.modules.get(layer.__module__), "eager_attention_forward", None)
    if own is None:
        return frozenset()
    theirs = inspect.signature(sdpa_attention_forward).parameters
    return frozenset(inspect.signature(own).parameters) - frozenset(theirs) - {"sliding_window", "kwargs"}


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def _sample_masks(
    row_mask: Tensor | None, lengths: Sequence[int], window: int | None, device: torch.device
) -> Iterator[Tensor | None]:
    """Each sample's mask [..., length, length]: its block of the row's, where transformers made one; the band of a
    window that is narrower than the sample; else None, for causal."""
    bands: dict[int, Tensor] = {}
    start, whole = 0, row_mask is not None and row_mask.shape[-1] == sum(lengths)
    for length in lengths:
        part = slice(start, start + length)
        start += length
        if whole:
            yield row_mask[..., part, part]  # type: ignore[index]  # not None
        elif window is not None and window < length:
            if length not in bands:
                bands[length] = _band(length, window, device)
            yield bands[length]
        else:
            yield None


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, length, length]: a token sees `window` tokens, the last of them itself."""
    places = torch.arange(length, device=device)
    behind = places[:, None] - places[None]
    return ((behind >= 0) & (behind < window))[None, None]


@functools.cache
def register() -> None:
    """Makes our ways known to transformers; a model that was saved whole asks for them in another process."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    for name, function in ((VARLEN, packed_varlen), (BY_SAMPLE, packed_by_sample), (BY_MASK, packed_by_sample)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
