"""`PoclTrainer`: a transformers Trainer that distils a teacher into a student along the curriculum's stages, or
fine-tunes the student on the references alone.

Knows the stages. Does not know how a step's loss is computed, how difficulty is measured, what is printed, or what a
run directory holds besides.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback

from pocl_fast.answers.answerer import Answerer, AnswerLimits
from pocl_fast.answers.likelihood import LoadedModel
from pocl_fast.curriculum import measured
from pocl_fast.curriculum.pacing import counts_are_the_files, settled_pacing
from pocl_fast.curriculum.schedule import Place, Schedule
from pocl_fast.curriculum.stages import Curriculum, check_unmeasured, control_line, is_measured, unmeasured_curriculum
from pocl_fast.models.probing import placeable
from pocl_fast.system import ranks
from pocl_fast.system.console import say
from pocl_fast.system.errors import InputError, Interrupted
from pocl_fast.system.stop_signals import StopSignals
from pocl_fast.training import checkpoints, lines
from pocl_fast.training.arguments import PoclConfig, check_arguments
from pocl_fast.training.distilling_trainer import DistillingTrainer
from pocl_fast.training.given_teacher import measures, open_cache
from pocl_fast.training.micro_batches import MicroBatch, MicroBatches, Numbers
from pocl_fast.training.rollouts import Policy, Rollouts
from pocl_fast.training.setup import (
    check_evaluations,
    check_optimisation,
    learning_rate_factor,
    schedule_of,
    training_parts,
)
from pocl_fast.training.stage_flow import StageFlow
from pocl_fast.training.state import STATE, TrainingState


class PoclTrainer(DistillingTrainer):
    """A `transformers.Trainer` that distils a teacher into `model` on packed samples, easy to hard.

    Args:
        model: the student: a transformers causal language model, or its name (hub id, folder, GGUF file).
        teacher: a `Teacher`, a transformers model, or its name. Frozen; its hidden states are kept in `output_dir`.
            None for supervised fine-tuning: alpha 1 in every stage, and nothing else that reads a teacher. One that
            nothing needs is not loaded.
        args: `PoclConfig`.
        train_dataset: what `--train` may name (a file, a folder, hf:ORG/NAME:SPLIT), records of one of its forms (a
            list of dicts, a `datasets.Dataset`), or a `SampleSet`.
        eval_dataset: the same; greedy ROUGE-L and cross-entropy are measured on it. None: no evaluation.
        processing_class: the tokenizer, or the `SampleEncoder` that made a `SampleSet`; left out, the tokenizer of a
            model given by name.
        curriculum: the order of the samples and the stages; left out, the student's difficulty with each sample is
            measured before training, as the options say, and kept in `output_dir`.
        peft_config: a configuration of peft's, to train adapters.
        callbacks, optimizers: as in `Trainer`.

    The loss is the mean over all supervised tokens of a step: accumulated micro-batches and ranks weigh each token
    alike. `train(resume_from_checkpoint=True)` resumes from the newest undamaged checkpoint, if there is one. After
    SIGINT or SIGTERM it writes a checkpoint and raises `Interrupted`. Raises `InputError` for arguments that do not
    fit together.
    """

    def __init__(
        self,
        model: Any,
        teacher: Any,
        args: PoclConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        curriculum: Curriculum | None = None,
        peft_config: Any = None,
        callbacks: Sequence[Any] = (),
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        check_arguments(args, curriculum, callbacks, optimizers)
        if args.n_gpu > 1:  # not DataParallel: the others are for the teacher, or for one process each
            say(f"training on {args.device} of {args.n_gpu} GPUs: for all of them start with torchrun or accelerate")
            args._n_gpu = 1
        if eval_dataset is None and args.eval_strategy == "epoch":
            args.eval_strategy = "no"  # type: ignore[assignment]  # the default, which needs one
        args.pacing = settled_pacing(args.pacing, remeasure=args.remeasure, given=curriculum is not None)
        check_evaluations(args, eval_dataset)
        if args.save_only_model and args.save_strategy != "no" and ranks.is_first():
            say("save_only_model: a training that is stopped cannot go on from its checkpoints")
        check_optimisation(args)
        data = train_dataset, eval_dataset
        made = training_parts(model, teacher, args, *data, processing_class, peft_config, curriculum)
        if measures(args, curriculum):
            measured.check_measurable(made.student, made.teacher, args, args.device)
        self._curriculum = curriculum
        self.schedule: Schedule | None = None
        self.rollouts: Rollouts | None = None
        self.progress = TrainingState()
        self._by_index = {sample.index: sample for sample in made.samples.encoded}
        self._signals = StopSignals()
        super().__init__(made, args, optimizers)
        self.remove_callback(PrinterCallback)  # what these print is in the lines and the bar of StageFlow
        self.remove_callback(ProgressCallback)
        self._flow = StageFlow(self)
        self.add_callback(self._flow)
        for callback in callbacks:  # after it: they see what it adds
            self.add_callback(callback)

    # -- what a step trains on --------------------------------------------------------------------------------------

    def planned(self) -> Schedule:
        """The steps of the run; measures the difficulty first where no curriculum was given."""
        if self.schedule is not None:
            return self.schedule
        args = self.args
        if self._curriculum is None:
            self._curriculum = self._made_curriculum()
        if unknown := set(self._curriculum.order.tolist()) - set(self._by_index):
            raise InputError(f"the curriculum lists sample {min(unknown)}, which train_dataset does not have")
        if not is_measured(args):
            check_unmeasured(self._curriculum, self.samples.encoded, args, seed=args.seed)
        self.schedule = schedule_of(args, self._curriculum, self.samples.encoded)
        if counts_are_the_files(self.schedule.size, args) and ranks.is_first():
            say(lines.file_counted_line(args.curriculum, self.schedule.planned_total))
        if args.rollouts != "none":
            limits = AnswerLimits(args.max_new_tokens, args.max_length, self.encoder.end_id)
            self.rollouts = Rollouts(
                Policy.of(args), self._generate, limits, total_steps=self.schedule.planned_total, seed=args.seed
            )
        return self.schedule

    def _made_curriculum(self) -> Curriculum:
        args = self.args
        if (line := control_line(args)) and ranks.is_first():
            say(line)
        if not is_measured(args):
            return unmeasured_curriculum(self.samples.encoded, args, seed=args.seed)
        return self._measured(self.folder, measured.measured_from(self.model, self.teacher, self.samples.encoded, args))

    def _measured(self, folder: Path, made_from: str | None = None) -> Curriculum:
        """The curriculum by the difficulty for the student as it is."""
        return measured.measured_curriculum(
            self._as_measured(),
            self.teacher,
            self.samples,
            self.encoder,
            self.args,
            folder,
            bf16=self.precision.name == "bf16",
            made_from=made_from,
        )

    @contextmanager
    def _as_measured(self) -> Iterator[LoadedModel]:
        movable = placeable(self.model)  # sharded only when it trains
        with measured.as_measured(self.model, device=self.args.device, movable=movable), self.whole_student() as model:
            yield LoadedModel(model, self.packed)

    def _generate(
        self, prompts: Sequence[Sequence[int]], sample_ids: Sequence[int], seed: int
    ) -> Sequence[Sequence[int]]:
        assert self.teacher is not None  # else rollouts are refused
        with self.whole_student() as model:
            rows = self.teacher.rows.both
            return Answerer.of(model, self.encoder, self.args, temperature=1.0, rows=rows)(prompts, sample_ids, seed)

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches of the whole schedule, this rank's; not for accelerate to cut again."""
        return DataLoader(
            self._micro_batches(),
            batch_sampler=Numbers(self.planned()),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of the next step, and their supervised tokens on all ranks."""
        schedule, step = self.planned(), self.state.global_step
        if step >= schedule.total_steps:
            return [], None
        place = schedule.place(step)
        self._enter(place)
        batches: list[MicroBatch] = []
        for part in range(num_batches):
            batch = next(epoch_iterator)
            if batch.place != place:  # fetched ahead of a stage's early end
                batch = self._micro_batches()[step, part]
            batches.append(batch)
        if self.rollouts is not None:
            batches = self.rollouts.micro_batches(batches, step)
        return batches, self.begin_step(batches, device)

    def _micro_batches(self) -> MicroBatches:
        return MicroBatches(self.planned(), self._by_index, self.args.process_index)

    def _enter(self, place: Place) -> None:
        """Begins a stage where the step is its first, and sets the step's objective."""
        if place.stage != self.progress.stage:
            self._begin_stage(place.stage)
        temperature, alpha = self.planned().setting(place)
        self.objective = replace(self.objective, temperature=temperature, alpha=alpha)

    def _begin_stage(self, stage: int) -> None:
        weights = "the student as it was given"
        if self.progress.stage >= 0:
            weights = self._leave_stage(stage)
        elif self.rollouts is not None and self.rollouts.wants_first_loss:
            self.rollouts.dev_loss(self.evaluate()["eval_cross_entropy"])
        self.progress.begin(stage)
        self._flow.stage_begins(weights, max_steps=self.state.max_steps)

    def _leave_stage(self, next_stage: int) -> str:
        """Makes student, optimizer, learning rate and order ready for the next stage; says which weights it has."""
        args, stage = self.args, self.progress.stage
        self._flow.stage_done()
        weights = self._take_chosen_weights(stage)
        if args.fresh_optimizer:
            self._forget_optimizer_state()
        if args.remeasure:
            self.planned().reorder(next_stage, self._measured(self._measured_folder(next_stage)).order)
            total = self.planned().total_steps
            self.state.max_steps = min(args.max_steps, total) if args.max_steps > 0 else total
        if not self.is_deepspeed_enabled:
            self.lr_scheduler.last_epoch = self.state.global_step - 1  # type: ignore[union-attr]
            self.lr_scheduler.step()  # type: ignore[union-attr]  # it counted on the stage before going on
        return weights

    def _measured_folder(self, stage: int) -> Path:
        return self.folder / f"stage-{stage + 1}"

    @property
    def weights_choice(self) -> str:
        """Which weights of the stage before a stage starts from: "best" or "last"."""
        if self.args.stage_weights != "auto":
            return self.args.stage_weights
        return "last" if self.args.eval_strategy == "no" else "best"

    def _take_chosen_weights(self, stage: int) -> str:
        """Loads a stage's best weights where these are chosen; says which the student has."""
        best = self.progress.best.get(stage)
        if best is None or self.weights_choice != "best":
            return lines.last_weights(stage)
        self._load_weights(checkpoints.best_path(self.folder, stage, best.step))
        return lines.best_weights(stage, best.step)

    def _forget_optimizer_state(self) -> None:
        optimizer: Any = self.optimizer
        if self.is_deepspeed_enabled:
            raise InputError("DeepSpeed keeps its optimizer's state: give fresh_optimizer=False")
        getattr(optimizer, "optimizer", optimizer).state.clear()

    def _load_weights(self, path: Path) -> None:
        if self.is_deepspeed_enabled:
            raise InputError('DeepSpeed keeps its own weights: give stage_weights="last"')
        checkpoints.load_weights(self.model, path)  # type: ignore[arg-type]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate's schedule: `lr_scheduler_type` over each stage anew, or over all of them."""
        if self.lr_scheduler is None:
            inner: Any = optimizer or self.optimizer
            while hasattr(inner, "optimizer") or not isinstance(
                inner, torch.optim.Optimizer
            ):  # accelerate's, DeepSpeed's
                inner = inner.optimizer
            self.lr_scheduler = LambdaLR(inner, learning_rate_factor(self.args, self.planned()))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def check_step(self) -> None:
        """Before the optimizer steps: where the loss or the gradient is not finite the weights stay as they are, and
        the step is skipped, or `InputError` raised, as `on_nonfinite` says."""
        if (wrong := self.not_finite()) is None:
            return
        wrong += f" at stage {self.progress.stage + 1}, step {self.state.global_step + 1}"
        if self.args.on_nonfinite == "stop":
            raise InputError(
                f"{wrong}: look for damaged weights in the models, give a lower learning rate (now"
                f" {self.args.learning_rate}), or on_nonfinite=skip to leave such steps out"
            )
        self.skip_step()
        self.progress.skipped_steps += 1
        if ranks.is_first():
            say(f"{wrong}: the step is skipped ({self.progress.skipped_steps} so far)")

    def end_step(self, place: Place) -> None:
        """After an optimizer step: counts it; at the end of a pass releases the teacher's layers once every sample is
        in the cache."""
        self.count_step()
        if place.ends_epoch and self.teacher is not None:
            self.teacher.release_body_if_cached(self.samples.encoded)

    # -- what a person sees -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds to each record where it was made, and to the training loss what the kernel measured on the way."""
        if self.is_in_train and self.progress.stage >= 0 and ("loss" in logs or "eval_cross_entropy" in logs):
            logs["stage"] = self.progress.stage
            if self.distils:
                logs |= {"temperature": self.objective.temperature, "alpha": self.objective.alpha}  # type: ignore[dict-item]
        if "loss" in logs:
            logs |= self.step_logs()
            logs |= {} if self.rollouts is None else self.rollouts.logs()
            if self.progress.skipped_steps:
                logs["skipped_steps"] = self.progress.skipped_steps
        super().log(logs, *args, **kwargs)

    @property
    def scoring(self) -> bool:
        """Whether the evaluation in progress is one of the dev set in training, for choosing and stopping."""
        return self.is_in_train and self.progress.stage >= 0 and self.evaluates_dev

    def dev_scored(self, cross_entropy: float, *, is_best: bool) -> None:
        """After an evaluation of the dev set: tells the policy of rollouts, and keeps the best weights of a stage."""
        if self.rollouts is not None:
            self.rollouts.dev_loss(cross_entropy)
        if is_best and self.weights_choice == "best":
            path = checkpoints.best_path(self.folder, self.progress.stage, self.state.global_step)
            checkpoints.save_weights(self.model, path, writes=self.is_world_process_zero())  # type: ignore[arg-type]
            if self.args.save_strategy == "no" and self.is_world_process_zero():
                self.remove_old()

    # -- training, and what a stop leaves ---------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains through all stages; see the class. The student holds the last stage's chosen weights afterwards."""
        schedule = self.planned()
        self.args.max_steps = min(self.args.max_steps, schedule.total_steps)
        found = self.found_checkpoint(resume_from_checkpoint)
        if found is not None and checkpoints.step_of(found) < schedule.total_steps:
            checkpoints.check_resumable(found, self.folder)
        self._restore(found)
        if found is not None and ranks.is_first():
            say(lines.resumption_line(found, checkpoints.step_of(found), schedule.total_steps))
        with open_cache(self.teacher, self.samples.encoded if self.distils else ()), self._signals:
            result = super().train(None if found is None else str(found), *args, **kwargs)
            if self._signals.received:
                raise Interrupted(self._signals.received)
            if self.state.global_step >= schedule.total_steps:  # max_steps may end it early
                weights = self._take_chosen_weights(self.progress.stage)
                if ranks.is_first():
                    say(lines.training_done_line(weights, self.state.global_step))
        return result

    def _restore(self, checkpoint: Path | None) -> None:
        """Sets schedule and state to those of a checkpoint, or of the start."""
        schedule = self.planned()
        if checkpoint is None and self.args.remeasure and ranks.is_first():  # of an earlier training
            for later in schedule.stages[1:]:
                shutil.rmtree(self._measured_folder(later.index), ignore_errors=True)
        ranks.barrier()
        self.progress = TrainingState() if checkpoint is None else TrainingState.read(checkpoint / STATE)
        if checkpoint is not None:
            self.progress.check_plan(schedule.identity(), checkpoint)
        schedule.ended = dict(self.progress.ended)
        if self.rollouts is not None and self.progress.rollouts:
            self.rollouts.load_state_dict(self.progress.rollouts)
        for stage in range(1, self.progress.stage + 1 if self.args.remeasure else 0):
            schedule.reorder(stage, self._measured(self._measured_folder(stage)).order)

    def before_saving(self) -> None:
        """Writes what the teacher's cache has in memory: a training that resumes then computes in the same batches."""
        if self.teacher is not None:
            self.teacher.cache.flush()

    def write_state(self, checkpoint: Path) -> None:
        """Adds the training's state."""
        self.progress.ended = dict(self.planned().ended)
        self.progress.plan = self.planned().identity()
        if self.rollouts is not None:
            self.progress.rollouts = self.rollouts.state_dict()
        self.progress.write(checkpoint / STATE)

    def remove_old(self) -> None:
        """Deletes old checkpoints, and weights that are the best of no stage, now or at a checkpoint that stays."""
        super().remove_old()
        states = [found / STATE for found in checkpoints.checkpoints(self.folder)]
        kept = [self.progress, *(TrainingState.read(state) for state in states if state.is_file())]
        best = {checkpoints.best_path(self.folder, stage, b.step) for p in kept for stage, b in p.best.items()}
        checkpoints.remove_other_weights(self.folder, best)

    def stop_asked(self) -> bool:
        """Whether a signal asked this or another rank to stop."""
        if self.args.world_size > 1:
            flag = torch.tensor([self._signals.received], device=self.args.device)
            self._signals.received = int(self.accelerator.gather(flag).max())
        return self._signals.received > 0
