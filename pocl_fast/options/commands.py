"""What a command of the command line has besides the options of a run: its folder, its YAML file, how it prints.

Knows no option of a run. Does not know what the commands do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Output:
    """Where the run lives."""

    output: Path
    """The run directory: made if it is not there, continued if it holds this run."""


@dataclass(frozen=True)
class Step(Output):
    """Where the run lives, and where its options come from."""

    preset: Literal["paper"] | None = None
    """A published recipe, instead of the defaults: "paper" is that of POCL's code. Other options win over it."""
    config: Path | None = None
    """A YAML file with any options of a run (same names); options on the command line win over it."""
    restart: bool = False
    """Do a step again where the run directory holds it made with other options or files; without this, that stops."""


@dataclass(frozen=True)
class Plan:
    """Where the options come from, and how the plan is printed."""

    output: Path | None = None
    """The run directory to be: what it holds is read, nothing is written there."""
    preset: Literal["paper"] | None = None
    """A published recipe, instead of the defaults: "paper" is that of POCL's code. Other options win over it."""
    config: Path | None = None
    """A YAML file with any options of a run (same names); options on the command line win over it."""
    json: bool = False
    """Print the plan as JSON."""
    time: bool = False
    """Load the models too, time a few steps in a temporary folder, and say how long the run will take."""


@dataclass(frozen=True)
class FineTuning(Step):
    """The model that is fine-tuned, how long, and where the run lives."""

    model: str | None = None
    """What is fine-tuned: hub id, local folder (of adapters too, which are merged into their model), GGUF file, or
    "bundled". With --student-layers, that many of its layers."""
    epochs: int | None = None
    """Passes over the training samples: 3 where neither this nor the run directory or the YAML file says otherwise."""


@dataclass(frozen=True)
class DemoOutput(Output):
    """Where the run lives."""

    output: Path = Path("runs/demo")
    """The run directory: made if it is not there, continued if it holds this run."""


@dataclass(frozen=True)
class Inspection:
    """Which samples to show, and where their options come from."""

    output: Path | None = None
    """A run whose options are taken: files, models, template, limits; nothing is written there."""
    config: Path | None = None
    """A YAML file with any options of a run (same names); options on the command line win over it."""
    model: str | None = None
    """The model whose tokenizer is taken, as for --student; without it the student's, or else the teacher's."""
    line: int | None = None
    """The record to show, by the number that messages give it; without it, the first one."""
    count: int = 1
    """How many records to show, from that one on."""
    ids: bool = False
    """List the tokens too, with their places and ids, one a line."""
    html: Path | None = None
    """Write a page of the samples to this file, too."""
