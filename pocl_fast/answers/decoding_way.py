"""Which way of decoding in batches is right for a model: tried once a model, on a few short random prompts.

A family may keep more than keys and values (states of a convolution, of linear attention), or keep them where no row
can be taken out; its positions or windows may count the padding. So each way is compared, fastest first, with the
model's logits without any cache, a prompt alone. Knows the ways through a model (steps.py). Does not know what the
prompts are, nor how a token is chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pocl_fast.answers.steps import OwnSteps, PlainSteps, RoomySteps, SharedPrefix, Steps
from pocl_fast.inputs.left_to_right import checked_logits
from pocl_fast.models.packed_forward import length_limit
from pocl_fast.models.placement import input_device
from pocl_fast.models.probing import (
    DEVICE_ERRORS,
    LONGEST_WINDOW,
    apart,
    circumstances,
    evaluating,
    found_of,
    positions_of,
    random_ids,
    same_random_numbers,
    windows_of,
)
from pocl_fast.system.errors import InputError, first_line

# relative to the largest logit; fp32 rounds by 1e-6 to 1e-5, a state that counts padding is off by 1e-3
TOLERANCE = 1e-4
NOISE = 4  # times the rounding that a model has between two lengths of one prompt (bf16: 1e-2 in 30 layers)
MOST_NOISE = 0.01  # more is no rounding (fp32 by TF32 or bf16 products: 5e-3),
MOST_NOISE_HALF = 0.1  # in bf16 and fp16 (0.06 between two kernels in a deep model)
MOST_OF_A_CACHE = 0.002  # that a model's own cache rounds in fp32; in bf16 and fp16 as much as MOST_NOISE_HALF
OFF = "its logits are off"
STEPS = 3  # tokens after each prompt of the probe
LEAVES = {1: [0, 2, 3], 2: [0, 2]}  # before these steps the probe keeps these of its rows: an answer ended
PREFIX = 10  # tokens that the probe's prompts share


@dataclass(frozen=True)
class Way:
    """How answers are decoded. The fields' first values are the fastest."""

    cache: Literal["roomy", "own", "none"]
    lengths: Literal["any", "equal", "single"]  # of the prompts of a batch; single: a prompt a batch
    leave: bool  # whether finished answers leave their batch
    why: str = ""  # why no faster way was taken

    def steps(self, model: Any, pad_id: int, room: int, prefix: SharedPrefix | None = None) -> Steps:
        """A new batch's way through the model."""
        if self.cache == "roomy":
            return RoomySteps(model, pad_id, room, prefix)
        return OwnSteps(model, pad_id) if self.cache == "own" else PlainSteps(model)

    def __str__(self) -> str:
        batches = {
            "any": "batches are padded",
            "equal": "only prompts of equal length share a batch",
            "single": "one prompt at a time",
        }[self.lengths]
        cache = {
            "roomy": "",
            "own": ", with the cache as the model's generate has it",
            "none": ", without a cache, which is slow",
        }[self.cache]
        return batches + cache + ("" if self.leave else "; finished answers stay in their batch")


WAYS = [
    Way("roomy", "any", leave=True),
    Way("own", "any", leave=True),
    Way("own", "any", leave=False),
    Way("own", "equal", leave=True),
    Way("own", "equal", leave=False),
    Way("own", "single", leave=True),
    Way("none", "equal", leave=True),
    Way("none", "single", leave=True),
]
ALONE = WAYS[5]  # what a model's own `generate` does


def slowness(way: Way) -> int:
    """A larger number for a slower way."""
    return next(i for i, other in enumerate(WAYS) if replace(way, why="") == other)


@dataclass
class _Tried:
    """What is known of a model in one attention, on one device and in one precision."""

    way: Way
    allowed: float  # error of its logits, relative to the largest
    prefix: bool | None = None  # whether a prefix may be shared; None where that was not needed yet


def decoding_way(model: Any, pad_id: int, say: Callable[[str], object] | None = None) -> Way:
    """The fastest way that gives a model's answers the logits that each prompt has alone. `say` is told once where it
    is not the fastest of all, and why.

    A model is tried once, and again where its attention, its device or its precision has changed. Raises `InputError`
    where no way is right.
    """
    known, key = found_of(model), _key(model, pad_id)
    if key not in known:
        with _trying(model):
            probe = _Probe(model, pad_id)
            known[key] = _Tried(_choose(model, probe), probe.allowed)
        way: Way = known[key].way
        if say is not None and way.cache != "roomy":
            say(f"{type(model).__name__} is not answered in the fastest way ({way.why}): {way}")
    chosen: Way = known[key].way
    return chosen


