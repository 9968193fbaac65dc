"""Whether a model gives packed samples the logits that each has alone, and if not, how its batches are laid out
instead: tried on a few random samples against the family's own attention.

Knows families that do not pack. Does not know how attention is computed (packed_attention.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.packed import Rows, pack
from pocl_fast.models.packed_attention import (
    LengthsLost,
    Way,
    chooses_keys,
    enable_packing,
    register,
    slower_ways,
    use,
    why_never_packed,
)
from pocl_fast.models.packed_forward import gives_row_masks, supervised_logits
from pocl_fast.models.placement import input_device
from pocl_fast.models.probing import (
    DEVICE_ERRORS,
    apart,
    attending_by,
    circumstances,
    exact_arithmetic,
    found_of,
    is_exact,
    is_sharded,
    longest_window,
    plain_run,
    random_ids,
    say_once,
    short_windows,
    undisturbed,
)
from pocl_fast.system.errors import InputError, first_line

EXACT_TOLERANCE = 1e-4  # relative, of fp32: kernels differ by 1e-6 to 1e-5, lost caps and windows by 1e-2 and more
KERNEL_TOLERANCE = 0.1  # between two attention kernels in bf16: 0.01 to 0.06, by depth
SHORTEST = 20  # tokens of a sample


def packing_ready(
    model: nn.Module,
    say: Callable[[str], object] | None,
    *,
    device: torch.device | str | None = None,
    trains: bool = False,
) -> Rows:
    """Enables packing (see `enable_packing`) and returns how the model's batches are to be laid out: packed, where that
    holds for it. `say` is told how the model attends, or that its samples are padded instead. Raises `InputError` where
    the model does not run at all."""
    attends: list[str] = []
    found: list[str] = []
    enable_packing(model, attends.append if say else None, device=device, trains=trains)
    rows = packing_holds(model, found.append if say else None)
    for line in attends + found if rows == Rows.PACKED else found[-1:]:
        if say:
            say(line)
    return rows


def packing_holds(model: Any, say: Callable[[str], object] | None = None) -> Rows:
    """How the batches of a model with packing enabled are to be laid out: packed where packed samples get the logits
    that each has alone, by its family's own attention; else padded where that holds; else by their length. `say` is
    told where packed rows do not hold, and why if that is known. Tried and said once a model, and again where its
    attention, device or precision has changed. Raises `InputError` as `packing_ready` does."""
    register()
    name = type(model).__name__
    if is_sharded(model):
        say_once(model, f"{name} is sharded already: it is not tried whether it supports packed batches", say)
        return Rows.PADDED if why_never_packed(model) else Rows.PACKED
    found, key = found_of(model), ("packing", circumstances(model))
    if key not in found:
        found[key] = _tried(model, say)
        found["packing", circumstances(model)] = found[key]  # it may attend otherwise by now
    held: _Held = found[key]
    if held.implementation != model.config._attn_implementation:
        use(model, Way(held.implementation, ""))
    if held.why is not None:
        why = f" ({held.why})" if held.why else ""
        said = {
            Rows.PADDED: f"does not support packed batches{why}: they are padded instead, which is slower",
            Rows.BY_LENGTH: f"supports neither packed nor padded batches{why}: samples of one length share a forward"
            " instead, which is slow",
        }
        say_once(model, f"{name} {said[held.rows]}", say)
    return held.rows


@dataclass(frozen=True)
class _Held:
    """What was found of a model: how its batches are laid out, and transformers' name of how it attends then."""

    rows: Rows
    implementation: str
    why: str | None = None  # why its batches are not packed, "" where that is not known; None where they are


def _tried(model: Any, say: Callable[[str], object] | None) -> _Held:
    with undisturbed(model), short_windows(model):
        probe = Probe.of(model)
        reason = why_never_packed(model)
        if reason is None:
            reason = _made_to_hold(model, probe, say)
        rows = Rows.PACKED if reason is None else _unpacked(model, probe)
        return _Held(rows, model.config._attn_implementation, reason)


def _made_to_hold(model: Any, probe: Probe, say: Callable[[str], object] | None) -> str | None:
    """Tries the way that was chosen for the model, then slower ones: None where packing holds by one of them, which the
    model attends by from then on. Else why not, "" where that is not known."""
    chosen = model.config._attn_implementation
    reason = probe.packed(model)
    if reason is None:
        return None
    for way in slower_ways(model, reason):
        if way.implementation == model.config._attn_implementation:
            continue
        with attending_by(model, str(way.implementation)):
            held = probe.packed(model) is None
        if held:
            use(model, way, say)
            return None
    assert model.config._attn_implementation == chosen
    return reason


def _unpacked(model: Any, probe: Probe) -> Rows:
    """How batches are laid out where packing does not hold; where the model attends otherwise than its family's own
    attention even so, it attends by that from then on."""
    for rows in (Rows.BY_LENGTH,) if chooses_keys(model) else (Rows.PADDED, Rows.BY_LENGTH):
        for implementation in (model.config._attn_implementation, "eager"):
            with attending_by(model, implementation):
                held = probe.holds(model, rows)
            if held:
                if implementation != model.config._attn_implementation:
                    use(model, Way(implementation, ""))
                return rows
    return Rows.BY_LENGTH


