"""Which way of decoding in batches is right for a model: tried once a model, on a few short random prompts.

A family may keep more than keys and values (states of a convolution, of linear attention), or keep them where no row
can be taken out; its positions or windows may count the padding. So each way is compared, fastest first, with the
model's logits without any cache, a prompt alone. Knows the ways through a model (steps.py). Does not know what the
prompts are, nor how a token is chosen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pocl_fast.answers.steps import OwnSteps, PlainSteps, RoomySteps, SharedPrefix, Steps
from pocl_fast.models.placement import input_device
from pocl_fast.system.errors import InputError

TOLERANCE = (
    1e-4  # relative to the largest logit. fp32's rounding: 1e-6 to 1e-5; a state that counts padding: 1e-3 and up
)
NOISE = 4  # times the rounding that a model has between two lengths of one prompt (bf16: 1e-2 in 30 layers)
NOT_CAUSAL = 0.1  # later tokens change what came before by more than any rounding
STEPS = 6  # tokens after each prompt of the probe
LEAVES = {2: [0, 2, 3], 4: [0, 2]}  # before these steps the probe keeps these of its rows: an answer ended
LONGEST_WINDOW = 64  # tokens; the probe is longer than windows up to that
PREFIX = 10  # tokens that the probe's prompts share


@dataclass(frozen=True)
class Way:
    """How answers are decoded. The fields' first values are the fastest."""

    cache: Literal["roomy", "own", "none"]
    lengths: Literal["any", "equal", "single"]  # of the prompts of a batch; single: a prompt a batch
    leave: bool  # whether finished answers leave their batch
    prefix: bool = False  # whether the prompts' common prefix is computed once
    why: str = ""  # why no faster way was taken

    def same_batches(self, other: Way) -> bool:
        return (self.cache, self.lengths, self.leave) == (other.cache, other.lengths, other.leave)

    def steps(self, model: Any, pad_id: int, room: int, prefix: SharedPrefix | None = None) -> Steps:
        """A new batch's way through the model."""
        if self.cache == "roomy":
            return RoomySteps(model, pad_id, room, prefix if self.prefix else None)
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


def slowness(way: Way) -> tuple[int, bool]:
    """A larger one for a slower way."""
    return (next(i for i, other in enumerate(WAYS) if way.same_batches(other)), not way.prefix)


_chosen: weakref.WeakKeyDictionary[Any, dict[Any, Way]] = weakref.WeakKeyDictionary()


def decoding_way(model: Any, pad_id: int, say: Callable[[str], object] | None = None) -> Way:
    """The fastest way that gives a model's answers the logits that each prompt has alone. `say` is told once where it
    is not the fastest of all, and why.

    A model is tried once, and again where its attention, its device or its precision has changed. Raises `InputError`
    where no way is right.
    """
    device = input_device(model)
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    key = (getattr(model.config, "_attn_implementation", None), device, model.dtype, autocast, pad_id)
    known = _chosen.setdefault(model, {})
    if key not in known:
        with evaluating(model), torch.inference_mode(), _same_random_numbers(device):
            known[key] = _choose(model, pad_id)
        if say is not None and known[key].cache != "roomy":
            name = type(model).__name__
            say(f"{name} is not answered in the fastest way ({known[key].why}): {known[key]}")
    return known[key]


def _choose(model: Any, pad_id: int) -> Way:
    probe = _Probe(model, pad_id)
    reasons = []
    for way in WAYS:
        reason = probe.fault(way)
        if reason is None:
            why = reasons[0] if reasons else ""
            return Way(
                way.cache, way.lengths, way.leave, prefix=way.cache == "roomy" and probe.shares_prefix(), why=why
            )
        reasons.append(reason)
    raise InputError(
        f"{type(model).__name__} cannot generate answers here, neither with a cache nor without: {reasons[-1]}"
    )