def shares_prefix(model: Any, pad_id: int) -> bool:
    """Whether the prompts' common prefix may be computed once, with padding between it and the rest. Not where a layer
    sees a window of the tokens: there the padding would count. To be asked after `decoding_way`."""
    tried: _Tried = found_of(model)[_key(model, pad_id)]
    if tried.prefix is None:
        with _trying(model):
            tried.prefix = tried.way.cache == "roomy" and _Probe(model, pad_id, tried.allowed).shares_prefix()
    return tried.prefix


def _key(model: Any, pad_id: int) -> tuple[Any, ...]:
    return "decoding", circumstances(model), pad_id


@contextlib.contextmanager
def _trying(model: Any) -> Iterator[None]:
    with evaluating(model), torch.inference_mode(), same_random_numbers(input_device(model)):
        yield


def _choose(model: Any, probe: _Probe) -> Way:
    reasons: list[str] = []
    for way in WAYS:
        # by its configuration, for a few random tokens meet the choices that padding moves by chance alone
        if way.lengths == "any" and getattr(model.config.get_text_config(decoder=True), "index_topk", None):
            reasons.append("it attends to tokens that an indexer chooses, and padding moves its choice")
            continue
        reason = probe.fault(way)
        if reason is not None and reason.startswith(OFF) and probe.allow_for_the_cache():
            reason = probe.fault(way)
        if reason is None:
            why = reasons[0] if reasons else ""
            return replace(way, why=why)
        if way == ALONE and reason.startswith(OFF):
            if not probe.by_length and probe.depends_on_length():
                return replace(way, why=reasons[0])
            raise InputError(
                f"{type(model).__name__} cannot generate answers: with the cache as its own generate has it, {reason} "
                f"from what they are without"
            )
        reasons.append(reason)
    raise InputError(
        f"{type(model).__name__} cannot generate answers here, neither with a cache nor without: {reasons[-1]}"
    )