@dataclass(frozen=True, eq=False)
class Probe:
    """Random samples, and the logits of one of them alone by the family's own attention."""

    before: EncodedSample
    other: EncodedSample  # as long as `before`
    sample: EncodedSample  # as long as `before`
    short: EncodedSample
    want: Tensor  # [n, V] fp32: the logits of `sample`
    exact: bool  # whether they are exact to the digits of fp32

    @classmethod
    def of(cls, model: Any) -> Probe:
        """Raises `InputError` where the model does not run on plain tokens."""
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        length = max(2, min(max(SHORTEST, 2 * longest_window(model) + 3), most))
        rows = random_ids(model, 3, length).tolist()
        before, other, sample = (EncodedSample(i, (row[0],), tuple(row[1:]), False) for i, row in enumerate(rows))
        short = EncodedSample(3, before.prompt_ids, before.response_ids[: max(1, length // 3)], False)
        exact = is_exact(model)
        try:
            want = _alone(model, sample)
        except DEVICE_ERRORS:
            raise
        except Exception as error:  # whatever a family raises
            raise InputError(f"{type(model).__name__} does not run on plain tokens: {first_line(error)}") from error
        return cls(before, other, sample, short, want, exact)

    def contexts(self, model: Any) -> Iterator[contextlib.AbstractContextManager[None]]:
        """In which arithmetic a model is tried: exactly, where it can be, and as it will run, where that is another."""
        half = model.config._attn_implementation.startswith("flash")
        if self.exact and not half:
            yield exact_arithmetic(model)
        if not self.exact or torch.is_autocast_enabled(self.want.device.type):
            yield contextlib.nullcontext()

    def packed(self, model: Any) -> str | None:
        """None where packed samples have the logits that each has alone; else why not, in the model's words or ""."""
        try:
            for number, context in enumerate(self.contexts(model)):
                with context:
                    errors = packing_errors(model, self)
                    tight = self.exact and number == 0 and not model.config._attn_implementation.startswith("flash")
                    if not errors.hold(EXACT_TOLERANCE if tight else KERNEL_TOLERANCE):
                        return ""
        except DEVICE_ERRORS:
            raise
        except LengthsLost:
            return "its layers do not pass the samples' lengths on to their attention"
        except Exception as error:  # whatever a family raises at a packed row, or at a mask it does not expect
            return "" if gives_row_masks(model) else first_line(error)
        return None

    def holds(self, model: Any, rows: Rows) -> bool:
        """Whether both samples have in one batch, laid out so, the logits that each has alone."""
        batch = pack([self.short, self.sample]).to(self.want.device)
        try:
            with next(iter(self.contexts(model)), contextlib.nullcontext()):
                got = supervised_logits(model, batch, packed=rows).float().split(batch.counts)
        except DEVICE_ERRORS:
            raise
        except Exception:  # whatever a family raises at padding
            return False
        allowed = EXACT_TOLERANCE if self.exact else KERNEL_TOLERANCE
        want = _alone(model, self.short), self.want
        return all(apart(ours, theirs) < allowed for ours, theirs in zip(got, want, strict=True))


@dataclass(frozen=True)
class PackingErrors:
    """How far the logits of packed samples are off, relative to the largest logit."""

    leak: float  # a sample packed behind one sample, against the same behind another of the same length; 0 bit by bit
    packed: float  # a sample packed behind another, against the model without packing
    depends: bool = False  # whether a gradient leads from a sample's logits to the tokens of the one before

    def hold(self, tolerance: float) -> bool:
        """Experts get other numbers of tokens with other neighbours, so that their products round otherwise."""
        leaks = self.leak > 0 and (self.depends or not self.leak < tolerance)
        return not leaks and self.packed < tolerance


def packing_errors(model: Any, probe: Probe) -> PackingErrors:
    """The errors of a model as it attends now. Raises what it raises at packed rows."""
    behind_one, behind_other = (_packed(model, first, probe.sample) for first in (probe.before, probe.other))
    leak = apart(behind_one, behind_other)
    if behind_one.equal(behind_other):
        return PackingErrors(0.0, apart(behind_one, probe.want))
    return PackingErrors(leak or 1e-30, apart(behind_one, probe.want), _depends(model, probe))


def _alone(model: Any, sample: EncodedSample) -> Tensor:
    """By the family's own attention."""
    with plain_run(model):
        return supervised_logits(model, pack([sample]).to(input_device(model)), packed=Rows.BY_LENGTH).float()


def _packed(model: Any, before: EncodedSample, sample: EncodedSample) -> Tensor:
    batch = pack([before, sample]).to(input_device(model))
    return supervised_logits(model, batch, packed=True)[-len(sample.response_ids) :].float()


@torch.enable_grad()
def _depends(model: Any, probe: Probe) -> bool:
    """Whether the logits of a sample depend on the tokens of the one packed before it, by their gradient: exactly zero
    where they do not, however products round."""
    seen: list[Tensor] = []

    def leaf(module: nn.Module, given: Any, words: Tensor) -> Tensor:
        seen.append(words.detach().requires_grad_(True))
        return seen[-1]

    hook = model.get_input_embeddings().register_forward_hook(leaf)
    try:
        logits = _packed(model, probe.before, probe.sample)
        weights = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
        gradient = torch.autograd.grad((logits * weights).sum(), seen[0])[0]
    finally:
        hook.remove()
    return bool(gradient[0, : len(probe.before)].count_nonzero())
