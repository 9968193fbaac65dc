"""Which layers a cut student keeps: chosen by a rule, measured, said in a line, and written down for later loads.

Knows the rules by their names, and the file of what was chosen. Does not know what is done with a student, nor whether
a model comes from a run or a trainer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pocl_fast.answers.likelihood import LoadedModel, cross_entropy
from pocl_fast.cutting.cut import chosen_layers, cut_layers, stack_of
from pocl_fast.cutting.cut_settings import owners_of_keys
from pocl_fast.cutting.importance import block_influence, most_important
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.inputs.positions import check_positions
from pocl_fast.models.fingerprints import source_fingerprint
from pocl_fast.models.lm_head import check_head
from pocl_fast.models.packing_check import packing_ready
from pocl_fast.models.probing import attending_by
from pocl_fast.system import ranks
from pocl_fast.system.console import waiting, watched
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_json

RECORD = "layers.json"  # in a run's or a trainer's folder
SAMPLES = 64  # on which layers are measured; as many others for the held-out loss
TOKENS = 16_384  # at most about so many in each
EVEN, IMPORTANCE, AUTO = "even", "importance", "auto"


class CutOptions(Protocol):
    """How a student is cut: a run's options, a trainer's arguments."""

    @property
    def student_layers(self) -> int | None: ...
    @property
    def layer_choice(self) -> Any: ...


@dataclass(frozen=True)
class Measuring:
    """What layers are measured with."""

    samples: Callable[[], Sequence[EncodedSample]]  # those that are trained on
    ready: Callable[[Any], LoadedModel]  # a model checked for them, and how its batches are laid out
    autocast: Callable[[], AbstractContextManager[Any]]
    made_from: Mapping[str, Any]  # what a choice is of, besides the options: model and samples, told by JSON's values


@dataclass(frozen=True)
class Cut:
    """What a rule keeps, and how the student that it makes does before training."""

    layers: list[int]
    cross_entropy: float | None = None  # nats a token of the held-out half
    refused: str = ""  # why no such student can be made


def measuring_of(
    name: str, samples: Sequence[EncodedSample], autocast: Callable[[], AbstractContextManager[Any]]
) -> Measuring:
    """What layers of the model of this name are measured with, where nobody else checks it. `samples` have tokens alone
    that it has rows for."""

    def ready(model: Any) -> LoadedModel:
        check_positions(model, max(map(len, samples)), "student")
        check_head(model, "student")
        return LoadedModel(model, packing_ready(model, None))

    made_from = {"student": source_fingerprint(name), "samples": digest(samples)}
    return Measuring(lambda: samples, ready, autocast, made_from)


def check_choice(options: CutOptions) -> None:
    """Raises `InputError` for a choice of layers where none are cut."""
    if options.student_layers is None and options.layer_choice != EVEN:
        raise InputError(
            f"--layer-choice {options.layer_choice} says which layers a cut student keeps: give --student-layers too"
        )


def cut_student(
    source: Any, options: CutOptions, folder: Path, measuring: Measuring, say: Callable[[str], object]
) -> Any:
    """The student that these options cut from `source`. What layers it keeps is written to `folder`/layers.json; a
    choice by measuring that is there already, made from the same, is taken as it is.

    `say` is told what was chosen, once. Every rank must call, measures nothing but on the first, and cuts the same.
    Raises `InputError` where layers cannot be measured or cut.
    """
    keep, count, choice = int(options.student_layers or 0), len(stack_of(source).layers), options.layer_choice
    even = chosen_layers(source, keep)  # refuses a number of layers that there are not
    made_from = {"of": count, "student_layers": keep, "layer_choice": choice, **measuring.made_from}
    layers = ranks.from_first(lambda: _recorded(folder / RECORD, made_from))
    if layers is None or (choice == EVEN and layers != even):
        plain = choice == EVEN or keep == count
        samples = () if plain else measuring.samples()  # every rank reads them

        def choose() -> list[int]:
            taken, cuts = (EVEN, {EVEN: Cut(even)}) if plain else _measured(source, even, choice, measuring, samples)
            say(described(count, taken, cuts))
            found = {name: {"layers": cut.layers, "cross_entropy": cut.cross_entropy} for name, cut in cuts.items()}
            folder.mkdir(parents=True, exist_ok=True)
            record = {"made_from": made_from, "layers": cuts[taken].layers, "taken": taken, "choices": found}
            write_json(folder / RECORD, record)
            return cuts[taken].layers

        layers = ranks.from_first(choose)
    return cut_layers(source, keep, layers)


def _recorded(path: Path, made_from: Mapping[str, Any]) -> list[int] | None:
    """The layers that were chosen before, of the same and by the same options."""
    if not path.exists():
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return list(known["layers"]) if known["made_from"] == json.loads(json.dumps(made_from)) else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not what was written there: delete it, to have the layers chosen anew") from error


def _measured(
    source: Any, even: list[int], choice: str, measuring: Measuring, samples: Sequence[EncodedSample]
) -> tuple[str, dict[str, Cut]]:
    """Which rule is taken, and what each keeps."""
    seen, held_out = halves(samples)
    now = getattr(source.config, "_attn_implementation", None) or "eager"
    # attending_by: it attends as it did, afterwards
    with waiting("measuring layers", "models"), attending_by(source, now), measuring.autocast():
        scores = block_influence(measuring.ready(source), list(stack_of(source).layers), seen)
    layers = {
        EVEN: even,
        IMPORTANCE: most_important(scores, len(even), owners_of_keys(source.config)),
    }
    tried = watched(list(layers.items()), "trying layers", "choices")
    cuts = {name: _tried(source, kept, measuring, held_out, must=choice == name) for name, kept in tried}
    if choice != AUTO:
        return choice, cuts
    losses = {name: cut.cross_entropy for name, cut in cuts.items() if cut.cross_entropy is not None}
    if not losses:
        raise InputError(next(iter(cuts.values())).refused)
    return min(losses, key=lambda name: losses[name]), cuts


def _tried(
    source: Any, layers: list[int], measuring: Measuring, held_out: Sequence[EncodedSample], *, must: bool
) -> Cut:
    """The loss of the student with these layers. One that cannot be made is an error where it `must` be."""
    try:
        student = cut_layers(source, len(layers), layers)
    except InputError as error:
        if must:
            raise
        return Cut(layers, refused=str(error))
    with measuring.autocast():
        ready = measuring.ready(student)
        losses = cross_entropy(ready.model, held_out, packed=ready.packed)
    counts = np.array([sample.supervised_count for sample in held_out], dtype=float)
    return Cut(layers, float((losses * counts).sum() / counts.sum()))


def halves(samples: Sequence[EncodedSample]) -> tuple[list[EncodedSample], list[EncodedSample]]:
    """The samples on which layers are measured, and those of the held-out loss: in turns, evenly over all. Raises
    `InputError` where there are not two."""
    if len(samples) < 2:
        raise InputError(
            "--layer-choice measures layers on some training samples, and losses on others; here are"
            f" {len(samples)}: give more, or --layer-choice even"
        )
    mean = sum(map(len, samples)) / len(samples)
    count = max(2, min(2 * SAMPLES, len(samples), int(2 * TOKENS / mean)))
    picked = [samples[i * len(samples) // count] for i in range(count)]
    return picked[::2], picked[1::2]


def digest(samples: Iterable[EncodedSample]) -> str:
    """Identifies samples by their tokens, and by which are trained on."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(sample.fingerprint)
    return found.hexdigest()


def described(count: int, taken: str, cuts: Mapping[str, Cut]) -> str:
    """The line that says what was chosen, out of what."""
    kept = len(cuts[taken].layers)
    if len(cuts) == 1:
        return f"student: {kept} of {count} layers ({ranges(cuts[taken].layers)})"
    parts = [f"{name} ({ranges(cut.layers)}): {_loss(cut)}" for name, cut in cuts.items()]
    return f"student: {kept} of {count} layers; {'; '.join(parts)}; taken: {taken}"


def _loss(cut: Cut) -> str:
    return f"refused ({cut.refused})" if cut.cross_entropy is None else f"held-out CE {cut.cross_entropy:.3f}"


def ranges(layers: Sequence[int]) -> str:
    """Ascending numbers as text: 0 to 3, 7 is 0-3, 7."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
