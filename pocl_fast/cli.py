"""The command line: `pocl-fast COMMAND`, generated from the configuration's dataclasses."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pocl_fast.options import (
    Cache,
    Data,
    Difficulty,
    Evaluation,
    Generation,
    Models,
    Rollouts,
    RunConfig,
    Schedule,
    Training,
    read_yaml,
    recorded_config,
)
from pocl_fast.system.errors import InputError, Interrupted, OtherRankFailed


@dataclass(frozen=True)
class Output:
    """Where the run lives."""

    output: Path
    """The run directory: made if it is not there, continued if it holds this run."""


@dataclass(frozen=True)
class Step(Output):
    """Where the run lives, and where its options come from."""

    config: Path | None = None
    """A YAML file with any options of a run (same names); options on the command line win over it."""
    restart: bool = False
    """Do a step again where the run directory holds it made with other options or files; without this, that stops."""


@dataclass(frozen=True)
class Distill(Step):
    """Distil a teacher into a student: measure, rank, train, evaluate, report; stops and resumes at any point."""

    models: Models = field(default_factory=Models)
    data: Data = field(default_factory=Data)
    generation: Generation = field(default_factory=Generation)
    difficulty: Difficulty = field(default_factory=Difficulty)
    schedule: Schedule = field(default_factory=Schedule)
    training: Training = field(default_factory=Training)
    rollouts: Rollouts = field(default_factory=Rollouts)
    cache: Cache = field(default_factory=Cache)
    evaluation: Evaluation = field(default_factory=Evaluation)


@dataclass(frozen=True)
class Measure(Step):
    """Measure how hard each training sample is for the student -> difficulty.parquet, teacher_scores.parquet."""

    models: Models = field(default_factory=Models)
    data: Data = field(default_factory=Data)
    generation: Generation = field(default_factory=Generation)
    difficulty: Difficulty = field(default_factory=Difficulty)


@dataclass(frozen=True)
class Rank(Step):
    """Rank the samples easy to hard and cut them into stages: difficulty.parquet -> curriculum.json."""

    difficulty: Difficulty = field(default_factory=Difficulty)
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(frozen=True)
class FillCache(Step):
    """Run the teacher over the training samples ahead of training, which does it otherwise -> teacher_cache/."""

    models: Models = field(default_factory=Models)
    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)


@dataclass(frozen=True)
class Train(Step):
    """Train the student along curriculum.json -> checkpoints, metrics.jsonl, student/."""

    models: Models = field(default_factory=Models)
    data: Data = field(default_factory=Data)
    generation: Generation = field(default_factory=Generation)
    training: Training = field(default_factory=Training)
    rollouts: Rollouts = field(default_factory=Rollouts)
    cache: Cache = field(default_factory=Cache)


@dataclass(frozen=True)
class Evaluate(Step):
    """Evaluate the student before and after training on the held-out samples -> evaluation.json, answers-*.jsonl."""

    models: Models = field(default_factory=Models)
    data: Data = field(default_factory=Data)
    generation: Generation = field(default_factory=Generation)
    evaluation: Evaluation = field(default_factory=Evaluation)


@dataclass(frozen=True)
class Report(Output):
    """Write report.html from what the run directory holds."""


@dataclass(frozen=True)
class Demo(Output):
    """Distil the bundled teacher into six of its layers on the bundled samples: minutes on two cores."""

    output: Path = Path("runs/demo")
    """The run directory: made if it is not there, continued if it holds this run."""


def _distill(run: Any) -> None:
    from pocl_fast.run.report import summary_table
    from pocl_fast.system.ranks import is_first

    run.distill()
    if is_first():
        print("\n" + summary_table(run.path))


def _evaluate(run: Any) -> None:
    run.evaluate("before")
    if (run.path / "student").is_dir():
        run.evaluate("after")


COMMANDS: dict[str, tuple[type[Output], Callable[[Any], Any]]] = {
    "distill": (Distill, _distill),
    "measure": (Measure, lambda run: run.measure()),
    "rank": (Rank, lambda run: run.rank()),
    "cache": (FillCache, lambda run: run.cache()),
    "train": (Train, lambda run: run.train()),
    "evaluate": (Evaluate, _evaluate),
    "report": (Report, lambda run: run.report()),
    "demo": (Demo, _distill),
}
NEED_A_RUN = ("rank", "train", "report")  # of what an earlier step left


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status: 0 done, 2 wrong input, 128 + signal when asked to stop."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from pocl_fast import __version__

        print(f"pocl-fast {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"pocl-fast: no command {arguments[0]!r}\n\n{_overview()}", file=sys.stderr)
        return 2
    terminate = signal.signal(signal.SIGTERM, _terminate)
    try:
        _run(arguments[0], arguments[1:])
    except InputError as error:
        _complain(f"pocl-fast {arguments[0]}: {error}")
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT
    except OtherRankFailed as error:
        _complain(f"pocl-fast {arguments[0]}: {error}")
        return 1
    except Interrupted as stop:
        print(f"\n{stop}; the same command goes on from here", file=sys.stderr)
        return 128 + stop.signal_number
    finally:
        signal.signal(signal.SIGTERM, terminate)
    return 0


def _run(name: str, arguments: list[str]) -> None:
    command, work = COMMANDS[name]
    given, options = _parse(name, command, arguments)
    if name in NEED_A_RUN and not (given.output / "config.yaml").is_file():
        raise InputError(f"--output {given.output} holds no run yet; start one with `pocl-fast distill` or `measure`")
    _quiet_libraries()
    from pocl_fast.run.steps import open_run
    from pocl_fast.system import ranks

    joined = ranks.start()
    if name == "demo":
        from pocl_fast.run.demo import demo_options

        options = demo_options()
    work(open_run(given.output, options, restart=getattr(given, "restart", False)))
    if joined:
        ranks.stop()


def _parse(name: str, command: type[Output], arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """What was given to the command, and all options of the run: the defaults, over them what the run recorded, then
    the YAML file, then the command line."""
    import tyro

    base = recorded_config(output) if (output := _value_of(arguments, "--output")) else RunConfig()
    if issubclass(command, Step) and (yaml_file := _value_of(arguments, "--config")):
        base = read_yaml(yaml_file, base)
    groups = {f.name: getattr(base, f.name) for f in fields(command) if hasattr(base, f.name)}
    default = command() if command is Demo else command(output=tyro.MISSING, **groups)  # type: ignore[call-arg]
    shown: Any = Annotated[command, tyro.conf.OmitArgPrefixes]
    given = tyro.cli(shown, prog=f"pocl-fast {name}", description=command.__doc__, args=arguments, default=default)
    options = base.flat()
    for group in groups:
        value = getattr(given, group)
        options |= {f.name: getattr(value, f.name) for f in fields(value)}
    return given, options


def _value_of(arguments: list[str], option: str) -> Path | None:
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            return Path(arguments[position + 1])
        if argument.startswith(option + "="):
            return Path(argument[len(option) + 1 :])
    return None


def _overview() -> str:
    lines = ["usage: pocl-fast COMMAND [options]      (pocl-fast COMMAND --help shows a command's options)", ""]
    lines += [f"  {name:<10}{(command.__doc__ or '').splitlines()[0]}" for name, (command, _) in COMMANDS.items()]
    return "\n".join(lines)


def _quiet_libraries() -> None:
    """Keeps libraries' notes and bars out of ours; their warnings of substance stay errors or are ours to say."""
    # threads that wait sleep: spinning, as is the default, they slow everything down many times on a machine that does
    # something else besides; read when torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each 8-bit product otherwise
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _complain(message: str) -> None:
    """Says why this process ends. What every rank of torchrun finds wrong, the first says: a rank that ends has the
    others ended."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(2)
        message += f" (rank {rank})"
    print(message, file=sys.stderr, flush=True)


def _terminate(number: int, _: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        print("\nstopped; the same command goes on from here", file=sys.stderr)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
