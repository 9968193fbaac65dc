"""What happens around the steps of a training in stages: evaluation and checkpoints at the ends of passes, the stage's
best weights, its end on convergence, orderly stops, and what a person sees of all that."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import TrainerCallback

from pocl_fast.system.console import progress_bar, say
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_json
from pocl_fast.training.metrics import MetricsLog

if TYPE_CHECKING:
    from pocl_fast.training.trainer import PoclTrainer

SHOWN_ANSWERS = 3
LONGEST_SHOWN = 100  # characters of an answer


@dataclass
class Best:
    """A stage's best evaluation."""

    score: float
    step: int  # optimizer steps done


@dataclass
class Progress:
    """How far a training is, beyond what a transformers trainer knows: part of each checkpoint."""

    stage: int = -1  # the running one
    best: dict[int, Best] = field(default_factory=dict)  # by stage
    ended: dict[int, int] = field(default_factory=dict)  # stage -> steps after which it was ended early
    evaluations_since_best: int = 0
    skipped_steps: int = 0  # whose loss or gradient was not finite
    seconds: dict[int, float] = field(default_factory=dict)  # of training and evaluation, by stage
    losses: dict[int, float] = field(default_factory=dict)  # the last logged, by stage
    rollouts: dict[str, Any] = field(default_factory=dict)  # of the student's own answers
    plan: dict[str, Any] = field(default_factory=dict)  # `Schedule.identity` of what a step's number means

    def begin(self, stage: int) -> None:
        self.stage, self.evaluations_since_best = stage, 0

    def check_plan(self, plan: dict[str, Any], checkpoint: Path) -> None:
        """Raises `InputError` where a step's number means something else than it did at the checkpoint."""
        for name, value in plan.items():
            if (before := self.plan.get(name)) != value:
                raise InputError(
                    f"checkpoint {checkpoint} is of another schedule ({name}: {before} there, {value} here): give the"
                    " settings it was made with, or another output_dir"
                )

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Progress:
        record = json.loads(path.read_text(encoding="utf-8"))
        for name in ("best", "ended", "seconds", "losses"):
            record[name] = {int(stage): value for stage, value in record[name].items()}
        record["best"] = {stage: Best(**best) for stage, best in record["best"].items()}
        return cls(**record)