class _Probe:
    """Random prompts, the tokens that follow each, and the logits that a model has for these without a cache."""

    def __init__(self, model: Any, pad_id: int, allowed: float | None = None) -> None:
        self.model, self.pad_id, self.device = model, pad_id, input_device(model)
        windows = [window for window in windows_of(model) if window <= LONGEST_WINDOW]
        most = min(length_limit(model.config), positions_of(model.config)) - STEPS
        longest = max(12, max(windows, default=0) + 5)
        lengths = [min(n, max(1, most)) for n in (longest, 3, max(longest - 6, 5), 1)]
        draw = random_ids(model, len(lengths), max(lengths) + PREFIX + STEPS).tolist()
        self.rows = [row[: n + STEPS] for row, n in zip(draw, lengths, strict=True)]
        self.equal = [row[: lengths[2] + STEPS] for row in draw]
        self.roomy = most >= PREFIX + 9  # whether positions suffice for a prefix
        head = draw[0][-PREFIX:]
        self.headed = [head + row[: n + STEPS] for row, n in zip(draw, (9, 2), strict=False)]
        self._wanted: dict[tuple[int, ...], Tensor] = {}
        self.half = model.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(self.device.type)
        self.most_noise = MOST_NOISE_HALF if self.half else MOST_NOISE
        self.cache_allowed = False  # whether the rounding of the model's own cache is in what is allowed
        self.allowed = allowed or TOLERANCE  # error of the logits, relative to the largest
        self.by_length = False  # whether a token's logits depend on how many tokens follow it
        if allowed is None:
            self._measure()

    def _measure(self) -> None:
        """How far the logits of a prompt move with tokens behind it: by rounding alone, or because they depend on the
        sequence's length (a choice among equal scores). Raises `InputError` where they depend on later tokens."""
        row, n = self.rows[0], len(self.rows[0]) - STEPS
        name = "the model that is to generate answers is a"
        whole = checked_logits(self.model, name, row, n, self.most_noise)
        if whole.isnan().any():
            raise InputError(f"{type(self.model).__name__} cannot generate answers: its logits are NaN")
        alone = self._logits([row[:n]])[0]
        noise = apart(alone, whole[:n])
        self.by_length = noise > self.most_noise
        self._wanted.update({} if self.by_length else {tuple(row): whole})
        if not self.by_length:
            self.allowed = max(TOLERANCE, NOISE * noise)
        elif self.half:
            self.allowed = MOST_NOISE_HALF

    def depends_on_length(self) -> bool:
        """Whether a token's logits depend on how many tokens follow it, whichever they are."""
        return any(
            apart(self._logits([row[:n]])[0, -1], self._wanted_of(row, n - 1)) > self.allowed
            for row in self.rows
            for n in range(len(row) - STEPS, len(row))
        )

    def allow_for_the_cache(self) -> bool:
        """Allows for the rounding of the model's own cache too, when it is first called, and whether that is more: a
        state that is updated token by token is rounded otherwise than one of all tokens at once (Mamba 2: up to 3e-4).
        """
        if self.cache_allowed:
            return False
        self.cache_allowed = True
        try:
            steps = ALONE.steps(self.model, self.pad_id, STEPS)
            error = self._error([self.rows[0]], steps, leave=False, limit=float("inf"))
        except DEVICE_ERRORS:
            raise
        except Exception:  # the ways with this cache will say it
            return False
        before, most = self.allowed, MOST_NOISE_HALF if self.half else MOST_OF_A_CACHE
        if error <= most:
            self.allowed = max(before, min(NOISE * error, most))
        return self.allowed > before

    def fault(self, way: Way) -> str | None:
        """What is wrong with a way for this model, None where its logits are right."""
        rows = self.equal if way.lengths == "equal" else self.rows
        groups = [[row] for row in rows] if way.lengths == "single" else [rows]
        return self._fault(groups, lambda: way.steps(self.model, self.pad_id, STEPS), way.leave)

    def shares_prefix(self) -> bool:
        """See the function of this name."""
        from pocl_fast.answers.kv_cache import RoomyLayer, roomy_cache  # imports transformers, which takes seconds

        layers = roomy_cache(self.model.config, 0).layers
        if not all(isinstance(layer, RoomyLayer) for layer in layers) or windows_of(self.model):
            return False
        if not self.roomy:
            return False
        prefix = SharedPrefix(self.headed[0][:PREFIX])
        return (
            self._fault([self.headed], lambda: RoomySteps(self.model, self.pad_id, STEPS, prefix), leave=True) is None
        )

    def _fault(self, groups: Sequence[Sequence[list[int]]], steps: Callable[[], Steps], leave: bool) -> str | None:
        try:
            errors = [self._error(rows, steps(), leave and len(rows) > 1, self.allowed) for rows in groups]
        except DEVICE_ERRORS:
            raise
        except Exception as failure:  # a model's own code may raise anything at a cache that it does not know
            return first_line(failure, named=True)
        error = max(errors)
        return None if error <= self.allowed else f"{OFF} by {error:.1g} of the largest"

    def _error(self, rows: Sequence[list[int]], steps: Steps, leave: bool, limit: float) -> float:
        """The largest error of the logits at all steps, relative to the largest logit, infinite where one is NaN; of
        the first steps only where it is over the limit there."""
        active = list(range(len(rows)))
        logits = steps.begin([row[:-STEPS] for row in rows])
        error = 0.0
        for step in range(STEPS + 1):
            for i, row in enumerate(active):
                place = len(rows[row]) - STEPS - 1 + step
                error = max(error, apart(logits[i].float(), self._wanted_of(rows[row], place)))
            if step == STEPS or error > limit:
                break
            if leave and step in LEAVES:
                kept = [i for i, row in enumerate(active) if row in LEAVES[step]]
                steps.keep(torch.tensor(kept, device=self.device))
                active = [active[i] for i in kept]
            tokens = [rows[row][len(rows[row]) - STEPS + step] for row in active]
            logits = steps.add(torch.tensor(tokens, device=self.device))
        return error

    def _wanted_of(self, row: list[int], place: int) -> Tensor:
        """Logits [V] after the token at `place`."""
        key = tuple(row)
        if key not in self._wanted:
            self._wanted[key] = self._generated(row) if self.by_length else self._logits([row])[0]
        return self._wanted[key][place]

    def _generated(self, row: list[int]) -> Tensor:
        """Logits [T, V] as the model's own `generate` computes them, step by step; 0 within the prompt. A model whose
        logits depend on the sequence's length has no others to be compared with."""
        steps = ALONE.steps(self.model, self.pad_id, STEPS)
        logits = [steps.begin([row[:-STEPS]])]
        logits += [steps.add(torch.tensor([token], device=self.device)) for token in row[-STEPS:]]
        return torch.cat([logits[0].new_zeros(len(row) - STEPS - 1, logits[0].shape[1]), *logits]).float()

    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[B, T, V] of rows of one length, without a cache."""
        ids = torch.tensor([list(row) for row in rows], device=self.device)
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()
