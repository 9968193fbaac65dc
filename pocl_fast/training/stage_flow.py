"""What happens around the steps of a training in stages: evaluation and checkpoints at the ends of passes, the stage's
best weights, its end on convergence, orderly stops; and when which line of all that is printed.

Knows when. Does not know how a step is computed, nor the texts (see `lines`).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm
from transformers import TrainerCallback

from pocl_fast.curriculum.schedule import Place, Schedule
from pocl_fast.system import ranks
from pocl_fast.system.console import progress_bar, say
from pocl_fast.system.errors import InputError
from pocl_fast.training import lines
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.metrics import MetricsLog
from pocl_fast.training.state import TrainingState


class StagedTrainer(Protocol):
    """What the flow needs of a trainer."""

    args: PoclConfig
    progress: TrainingState
    distils: bool  # whether losses compare the student with a teacher

    @property
    def scoring(self) -> bool:
        """Whether the evaluation in progress is one of the dev set in training, for choosing and stopping."""
        ...

    @property
    def dev_answers(self) -> Sequence[tuple[str, str]]:
        """Some prompts of the dev set, and the answers of the last evaluation."""
        ...

    def planned(self) -> Schedule:
        """The steps of the training."""
        ...

    def check_step(self) -> None:
        """Called before the optimizer steps."""
        ...

    def end_step(self, place: Place) -> None:
        """Called after each step."""
        ...

    def stop_asked(self) -> bool:
        """Whether a signal asked for a stop."""
        ...

    def dev_scored(self, cross_entropy: float, *, is_best: bool) -> None:
        """Called after an evaluation on the dev set; `is_best` of its stage."""
        ...


class StageFlow(TrainerCallback):
    """Follows a `PoclTrainer`; see the module."""

    def __init__(self, trainer: StagedTrainer) -> None:
        self.trainer = trainer
        self.saved = self.since = time.monotonic()
        self.bar: tqdm | None = None

    # -- the flow ---------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = self.since = time.monotonic()
        total = self.trainer.planned().total_steps
        state.max_steps = min(args.max_steps, total) if args.max_steps > 0 else total
        self._say(lines.legend(args.divergence if self.trainer.distils else None))
        if state.is_world_process_zero:
            self.bar = progress_bar(state.max_steps, "train", "steps", done=state.global_step)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.check_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        place = trainer.planned().place(state.global_step - 1)
        trainer.end_step(place)
        state.epoch = place.passes
        self._count_time()
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
        if not trainer.scoring:
            return
        self._count_time()
        metrics = given["metrics"]
        is_best = progress.evaluated(
            metrics[_full(args.metric_for_best_model)],
            state.global_step,
            metrics["eval_cross_entropy"],
            greater_is_better=args.greater_is_better,
        )
        trainer.dev_scored(metrics["eval_cross_entropy"], is_best=is_best)
        for prompt, answer in trainer.dev_answers:
            self._say(lines.answer_line(prompt, answer))
        if args.patience is not None and progress.evaluations_since_best >= args.patience:
            self._end_stage(state, control)

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
        self._say(lines.converged_line(schedule, stage, self.trainer.progress.evaluations_since_best))

    def on_save(self, *_: Any, **__: Any) -> None:
        self.saved = time.monotonic()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # of transformers' one pass over the whole schedule: what it asks for was done at the last step
        control.should_evaluate = control.should_save = control.should_log = False

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._say(lines.training_table(self.trainer.planned(), self.trainer.progress, distils=self.trainer.distils))
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _count_time(self) -> None:
        now = time.monotonic()
        self.trainer.progress.add_seconds(now - self.since)
        self.since = now

    # -- what a person sees -----------------------------------------------------------------------------------------

    def stage_done(self) -> None:
        """Says what came out of the running stage."""
        metric = _full(self.trainer.args.metric_for_best_model)
        self._say(lines.stage_done_line(self.trainer.planned(), self.trainer.progress, metric))

    def stage_begins(self, weights: str, *, max_steps: int) -> None:
        """Says that the running stage begins from these weights; the training has `max_steps` from here on."""
        if self.bar is not None:
            self.bar.total = max_steps
        trainer = self.trainer
        begins = lines.stage_begins_line(
            trainer.planned(), trainer.progress.stage, weights=weights, distils=trainer.distils
        )
        self._say(begins)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "stage" not in logs:
            return
        progress = self.trainer.progress
        place = lines.where(self.trainer.planned(), state.global_step, state.max_steps)
        if "loss" in logs:
            progress.losses[progress.stage] = logs["loss"]
            self._say(lines.training_line(place, logs))
            if self.bar is not None:
                self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=sys.stderr.isatty())
        elif "eval_cross_entropy" in logs:
            if not math.isfinite(logs["eval_cross_entropy"]):
                raise InputError(
                    f"the dev cross-entropy is {logs['eval_cross_entropy']} at stage {progress.stage + 1}, step"
                    f" {state.global_step}: look for damaged weights in the models, or give a lower learning rate"
                    f" (now {args.learning_rate}) and start again"
                )
            self._say(lines.evaluation_line(place, logs))

    def _say(self, text: str) -> None:
        if ranks.is_first():
            say(text)


class MetricsFile(TrainerCallback):
    """Writes metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self.log = MetricsLog(path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.log.rewind(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "stage" in logs:
            self.log.write({"step": state.global_step, **logs})


def _full(metric: str | None) -> str:
    name = metric or "eval_rouge_l"
    return name if name.startswith("eval_") else f"eval_{name}"