class _Probe:
    """Random prompts, the tokens that follow each, and the logits that a model has for these without a cache."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model, self.pad_id, self.device = model, pad_id, input_device(model)
        vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
        windows = [window for window in windows_of(model.config) if window <= LONGEST_WINDOW]
        most = min(length_limit(model), positions_of(model.config)) - STEPS
        longest = max(12, max(windows, default=0) + 5)
        lengths = [min(n, max(1, most)) for n in (longest, 3, max(longest - 8, 5), 1)]
        generator = torch.Generator().manual_seed(0)
        total = max(lengths) + PREFIX + STEPS
        draw = torch.randint(0, vocab_size, (len(lengths), total), generator=generator).tolist()
        self.rows = [row[: n + STEPS] for row, n in zip(draw, lengths, strict=True)]
        self.equal = [row[: lengths[2] + STEPS] for row in draw]
        self.roomy = most >= PREFIX + 9  # whether positions suffice for a prefix
        head = draw[0][-PREFIX:]
        self.headed = [head + row[: n + STEPS] for row, n in zip(draw, (9, 2, 5, 1), strict=True)]
        self._wanted: dict[tuple[int, ...], Tensor] = {}
        self.allowed = max(TOLERANCE, NOISE * self._noise())

    def _noise(self) -> float:
        """How far the logits of a prompt move with tokens behind it: by rounding alone in a causal model."""
        row = self.rows[0]
        prompt = row[:-STEPS]
        try:
            alone = self._logits(prompt)
            error = _apart(alone, self._logits(row)[: len(prompt)])
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # whatever a model's own code raises at three tokens and no option
            raise InputError(f"{type(self.model).__name__} does not run on plain tokens: {_line(failure)}") from failure
        if error > NOT_CAUSAL:
            raise InputError(
                f"{type(self.model).__name__} cannot generate answers: a token's logits depend on the tokens after it "
                f"(they move by {error:.2g} of the largest); load it as a decoder (is_decoder=True), or take a causal "
                f"language model"
            )
        return error

    def fault(self, way: Way) -> str | None:
        """What is wrong with a way for this model, None where its logits are right."""
        rows = self.equal if way.lengths == "equal" else self.rows
        groups = [[row] for row in rows] if way.lengths == "single" else [rows]
        return self._fault(groups, lambda: way.steps(self.model, self.pad_id, STEPS), way.leave)

    def shares_prefix(self) -> bool:
        """Whether the prompts' common prefix may be computed once, with padding between it and the rest. Not where a
        layer sees a window of the tokens: there the padding would count."""
        from pocl_fast.answers.kv_cache import RoomyLayer, roomy_cache  # imports transformers, which takes seconds

        layers = roomy_cache(self.model.config, 0).layers
        if not all(isinstance(layer, RoomyLayer) for layer in layers) or windows_of(self.model.config):
            return False
        if not self.roomy:
            return False
        prefix = SharedPrefix(self.headed[0][:PREFIX])
        steps = lambda: RoomySteps(self.model, self.pad_id, STEPS, prefix)  # noqa: E731
        return self._fault([self.headed], steps, leave=True) is None

    def _fault(self, groups: Sequence[Sequence[list[int]]], steps: Callable[[], Steps], leave: bool) -> str | None:
        try:
            errors = [self._error(rows, steps(), leave and len(rows) > 1) for rows in groups]
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as failure:  # a model's own code may raise anything at a cache that it does not know
            return _line(failure)
        error = max(errors)
        return None if error <= self.allowed else f"its logits are off by {error:.1g} of the largest"

    def _error(self, rows: Sequence[list[int]], steps: Steps, leave: bool) -> float:
        """The largest error of the logits at all steps, relative to the largest logit. Infinite where one is NaN."""
        active = list(range(len(rows)))
        logits = steps.begin([row[:-STEPS] for row in rows])
        error = 0.0
        for step in range(STEPS + 1):
            for i, row in enumerate(active):
                place = len(rows[row]) - STEPS - 1 + step
                error = max(error, _apart(logits[i].float(), self._wanted_of(rows[row])[place]))
            if step == STEPS or error > self.allowed:
                break
            if leave and step in LEAVES:
                kept = [i for i, row in enumerate(active) if row in LEAVES[step]]
                steps.keep(torch.tensor(kept, device=self.device))
                active = [active[i] for i in kept]
            tokens = [rows[row][len(rows[row]) - STEPS + step] for row in active]
            logits = steps.add(torch.tensor(tokens, device=self.device))
        return error

    def _wanted_of(self, row: list[int]) -> Tensor:
        key = tuple(row)
        if key not in self._wanted:
            self._wanted[key] = self._logits(row)
        return self._wanted[key]

    def _logits(self, ids: Sequence[int]) -> Tensor:
        """[T, V] without a cache."""
        logits: Tensor = self.model(input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False).logits
        return logits[0].float()


def _apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest entry; infinite where one is NaN and the other is not."""
    same = got == want  # -inf too
    error = (got - want).abs().masked_fill(same, 0).max() / want.masked_fill(want.isinf(), 0).abs().max().clamp_min(
        1e-6
    )
    return float(error.nan_to_num(float("inf")))


def _line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {(str(failure).strip() or 'without a message').splitlines()[0]}"


def windows_of(config: Any) -> list[int]:
    """The windows and chunks of attention in a configuration, in tokens: its numbers with such a name."""
    settings = vars(config.get_text_config(decoder=True))
    return [
        value
        for name, value in settings.items()
        if ("window" in name or "chunk_size" in name) and "layers" not in name and "feed_forward" not in name
        if type(value) is int and value > 0
    ]


def positions_of(config: Any) -> int:
    """The most tokens a model has positions for, by its configuration."""
    settings = config.get_text_config(decoder=True)
    found = getattr(settings, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else 1 << 30


def length_limit(model: nn.Module) -> int:
    """The length up to which no frequency of a rotary embedding depends on how long the sequence is. Beyond it a prompt
    would change the others of its batch."""
    limits = [1 << 30]
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for name, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
                continue
            parameters = getattr(module.config, "rope_parameters", None) or {}
            parameters = parameters.get(name, parameters)
            limit = parameters.get("original_max_position_embeddings") or getattr(module, "original_max_seq_len", None)
            limits += [int(limit)] if limit else []
    return min(limits)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it all modules are in evaluation mode; after it each is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """What is drawn within it changes no later random number."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
