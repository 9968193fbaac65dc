"""The command line: `pocl-fast COMMAND`. A command is a step and the groups of options that the step reads."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, make_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pocl_fast.options.commands import DemoOutput, FineTuning, Inspection, Output, Plan, Step
from pocl_fast.options.declaring import option_name
from pocl_fast.options.presets import PRESETS
from pocl_fast.options.run import RunConfig
from pocl_fast.options.training import OptimisationOptions
from pocl_fast.reports.compare_command import Compared, compare
from pocl_fast.settings import fine_tuning
from pocl_fast.settings.configuration import PAIRS, from_options, read_yaml, recorded_config
from pocl_fast.settings.evaluation_sets import SETS
from pocl_fast.system import tokenizer_threads
from pocl_fast.system.errors import InputError, Interrupted, OtherRankFailed
from pocl_fast.system.typed_values import did_you_mean, hints_of


def _distill(run: Any) -> None:
    run.distill()
    _print_summary(run)


def _fine_tune(run: Any) -> None:
    run.fine_tune()
    _print_summary(run)


def _print_summary(run: Any) -> None:
    from pocl_fast.reports.report import summary_table
    from pocl_fast.system.ranks import is_first

    if is_first():
        print("\n" + summary_table(run.path))


def _evaluate(run: Any) -> None:
    run.evaluate("before")
    run.evaluate("teacher")
    if run.is_warmed_up:
        run.evaluate("warmed")
    if (run.path / "student").is_dir():
        run.evaluate("after")


def _plan(given: Any, config: RunConfig) -> None:
    from pocl_fast.plan.command import print_plan

    print_plan(config, given.output, as_json=given.json, times=given.time)


def _inspect(given: Any, config: RunConfig) -> None:
    from pocl_fast.inspection.command import inspect

    inspect(given, config)


def _compare(given: Compared, _: RunConfig) -> None:
    compare(given)


@dataclass(frozen=True)
class Command:
    """What a command does with a run, or with options alone, and which groups of `RunConfig` it
    reads."""

    help: str
    work: Callable[..., Any]  # of a run; where it opens none, of what was given and the options
    groups: tuple[str, ...] = ()
    step: type = Step
    opens_run: bool = True
    reads_options: bool = True  # of runs; without them no library of models is loaded
    unread: tuple[str, ...] = ()  # options of the groups that it does not have


_DATA = ("models", "data")
_TRAINING = ("adapters", "loss", "stages", "optimisation", "logging", "trainer", "rollouts", "cache")
COMMANDS: dict[str, Command] = {
    "distill": Command(
        "Distil a teacher into a student: measure, rank, train, evaluate, report; stops and resumes at any point.",
        _distill,
        tuple(group.name for group in fields(RunConfig)),
    ),
    "plan": Command(
        "Say what `distill` with these options would take: samples, steps, disk, memory, time. Writes nothing.",
        _plan,
        tuple(group.name for group in fields(RunConfig)),
        step=Plan,
        opens_run=False,
    ),
    "sft": Command(
        "Fine-tune a model on the references, without a teacher: evaluate, train, evaluate, report; stops and resumes.",
        _fine_tune,
        (*_DATA, "adapters", "generation", "stages", "optimisation", "logging", "trainer", "evaluation"),
        step=FineTuning,
        unread=(
            *("teacher", "student", "teacher_quantization", "teacher_device", "data_source"),
            *(
                "within_stage",
                "epochs_per_stage",
                "stage_length",
                "fresh_optimizer",
                "fresh_learning_rate",
                "remeasure",
            ),
            "score_teacher",
        ),
    ),
    "measure": Command(
        "Measure how hard each training sample is for the student -> difficulty.parquet, teacher_scores.parquet.",
        lambda run: run.measure(),
        (*_DATA, "generation", "difficulty", "warmup", "adapters", "optimisation", "trainer"),
    ),
    "rank": Command(
        "Rank the samples easy to hard and cut them into stages: difficulty.parquet -> curriculum.json.",
        lambda run: run.rank(),
        (*_DATA, "generation", "difficulty", "schedule", "optimisation"),
        unread=tuple(option.name for option in fields(OptimisationOptions) if option.name != "seed"),
    ),
    "cache": Command(
        "Run the teacher over the training samples ahead of training, which does it otherwise -> teacher_cache/.",
        lambda run: run.cache(),
        (*_DATA, "generation", "cache"),
    ),
    "train": Command(
        "Train the student along curriculum.json -> checkpoints, metrics.jsonl, student/.",
        lambda run: run.train(),
        (*_DATA, "generation", "warmup", *_TRAINING),
    ),
    "evaluate": Command(
        "Evaluate the student before and after training, and the teacher, on all sets -> evaluation.json, scores/."
        " Or score answers that are there: evaluate --predictions FILE --references FILE.",
        _evaluate,
        (*_DATA, "generation", "evaluation"),
    ),
    "report": Command("Write report.html from what the run directory holds.", lambda run: run.report(), step=Output),
    "inspect": Command(
        "Show samples as the model sees them: each token, and whether it is asked, trained on or cut. Runs no model.",
        _inspect,
        _DATA,
        Inspection,
        opens_run=False,
        unread=(
            *("student_layers", "layer_choice", "teacher_quantization", "teacher_device", "precision", "device"),
            *("dev", "test", "held_out"),
        ),
    ),
    "compare": Command(
        "Compare evaluated runs: scores with 95 % intervals over training seeds, and paired differences of methods.",
        _compare,
        step=Compared,
        opens_run=False,
        reads_options=False,
    ),
    "demo": Command(
        "Distil the bundled teacher into six of its layers on the bundled samples: minutes on two cores.",
        _distill,
        step=DemoOutput,
    ),
}
HELD_OUT = 100  # samples that are held out of a training file that is all there is
HOLD_OUT = ("distill", "plan", "sft")  # by themselves
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
        first = arguments[0]
        wrong = f"no command {first!r}{did_you_mean(first, list(COMMANDS))}"
        if first.startswith("-"):
            wrong = f"{first} stands before the command"
        print(f"pocl-fast: {wrong}\n\n{_overview()}", file=sys.stderr)
        return 2
    terminate = signal.signal(signal.SIGTERM, _terminate)
    try:
        _run(arguments[0], arguments[1:])
        sys.stdout.flush()
    except InputError as error:
        _complain(f"pocl-fast {arguments[0]}: {error}")
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command to resume", file=sys.stderr)
        return 128 + signal.SIGINT
    except OtherRankFailed as error:
        _complain(f"pocl-fast {arguments[0]}: {error}")
        return 1
    except Interrupted as stop:
        print(f"\n{stop}; run the same command to resume", file=sys.stderr)
        return 128 + stop.signal_number
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's last flush would fail too
        if COMMANDS[arguments[0]].opens_run:
            print("\nstopped, for nothing reads what is printed; run the same command to resume", file=sys.stderr)
        return 128 + signal.SIGPIPE
    finally:
        signal.signal(signal.SIGTERM, terminate)
    return 0


def _run(name: str, arguments: list[str]) -> None:
    command = COMMANDS[name]
    _prepare_environment()  # before --set loads transformers
    _quiet_logs()
    if name == "evaluate" and any(word.partition("=")[0] in ("--predictions", "--references") for word in arguments):
        from pocl_fast.answers import predictions  # which needs no model, and no run

        scoring = Command(predictions.HELP, predictions.score, step=predictions.Scoring)
        predictions.score(_parse(name, scoring, predictions.checked(arguments))[0])
        return
    given, config = _parse(name, command, arguments)
    if name in HOLD_OUT and not config.data.dev and config.data.held_out is None:
        config = from_options({"held_out": HELD_OUT}, config)
    if name in NEED_A_RUN and not _may_be_first(name, config) and not (given.output / "config.yaml").is_file():
        raise InputError(f"--output {given.output} holds no run yet; start one with `pocl-fast distill` or `measure`")
    if command.reads_options:
        _quiet_libraries()
    if not command.opens_run:
        command.work(given, config)
        return
    if name == "demo":  # before torch and transformers are loaded, which takes a while the first time
        print(f"demo: SmolLM2-135M-Instruct is distilled into six of its layers; see {given.output}", flush=True)
    from pocl_fast.run.steps import open_run
    from pocl_fast.system import ranks

    joined = ranks.start()
    options = config.flat()
    if name == "demo":
        from pocl_fast.run.demo import demo_options
        from pocl_fast.system.console import show_in_logs_every

        show_in_logs_every(5)
        options = demo_options()
    command.work(open_run(given.output, options, restart=getattr(given, "restart", False)))
    if joined:
        ranks.stop()


def _may_be_first(name: str, config: RunConfig) -> bool:
    """Whether a step that needs a run begins one here: `rank` does, of an order that nothing is measured for."""
    from pocl_fast.curriculum.stages import is_measured

    return name == "rank" and not is_measured(config.schedule)


def _parse(name: str, command: Command, arguments: list[str]) -> tuple[Any, RunConfig]:
    """What was given to the command, and all options of the run: the defaults, over them what the run recorded, then
    the preset, the YAML file, and the command line."""
    import tyro

    output = _value_of(arguments, "--output") if command.reads_options else None
    base = recorded_config(output) if output else RunConfig()
    recorded = base
    if hasattr(command.step, "preset") and (preset := PRESETS.get(str(_value_of(arguments, "--preset")))):
        base = from_options(preset, base)
    if name == "sft":
        base = fine_tuning.begun(base)
    if hasattr(command.step, "config") and (yaml_file := _value_of(arguments, "--config")):
        base = read_yaml(yaml_file, base)
    groups = {group: _command_line_group(getattr(base, group), command.unread) for group in command.groups}
    shown: list[tuple[str, Any, Any]] = [(name, group, field(default_factory=group)) for name, group in groups.items()]
    made: Any = make_dataclass(name, shown, bases=(command.step,), frozen=True)
    read: Any = Annotated[made, tyro.conf.OmitArgPrefixes]
    given: Any = tyro.cli(read, prog=f"pocl-fast {name}", description=command.help, args=_with_one_of_each(arguments))
    options = {option: value for group in groups for option, value in vars(getattr(given, group)).items()}
    config = from_options(options, base)
    return given, fine_tuning.completed(config, given.model, given.epochs, recorded) if name == "sft" else config


def _command_line_group(group: Any, unread: Sequence[str] = ()) -> type:
    """A group for the command line's parser: its options but the `unread` ones, under their own names, with the group's
    values as defaults; those of NAME=VALUE pairs and of sets as words."""
    import tyro

    options: list[tuple[str, Any, Any]] = []
    for option in (option for option in fields(group) if option.name not in unread):
        kind, value = hints_of(type(group))[option.name], getattr(group, option.name)
        said: dict[str, Any] = {"help": option.metadata["help"]}
        if option.name in _WORDS:
            kind, value = list[str], []
            said |= {"metavar": _WORDS[option.name], "help_behavior_hint": "(default: none)"}
        options.append(
            (option_name(option), Annotated[kind, tyro.conf.arg(**said)], field(default_factory=partial(copy, value)))
        )
    return make_dataclass(type(group).__name__, options, namespace={"__doc__": type(group).__doc__})


def _with_one_of_each(arguments: list[str]) -> list[str]:
    """The words with those of all --set behind one, and so for each option of NAME=VALUE words: the parser would take
    the last one alone."""
    others: list[str] = []
    words: dict[str, list[str]] = {}
    into = others
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") in _WORDS_OF_FLAG:
            into = words.setdefault(name.replace("_", "-"), [])
            into += [value] if equals else []
            continue
        into = others if argument.startswith("--") else into
        into.append(argument)
    if empty := [name for name, given in words.items() if not given]:
        raise InputError(f"{empty[0]} needs {_WORDS_OF_FLAG[empty[0]].removesuffix(' ...')} words")
    return [*others, *(word for name, given in words.items() for word in (name, *given))]


# options of words, which may be given several times
_WORDS = dict.fromkeys(PAIRS, "NAME=VALUE ...") | dict.fromkeys(SETS, "[NAME=]FILE ...")
_WORDS_OF_FLAG = {"--" + name.replace("_", "-"): words for name, words in _WORDS.items()}


def _value_of(arguments: list[str], option: str) -> Path | None:
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            return Path(arguments[position + 1])
        if argument.startswith(option + "="):
            return Path(argument[len(option) + 1 :])
    return None


def _overview() -> str:
    lines = ["usage: pocl-fast COMMAND [options]      (pocl-fast COMMAND --help shows a command's options)", ""]
    lines += [f"  {name:<10}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(lines)


def _prepare_environment() -> None:
    """Sets what libraries read of the environment when they are imported."""
    # threads that wait sleep: spinning, as is the default, they slow everything down many times on a machine that does
    # something else besides; read when torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    tokenizer_threads.turn_off()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _quiet_logs() -> None:
    """Keeps libraries' notes out of the output, from their first import on."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="peft")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each 8-bit product otherwise
    # which accelerate imports, and which says on stdout that it found no GPU; its level is set when it is imported
    logging.getLogger("DeepSpeed").addFilter(_not_of_finding_a_device)


def _quiet_libraries() -> None:
    """The same of transformers, with its progress bars; the run's own checks replace its warnings."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _not_of_finding_a_device(record: logging.LogRecord) -> bool:
    return record.funcName != "get_accelerator"


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
        print("\nstopped; run the same command to resume", file=sys.stderr)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
