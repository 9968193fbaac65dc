"""The student that a run cuts: which samples and models its layers are chosen by.

Knows the run's options and what it has loaded. Does not know how layers are chosen (cutting/layer_choice.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

from pocl_fast.answers.likelihood import LoadedModel
from pocl_fast.cutting.layer_choice import SAMPLES, Measuring, cut_student
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.data.stream import SampleStream
from pocl_fast.models.precision import Precision
from pocl_fast.options.run import RunConfig
from pocl_fast.records.sources import source_of
from pocl_fast.run_directory.directory import RunDirectory, required
from pocl_fast.run_directory.step_inputs import LAYERS


class Loads(Protocol):
    """What a run has loaded."""

    directory: RunDirectory
    config: RunConfig
    say: Any

    @property
    def precision(self) -> Precision: ...
    @property
    def train_file_is_loaded(self) -> bool: ...
    @property
    def train_file(self) -> SampleSet: ...
    @property
    def encoder(self) -> SampleEncoder: ...
    def ready(self, model: Any, whose: str, say: Any = None) -> LoadedModel: ...


def cut_of_run(run: Loads, source: Any) -> Any:
    """The student with the layers that the options choose, the same in each step of a run. `source` itself where they
    cut none. Raises `InputError` as `cut_student` does."""
    chosen = run.config.models
    if chosen.student_layers is None:
        return source
    measuring = Measuring(
        samples=lambda: _samples(run),
        ready=lambda model: run.ready(model, "student", lambda _: None),
        autocast=run.precision.autocast,
        made_from=run.directory.made_from(LAYERS, run.config) if chosen.layer_choice != "even" else {},
    )
    return cut_student(source, chosen, run.directory.path, measuring, run.say)


def _samples(run: Loads) -> Sequence[EncodedSample]:
    """The training samples that layers may be measured on; of a large file the first alone, so that they are the same
    whether all of it is read or not."""
    data = run.config.data
    source = source_of(required(data.train, f"--train (for --layer-choice {run.config.models.layer_choice})"))
    holds_out = not data.dev and data.held_out is not None
    if run.train_file_is_loaded or holds_out or not source.is_large():
        known = run.train_file.encoded
        return known[: 2 * SAMPLES] if source.is_large() else known
    rows = itertools.chain.from_iterable(SampleStream(source, run.encoder, data))
    return [one for _, one in itertools.islice(rows, 2 * SAMPLES)]
