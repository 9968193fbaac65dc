"""What training prints, a line an event: functions of the schedule, the state and what was logged.

Knows texts. Does not know when they are printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocl_fast.curriculum.schedule import Schedule
from pocl_fast.system.console import duration, minutes
from pocl_fast.training.state import TrainingState

DEV_SCORES = {"eval_rouge_l": "dev ROUGE-L", "eval_cross_entropy": "dev CE"}
LONGEST_PROMPT, LONGEST_ANSWER = 50, 100  # characters that are shown


def legend(divergence: str | None) -> str:
    """What the parts of a training line mean; without a divergence, of supervised fine-tuning."""
    if divergence is None:
        return (
            "training lines: loss is the cross-entropy of the response, in nats a token; accuracy is the share of"
            " tokens that are the student's most likely one; supervised tokens are those of responses"
        )
    return (
        f"training lines: CE is the cross-entropy of the response and KD the {divergence} between teacher and student,"
        " in nats a token; loss is α · CE + (1 - α) · KD times its factor for the temperature τ (temperature_scaling),"
        " so losses of different stages do not compare; agreement is the share of tokens for which both models have the"
        " same most likely token; supervised tokens are those of responses"
    )


def resumption_line(checkpoint: Path, steps: int, total: int) -> str:
    """From where a training goes on."""
    return f"training resumes after step {steps} of {total}, from {checkpoint}"


def file_counted_line(curriculum: str, steps: int) -> str:
    """That a control's number of steps is known to be pocl's only for the file's order."""
    return (
        f"curriculum {curriculum}: {_counted(steps, 'step')}, counted over the samples in file order, for batches are"
        " cut by tokens: pocl, in the measured order, may have some more or fewer. For exactly the same number give"
        " both steps_per_stage"
    )


def stage_begins_line(schedule: Schedule, stage: int, *, weights: str, distils: bool = True) -> str:
    """The samples and settings of a stage, and the weights that it starts from."""
    begun = schedule.stages[stage]
    grows = "" if schedule.competence is None else "up to "
    settings = f" τ {begun.temperature:.3g}, α {begun.alpha:.3g}," if distils else ""
    return (
        f"stage {stage + 1}/{len(schedule.stages)} begins: {grows}{_counted(begun.size, 'sample')},"
        f" {_counted(schedule.planned_steps(stage), 'step')},{settings} from {weights}"
    )


def stage_done_line(schedule: Schedule, state: TrainingState, metric: str) -> str:
    """What came out of the running stage, which is over."""
    stage = state.stage
    parts = [f"{_counted(schedule.steps(stage), 'step')} in {duration(state.seconds.get(stage, 0.0))}"]
    if stage in state.losses:
        parts.append(f"last loss {state.losses[stage]:.3f}")
    if stage in state.best:
        best = state.best[stage]
        parts.append(f"best {DEV_SCORES.get(metric, metric)} {best.score:.2f} at step {best.step}")
    return f"stage {stage + 1}/{len(schedule.stages)} is done: {', '.join(parts)}"


def training_done_line(weights: str, steps: int) -> str:
    """What a finished training leaves."""
    return f"training is done after {_counted(steps, 'step')}: the student has {weights}"


def best_weights(stage: int, step: int) -> str:
    """The weights of a stage's best evaluation, for a line."""
    return f"the best weights of stage {stage + 1}, of step {step}"


def last_weights(stage: int) -> str:
    """The weights at a stage's end, for a line."""
    return f"the last weights of stage {stage + 1}"


def converged_line(schedule: Schedule, stage: int, evaluations: int) -> str:
    """A stage is ended early."""
    return (
        f"stage {stage + 1}/{len(schedule.stages)} has converged: no better score in"
        f" {_counted(evaluations, 'evaluation')}; it ends"
        f" after {schedule.steps(stage)} of {schedule.planned_steps(stage)} steps"
    )


def where(schedule: Schedule, steps: int, total: int) -> str:
    """Stage, pass and step of a training that has done so many of `total` steps."""
    place = schedule.place(max(steps - 1, 0))
    epoch = place.epoch + (place.step + 1) / place.epoch_steps
    epochs = "" if schedule.stage_steps is not None else f"/{schedule.epochs}"
    return f"stage {place.stage + 1}/{len(schedule.stages)} epoch {epoch:.2f}{epochs} step {steps}/{total}"


def training_line(place: str, logs: Mapping[str, Any]) -> str:
    """A log record of the steps since the last one; `place` is from `where`."""
    if "ce" not in logs:
        return f"{place} | every step since the last line was skipped"
    if "divergence" in logs:
        of_loss = [
            f"loss {logs['loss']:.3f}, CE {logs['ce']:.3f}, KD {logs['divergence']:.3f}",
            f"τ {logs['temperature']:.3g}, α {logs['alpha']:.3g}",
            f"agreement {100 * logs['agreement']:.0f} %",
        ]
    else:
        of_loss = [f"loss {logs['loss']:.3f}", f"accuracy {100 * logs['accuracy']:.0f} %"]
    parts = [
        place,
        *of_loss,
        f"{logs['tokens_per_second']:,.0f} tokens/s, {logs['supervised_tokens_per_second']:,.0f} of them supervised",
        f"{logs['memory_gib']:.2f} GiB",
    ]
    if "generation_share" in logs:
        parts.append(f"{100 * logs['generation_share']:.0f} % of the time generating")
    return " | ".join(parts)


def evaluation_line(place: str, logs: Mapping[str, Any]) -> str:
    """A log record of an evaluation on the dev set."""
    return (
        f"{place} | dev ROUGE-L {logs['eval_rouge_l']:.2f}, dev CE {logs['eval_cross_entropy']:.3f}"
        f" | {logs['eval_seconds']:.1f} s"
    )


def answer_line(prompt: str, answer: str) -> str:
    """A dev prompt and the student's answer."""
    return f'    "{_short(prompt, LONGEST_PROMPT)}" -> "{_short(answer, LONGEST_ANSWER)}"'


def training_table(schedule: Schedule, state: TrainingState, *, distils: bool = True) -> str:
    """A row for each stage that was begun; temperature and alpha are there where a training `distils`."""
    settings = f"{'τ':>6}{'α':>6}" if distils else ""
    lines = [f"{'stage':>5}{'samples':>9}{'steps':>7}{settings}{'loss':>9}{'best dev':>10}{'at step':>9}{'time':>8}"]
    for stage in schedule.stages[: state.stage + 1]:
        best = state.best.get(stage.index)
        score, step = ("-", "-") if best is None else (f"{best.score:.2f}", str(best.step))
        loss = f"{state.losses[stage.index]:.3f}" if stage.index in state.losses else "-"
        settings = f"{stage.temperature:>6.3g}{stage.alpha:>6.3g}" if distils else ""
        lines.append(
            f"{stage.index + 1:>5}{stage.size:>9}{schedule.steps(stage.index):>7}{settings}"
            f"{loss:>9}{score:>10}{step:>9}{minutes(state.seconds.get(stage.index, 0.0)):>8}"
        )
    return "\n".join(lines)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _short(text: str, most: int) -> str:
    """In one line, without what would move a terminal's cursor or change its colours."""
    shown = (letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
    one_line = "".join(shown)
    return one_line if len(one_line) <= most else one_line[: most - 3] + "..."