class StageFlow(TrainerCallback):
    """Follows a `PoclTrainer`; see the module."""

    def __init__(self, trainer: PoclTrainer) -> None:
        self.trainer = trainer
        self.saved = self.since = time.monotonic()
        self.bar: tqdm | None = None

    # -- the flow ---------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = self.since = time.monotonic()
        total = self.trainer.planned().total_steps
        state.max_steps = min(args.max_steps, total) if args.max_steps > 0 else total
        if state.is_world_process_zero:
            self.bar = progress_bar(state.max_steps, "train", "steps", done=state.global_step)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.finite_steps.check()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        place = trainer.planned().place(state.global_step - 1)
        trainer.end_step(place)
        state.epoch = place.passes
        self._count_time(place.stage)
        if self.bar is not None:
            self.bar.update(1)
        if place.ends_epoch and args.eval_strategy == "epoch":
            control.should_evaluate = True
        if place.ends_epoch and args.save_strategy == "epoch":
            control.should_save = True
        stop = trainer.stop_asked()
        if stop or place.ends_stage or time.monotonic() - self.saved > 60 * args.save_minutes:
            control.should_save |= args.save_strategy != "no"
        control.should_training_stop |= stop
        control.should_log |= control.should_save or control.should_evaluate

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        trainer, progress = self.trainer, self.trainer.progress
        if not trainer.is_in_train or progress.stage < 0 or not trainer.scoring:
            return
        self._count_time(progress.stage)
        if trainer.on_policy is not None:
            trainer.on_policy.rollouts.dev_loss(given["metrics"]["eval_cross_entropy"])
        score, sign = given["metrics"][_full(args.metric_for_best_model)], 1 if args.greater_is_better else -1
        best = progress.best.get(progress.stage)
        if best is None or sign * score > sign * best.score:
            progress.best[progress.stage] = Best(score, state.global_step)
            progress.evaluations_since_best = 0
            if trainer.weights_choice == "best":
                trainer.keep_best()
        else:
            progress.evaluations_since_best += 1
        if args.patience is not None and progress.evaluations_since_best >= args.patience:
            self._end_stage(state, control)
        self._say_answers()

    def _end_stage(self, state: Any, control: Any) -> None:
        """Ends the running stage on convergence."""
        schedule, stage = self.trainer.planned(), self.trainer.progress.stage
        place = schedule.place(state.global_step - 1)
        if place.ends_stage:
            return
        schedule.end_stage(stage, place.step_in_stage + 1)
        state.max_steps = min(state.max_steps, schedule.total_steps)
        control.should_training_stop |= state.global_step >= state.max_steps
        control.should_save |= self.trainer.args.save_strategy != "no"
        if self.bar is not None:
            self.bar.total = state.max_steps
        self._say(f"stage {stage + 1} has converged: no better score in {self.trainer.args.patience} evaluations")

    def on_save(self, *_: Any, **__: Any) -> None:
        self.saved = time.monotonic()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # of transformers' one pass over the whole schedule: what it asks for was done at the last step
        control.should_evaluate = control.should_save = control.should_log = False

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.say_stages()
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _count_time(self, stage: int) -> None:
        now = time.monotonic()
        seconds = self.trainer.progress.seconds
        seconds[stage] = seconds.get(stage, 0.0) + now - self.since
        self.since = now

    # -- what a person sees -----------------------------------------------------------------------------------------

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        progress = self.trainer.progress
        if "loss" in logs and "stage" in logs:
            progress.losses[progress.stage] = logs["loss"]
            self._say(self._line(state, logs))
            if self.bar is not None:
                self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=sys.stderr.isatty())
        elif "eval_cross_entropy" in logs and "stage" in logs:
            if not math.isfinite(logs["eval_cross_entropy"]):
                raise InputError(
                    f"the dev cross-entropy is {logs['eval_cross_entropy']} at stage {progress.stage + 1}, step"
                    f" {state.global_step}: look for damaged weights in the models, or give a lower learning rate"
                    f" (now {args.learning_rate}) and start again"
                )
            self._say(
                f"{self._where(state)} | dev ROUGE-L {logs['eval_rouge_l']:.2f}, dev CE"
                f" {logs['eval_cross_entropy']:.3f} | {logs['eval_seconds']:.1f} s"
            )

    def _where(self, state: Any) -> str:
        schedule = self.trainer.planned()
        place = schedule.place(max(state.global_step - 1, 0))
        epoch = place.epoch + (place.step + 1) / place.epoch_steps
        return f"stage {place.stage + 1}/{len(schedule.stages)} epoch {epoch:.2f} step {state.global_step}"

    def _line(self, state: Any, logs: dict[str, Any]) -> str:
        if "ce" not in logs:
            return f"{self._where(state)} | every step since the last line was skipped"
        parts = [
            self._where(state),
            f"loss {logs['loss']:.3f} CE {logs['ce']:.3f} KD {logs['divergence']:.3f}",
            f"τ {logs['temperature']:.3g} α {logs['alpha']:.3g}",
            f"agreement {100 * logs['agreement']:.0f} %",
            f"{logs['tokens_per_second']:,.0f} tok/s, {logs['supervised_tokens_per_second']:,.0f} supervised",
            f"{logs['memory_gib']:.2f} GiB",
        ]
        if "generation_share" in logs:
            parts.append(f"{100 * logs['generation_share']:.0f} % of the time generating")
        return " | ".join(parts)

    def _say_answers(self) -> None:
        trainer = self.trainer
        for sample, answer in zip(trainer.dev.encoded if trainer.dev else (), trainer.dev_answers, strict=False):
            prompt = trainer.dev.samples[sample.index].messages[-1]["content"]  # type: ignore[union-attr]
            self._say(f"    {_short(prompt, LONGEST_SHOWN // 2)} -> {_short(answer, LONGEST_SHOWN)}")

    def say_stages(self) -> None:
        """The table of the stages so far."""
        self._say(stage_table(self.trainer))

    def _say(self, text: str) -> None:
        if self.trainer.is_world_process_zero():
            say(text)


class MetricsFile(TrainerCallback):
    """Keeps metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self.log = MetricsLog(path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.log.rewind(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "stage" in logs:
            self.log.write({"step": state.global_step, **logs})


def stage_table(trainer: PoclTrainer) -> str:
    """A row for each stage that was begun."""
    schedule, progress = trainer.planned(), trainer.progress
    lines = [
        f"{'stage':>5}{'samples':>9}{'steps':>7}{'τ':>6}{'α':>6}{'loss':>9}{'best dev':>10}{'at step':>9}{'time':>8}"
    ]
    for stage in schedule.stages[: progress.stage + 1]:
        best = progress.best.get(stage.index)
        score, step = ("-", "-") if best is None else (f"{best.score:.2f}", str(best.step))
        loss = f"{progress.losses[stage.index]:.3f}" if stage.index in progress.losses else "-"
        seconds = round(progress.seconds.get(stage.index, 0.0))
        lines.append(
            f"{stage.index + 1:>5}{stage.size:>9}{schedule.steps(stage.index):>7}{stage.temperature:>6.3g}"
            f"{stage.alpha:>6.3g}{loss:>9}{score:>10}{step:>9}{seconds // 60:>5}:{seconds % 60:02}"
        )
    return "\n".join(lines)


def _full(metric: str | None) -> str:
    name = metric or "eval_rouge_l"
    return name if name.startswith("eval_") else f"eval_{name}"


def _short(text: str, most: int) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= most else one_line[: most - 3] + "..."
