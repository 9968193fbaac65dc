"""Padding-free batches: several samples in one row of tokens, with attention that never crosses from one to another.

Knows token layouts and attention. Does not know losses or the curriculum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocl_fast.models import exact_products
from pocl_fast.placement import input_device
from pocl_fast.samples import EncodedSample

PACKED_ATTENTION = "pocl_packed_sdpa"
PACKING_TOLERANCE = 1e-2  # relative; families that do not support packing are off by 0.1, bf16 rounding is 4e-3


@dataclass(frozen=True)
class PackedBatch:
    """B samples in one row of T tokens, of which N are supervised (predict a response token)."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in each sample
    lengths: tuple[int, ...]  # B sample lengths; they add up to T
    supervised: Tensor  # [N] int64: positions whose next token is in a response
    labels: Tensor  # [N] int64: these next tokens
    counts: tuple[int, ...]  # supervised tokens of each sample; they add up to N

    def to(self, device: torch.device | str) -> PackedBatch:
        move = {name: getattr(self, name).to(device) for name in ("input_ids", "position_ids", "supervised", "labels")}
        return PackedBatch(lengths=self.lengths, counts=self.counts, **move)


def pack(samples: Sequence[EncodedSample]) -> PackedBatch:
    """The samples one behind the other, in the order given. Raises ValueError for no samples."""
    if not samples:
        raise ValueError("pack: no samples")
    input_ids: list[int] = []
    position_ids: list[int] = []
    supervised: list[int] = []
    labels: list[int] = []
    for sample in samples:
        first = len(input_ids) + len(sample.prompt_ids) - 1  # the prompt's last token predicts the response's first
        supervised.extend(range(first, first + len(sample.response_ids)))
        labels.extend(sample.response_ids)
        input_ids.extend(sample.prompt_ids)
        input_ids.extend(sample.response_ids)
        position_ids.extend(range(len(sample)))
    return PackedBatch(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([position_ids]),
        lengths=tuple(len(sample) for sample in samples),
        supervised=torch.tensor(supervised),
        labels=torch.tensor(labels),
        counts=tuple(len(sample.response_ids) for sample in samples),
    )


def token_budget_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Positions in `lengths` grouped so that each group's sum stays within `max_tokens` (one longer item stands alone).

    Longest first, so that the peak of memory comes at the start and not at the end.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    used = 0
    for i in order:
        if not batches or used + lengths[i] > max_tokens:
            batches.append([])
            used = 0
        batches[-1].append(i)
        used += lengths[i]
    return batches


def enable_packing(model: nn.Module, *, autocast: bool = False) -> None:
    """Makes a transformers model attend within each sample of a packed row: by flash-attention where it is installed
    and the model is on a GPU, in bf16, fp16 or under autocast to them; else by one causal `sdpa` call a sample, which
    costs Σ length² and not (Σ length)². A family without `sdpa` (Gemma 2) keeps its own attention, with the mask that
    transformers derives from `position_ids`."""
    from transformers.utils import is_flash_attn_2_available

    on_gpu = next(model.parameters()).is_cuda
    narrow = autocast or next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    if on_gpu and narrow and is_flash_attn_2_available():
        model.set_attn_implementation("flash_attention_2")  # type: ignore[operator]
        return
    if not getattr(model, "_supports_sdpa", False):
        return
    _register_packed_attention()
    model.set_attn_implementation(PACKED_ATTENTION)  # type: ignore[operator]


def forward_kwargs(batch: PackedBatch) -> dict[str, Any]:
    """The arguments with which a transformers model whose packing is enabled runs on a packed batch."""
    ends = torch.tensor((0, *batch.lengths), device=batch.input_ids.device).cumsum(0).to(torch.int32)
    longest = max(batch.lengths)
    return {
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
    """Logits [N, V] at the supervised positions; the lm_head never meets the others where `packed`.

    `packed=False` pads the samples into a rectangle instead, for the few families where packing does not hold.
    """
    if packed:
        return model(**forward_kwargs(batch), logits_to_keep=batch.supervised).logits[0]
    padded, where = padded_kwargs(batch)
    return model(**padded).logits.flatten(0, 1)[where]


def supervised_hidden(body: nn.Module, batch: PackedBatch, *, packed: bool) -> Tensor:
    """Final hidden states [N, H] at the supervised positions, from a model's body (all but the lm_head)."""
    if packed:
        hidden = body(**forward_kwargs(batch)).last_hidden_state[0]
        return hidden[batch.supervised.to(hidden.device)]  # the body's layers may lie on several devices
    padded, where = padded_kwargs(batch)
    hidden = body(**padded).last_hidden_state.flatten(0, 1)
    return hidden[where.to(hidden.device)]


def padded_kwargs(batch: PackedBatch) -> tuple[dict[str, Any], Tensor]:
    """The arguments with which a model runs on a batch as a right-padded rectangle [B, longest], and where its
    supervised positions are in the flattened one."""
    device, longest = batch.input_ids.device, max(batch.lengths)
    lengths = torch.tensor(batch.lengths, device=device)
    rows = torch.arange(len(batch.lengths), device=device).repeat_interleave(lengths)
    places = rows * longest + batch.position_ids[0]
    ids = torch.zeros(len(batch.lengths) * longest, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    ids[places] = batch.input_ids[0]
    mask[places] = 1
    shape = (len(batch.lengths), longest)
    return {"input_ids": ids.view(shape), "attention_mask": mask.view(shape), "use_cache": False}, places[
        batch.supervised
    ]


def packing_ready(model: nn.Module, say: Callable[[str], object], *, autocast: bool = False) -> bool:
    """Enables packing, and whether it holds for the model; `say` is told where it does not."""
    enable_packing(model, autocast=autocast)
    holds = packing_holds(model)
    if not holds:
        say(f"{type(model).__name__} does not support packed batches: they are padded instead, which is slower")
    return holds


def packing_holds(model: nn.Module) -> bool:
    """Whether a model's logits of packed samples are those of each alone; its packing is enabled."""
    return packing_error(model, model.config.vocab_size) < PACKING_TOLERANCE  # type: ignore[union-attr, arg-type]


def packing_error(model: nn.Module, vocab_size: int) -> float:
    """Largest difference between the logits of two short random samples packed together and run alone, relative to the
    largest logit. Around 1e-6 (fp32) where packing holds for this model; its family does not support packing
    otherwise."""
    generator = torch.Generator().manual_seed(0)
    device = input_device(model)
    rows = [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in (7, 12)]
    samples = [EncodedSample(i, tuple(row[:3]), tuple(row[3:]), False) for i, row in enumerate(rows)]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        together = model(**forward_kwargs(pack(samples).to(device))).logits[0]
        alone = [model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0] for row in rows]
    model.train(was_training)
    want = torch.cat(alone).float()
    return float((together.float() - want).abs().max() / want.abs().max().clamp_min(1e-6))


def _packed_sdpa(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, head size]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' own sdpa, sample by sample; with the mask's block of the sample where a window is narrower than
    it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed_lengths is None:
        with exact_products():
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    kwargs.pop("is_causal", None)
    outputs = []
    start = 0
    for length in packed_lengths:
        part = slice(start, start + length)
        mask = attention_mask[..., part, part] if window and window < length and attention_mask is not None else None
        with exact_products():
            output, _ = sdpa_attention_forward(
                module, query[:, :, part], key[:, :, part], value[:, :, part], mask, is_causal=mask is None, **kwargs
            )
        outputs.append(output)
        start += length
    return torch.cat(outputs, dim=1), None  # [1, T, heads, head size]


def _register_packed_attention() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(PACKED_ATTENTION, _packed_sdpa)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
