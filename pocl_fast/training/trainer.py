"""`PoclTrainer`: a transformers Trainer whose loss is the fused distillation loss, along the curriculum's stages.

Knows the optimisation. Does not know how difficulty was measured, or what a run directory holds besides.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback

from pocl_fast.answers.evaluation import dev_scores
from pocl_fast.curriculum.schedule import Place, Schedule
from pocl_fast.curriculum.stages import Curriculum
from pocl_fast.data.packed import PackedBatch, packing_ready
from pocl_fast.data.records import SampleEncoder
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.output import LossOutput
from pocl_fast.models import loading
from pocl_fast.models.cut import num_parameters
from pocl_fast.models.lm_head import LmHead, causal_lm, loss_within_forward
from pocl_fast.models.unsharded import gathered
from pocl_fast.system import ranks
from pocl_fast.system.console import say
from pocl_fast.system.errors import InputError, Interrupted
from pocl_fast.system.stop_signals import Signals
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training import checkpoints
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.finite_steps import FiniteSteps
from pocl_fast.training.halving import FreedMemory, Halving, memory_in_use
from pocl_fast.training.metrics import LossParts
from pocl_fast.training.micro_batches import MicroBatch, MicroBatches, Numbers
from pocl_fast.training.on_policy import OnPolicy
from pocl_fast.training.saving_trainer import SavingTrainer
from pocl_fast.training.setup import (
    answered_by_teacher,
    check_lengths,
    learning_rate_factor,
    measured_curriculum,
    measured_from,
    sample_set,
    schedule_of,
    student_of,
    teacher_of,
)
from pocl_fast.training.stage_flow import SHOWN_ANSWERS, Progress, StageFlow

STATE = "pocl_state.json"  # of a checkpoint


class PoclTrainer(SavingTrainer):
    """A `transformers.Trainer` that distils a teacher into `model` on packed samples, easy to hard.

    Args:
        model: the student: a transformers causal language model, or its name (hub id, folder, GGUF file).
        teacher: a `Teacher`, a transformers model, or its name. Frozen; its hidden states are kept in `output_dir`.
        args: `PoclConfig`.
        train_dataset: a path of JSON Lines, records of one of its formats (a list of dicts, a `datasets.Dataset`), or
            a `SampleSet`.
        eval_dataset: the same; greedy ROUGE-L and cross-entropy are measured on it. None: no evaluation.
        processing_class: the tokenizer; left out, that of a model given by name.
        curriculum: the order of the samples and the stages; left out, the difficulty is measured by the student before
            training, and the measurement kept in `output_dir`.
        peft_config: of peft, to train adapters.
        callbacks, optimizers: as in `Trainer`.

    The loss is the mean over all supervised tokens of a step: accumulated micro-batches and ranks weigh each token
    alike. `train(resume_from_checkpoint=True)` goes on from the newest whole checkpoint, if there is one. After SIGINT
    or SIGTERM a checkpoint is written and `Interrupted` raised. Raises `InputError` for what does not fit together.
    """

    args: PoclConfig
    objective: Objective  # of the step in progress

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
        if args.n_gpu > 1:  # not DataParallel: the others are for the teacher, or for one process each
            say(f"training on {args.device} of {args.n_gpu} GPUs: for all of them start with torchrun or accelerate")
            args._n_gpu = 1
        if eval_dataset is None and args.eval_strategy == "epoch":
            args.eval_strategy = "no"  # type: ignore[assignment]  # the default, which needs one
        if args.rollouts == "adaptive" and args.eval_strategy == "no":
            raise InputError('rollouts="adaptive" follows the dev loss: give eval_dataset and eval_strategy')
        if args.stage_weights == "best" and args.eval_strategy == "no":
            raise InputError('stage_weights="best" needs evaluations: give eval_dataset and eval_strategy')
        self.precision = loading.choose_precision("fp32" if args.fp16 else args.precision, args.device)
        model, processing_class = student_of(model, processing_class, peft_config, args)
        self.encoder = SampleEncoder(processing_class, args.template)  # type: ignore[arg-type]  # a choice of these
        self.samples = sample_set(train_dataset, self.encoder, args, "train_dataset")
        self.dev = None if eval_dataset is None else sample_set(eval_dataset, self.encoder, args, "eval_dataset")
        first_says = say if ranks.is_first() else lambda _: None
        half = torch.autocast(args.device.type, dtype=torch.float16) if args.fp16 else self.precision.autocast()
        with half:
            self.packed = packing_ready(causal_lm(model), first_says, device=args.device, trains=True)
        self.teacher: Teacher = teacher_of(teacher, processing_class, args, self.precision, self.samples)
        check_lengths(model, self.teacher, args, self.samples, self.dev)
        if args.data_source == "teacher":
            self.samples = answered_by_teacher(
                self.samples,
                self.teacher.model,
                self.encoder,
                Path(str(args.output_dir)) / "teacher_answers",
                fingerprint=self.teacher.fingerprint,
                options=args,
            )
        self._curriculum = curriculum
        self.on_policy: OnPolicy | None = None
        self.schedule: Schedule | None = None
        self.progress = Progress()
        self.objective = self._first_objective = args.objective()
        self.dev_answers: list[str] = []
        self._by_index = {sample.index: sample for sample in self.samples.encoded}
        self.loss_parts = LossParts()
        self._halving = Halving()
        self._freed_memory = FreedMemory() if args.device.type == "cpu" else None
        self._step_batches: list[MicroBatch] = []  # of the step in progress
        self.finite_steps = FiniteSteps(self)
        self._signals = Signals()
        self.scoring = False  # whether an evaluation in progress is one of the dev set, for choosing and stopping
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.samples.encoded,  # type: ignore[arg-type]  # a list is one
            eval_dataset=None if self.dev is None else self.dev.encoded,  # type: ignore[arg-type]
            processing_class=processing_class,
            data_collator=lambda batches: batches[0],
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)  # what these print is in the lines and the bar of StageFlow
        self.remove_callback(ProgressCallback)
        self._flow = StageFlow(self)
        self.add_callback(self._flow)
        for callback in callbacks:  # after it: they see what it adds
            self.add_callback(callback)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the step's tokens, not by its batches

    # -- what a step trains on --------------------------------------------------------------------------------------

    def planned(self) -> Schedule:
        """The steps of the run; measures the difficulty first where no curriculum was given."""
        if self.schedule is None:
            if self._curriculum is None:
                made_from = None if self.args.curriculum == "none" else measured_from(self)
                self._curriculum = measured_curriculum(self, self.folder, made_from=made_from)
            if unknown := set(self._curriculum.order.tolist()) - set(self._by_index):
                raise InputError(f"the curriculum lists sample {min(unknown)}, which train_dataset does not have")
            self.schedule = schedule_of(self.args, self._curriculum, self.samples.encoded)
            if self.args.rollouts != "none":
                self.on_policy = OnPolicy(self)
        return self.schedule

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
        batches = []
        for part in range(num_batches):
            inputs = next(epoch_iterator)
            if inputs["place"] != place:  # fetched ahead of a stage's early end
                inputs = self._micro_batches()[step, part]
            batches.append(inputs)
        if self.on_policy is not None:
            batches = self.on_policy.batches(batches, step)
        self._step_batches = batches
        tokens = torch.tensor(sum(len(inputs["packed"].labels) for inputs in batches), device=device)
        self.loss_parts.begin_step()
        self.finite_steps.begin_step()
        return batches, self.accelerator.reduce(tokens) if self.args.world_size > 1 else tokens

    def _micro_batches(self) -> MicroBatches:
        return MicroBatches(self.planned(), self._by_index, self.args.process_index)

    def _enter(self, place: Place) -> None:
        """Begins a stage where the step is its first, and sets the step's objective."""
        if place.stage != self.progress.stage:
            self._begin_stage(place.stage)
        temperature, alpha = self.planned().setting(place)
        self.objective = replace(self._first_objective, temperature=temperature, alpha=alpha)

    def _begin_stage(self, stage: int) -> None:
        args, before = self.args, self.progress.stage
        if before >= 0:
            self._flow.say_stages()
            if self.weights_choice == "best" and (best := self.progress.best.get(before)):
                self._load_weights(checkpoints.best_path(self.folder, before, best.step))
            if args.fresh_optimizer:
                self._forget_optimizer_state()
            if args.remeasure:
                self.planned().reorder(stage, measured_curriculum(self, self.folder / f"stage-{stage + 1}").order)
                total = self.planned().total_steps
                self.state.max_steps = min(args.max_steps, total) if args.max_steps > 0 else total
            if not self.is_deepspeed_enabled:
                self.lr_scheduler.last_epoch = self.state.global_step - 1  # type: ignore[union-attr]
                self.lr_scheduler.step()  # type: ignore[union-attr]  # it counted on the stage before going on
        if before < 0 and self.on_policy is not None and self.on_policy.wants_first_loss:
            self.on_policy.rollouts.dev_loss(self.evaluate()["eval_cross_entropy"])
        self.progress.begin(stage)

    @property
    def weights_choice(self) -> str:
        """From which weights of the stage before a stage starts: "best" or "last"."""
        if self.args.stage_weights != "auto":
            return self.args.stage_weights
        return "last" if self.args.eval_strategy == "no" else "best"

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
            while not isinstance(inner, torch.optim.Optimizer) or hasattr(
                inner, "optimizer"
            ):  # accelerate's, an engine's
                inner = inner.optimizer
            self.lr_scheduler = LambdaLR(inner, learning_rate_factor(self.args, self.planned()))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- the loss ---------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective over a micro-batch, divided by the tokens of the whole step."""
        batch: PackedBatch = inputs["packed"].to(self.args.device)
        objective, teacher = self.objective, None
        if inputs["samples"]:
            teacher = (self.teacher.live if inputs["live"] else self.teacher.output)(inputs["samples"])
        if inputs["live"]:
            objective = replace(objective, alpha=0.0)
        if teacher is None:  # no sample was left for this rank, whose part in the gradient's exchange is zeros
            objective = replace(objective, alpha=1.0)
        outputs: list[LossOutput] = []

        def loss(hidden: Tensor, head: LmHead) -> Tensor:
            outputs.append(
                linear_distillation_loss(
                    hidden,
                    head.weight,
                    teacher,
                    batch.labels,
                    objective,
                    student_bias=head.bias,
                    num_items=num_items_in_batch,
                    logit_scale=head.logit_scale,
                    logit_softcap=head.logit_softcap,
                )
            )
            return outputs[0].loss

        with self.accelerator.autocast():
            value = loss_within_forward(model, batch, loss, packed=self.packed)
        if not self._halving.repeating:
            self.loss_parts.add(inputs["samples"], batch, outputs[0])
        value = value * self.args.world_size  # the engines average gradients over ranks
        return (value, {"per_token": outputs[0].per_token}) if return_outputs else value

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch; in pieces from where it does not fit into memory."""
        if not inputs["samples"] and self.args.world_size == 1 and not self.is_deepspeed_enabled:
            return torch.zeros((), device=self.args.device)
        step = super().training_step
        number = next(i for i, batch in enumerate(self._step_batches) if batch is inputs)

        def clear() -> None:
            model.zero_grad()
            self.loss_parts.drop(inputs["samples"])

        return self._halving.run(
            lambda piece: step(model, piece, num_items_in_batch),
            inputs,
            self._step_batches[:number],
            clear,
            ranks=self.args.world_size,
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.finite_steps.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.finite_steps.grad_norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Training flops of a batch by the usual 6 · parameters · tokens."""
        model: Any = self.model
        return 6 * num_parameters(model) * inputs["packed"].input_ids.numel()

    # -- what a person sees -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds to each record where it was made, and to the training loss what the kernel measured on the way."""
        if self.is_in_train and self.progress.stage >= 0 and ("loss" in logs or "eval_cross_entropy" in logs):
            logs |= {"stage": self.progress.stage, "temperature": self.objective.temperature}  # type: ignore[dict-item]
            logs |= {"alpha": self.objective.alpha}  # type: ignore[dict-item]
        if "loss" in logs:
            logs |= self.loss_parts.means(self.accelerator.reduce if self.args.world_size > 1 else None)
            logs["memory_gib"] = memory_in_use(self.args.device) / 2**30
            logs |= {} if self.on_policy is None else self.on_policy.logs()
            if self.progress.skipped_steps:
                logs["skipped_steps"] = self.progress.skipped_steps
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Greedy ROUGE-L (percent) and cross-entropy (nats a token) on the dev set, or on another one."""
        args = self.args
        dev = self.dev if eval_dataset is None else sample_set(eval_dataset, self.encoder, args, "eval_dataset")
        if dev is None:
            raise InputError("there is nothing to evaluate on: give eval_dataset")
        start = time.perf_counter()
        self.model.eval()  # type: ignore[union-attr]
        with gathered(self.model) as model, self.accelerator.autocast():
            scores, answers = dev_scores(model, dev, self.encoder, args, packed=self.packed)
        self.dev_answers = answers[:SHOWN_ANSWERS]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - start
        self.log(dict(metrics))
        self.scoring = eval_dataset is None and metric_key_prefix == "eval"
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        self.loss_parts.pause(time.perf_counter() - start)  # tokens/s is of training alone
        return metrics

    # -- training, and what a stop leaves ---------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains through all stages; see the class. The student holds the last stage's chosen weights afterwards."""
        schedule = self.planned()
        self.args.max_steps = min(self.args.max_steps, schedule.total_steps)
        found = self.found_checkpoint(resume_from_checkpoint)
        self._restore(found)
        self.teacher.cache.reserve(self.samples.encoded)
        with self.teacher.cache, self._signals:
            result = super().train(None if found is None else str(found), *args, **kwargs)
            finished = self.state.global_step >= schedule.total_steps
            if self._signals.received:
                raise Interrupted(self._signals.received)
            best = self.progress.best.get(self.progress.stage)
            if finished and best is not None and self.weights_choice == "best":
                self._load_weights(checkpoints.best_path(self.folder, self.progress.stage, best.step))
        return result

    def _restore(self, checkpoint: Path | None) -> None:
        """The schedule and the progress as they were at a checkpoint, or at the start."""
        schedule = self.planned()
        if checkpoint is None and self.args.remeasure and ranks.is_first():  # of an earlier training
            for later in schedule.stages[1:]:
                shutil.rmtree(self.folder / f"stage-{later.index + 1}", ignore_errors=True)
        ranks.barrier()
        self.progress = Progress() if checkpoint is None else Progress.read(checkpoint / STATE)
        if checkpoint is not None:
            self.progress.check_plan(schedule.identity(), checkpoint)
        schedule.ended = dict(self.progress.ended)
        if self.on_policy is not None and self.progress.rollouts:
            self.on_policy.rollouts.load_state_dict(self.progress.rollouts)
        for stage in range(1, self.progress.stage + 1 if self.args.remeasure else 0):
            schedule.reorder(stage, measured_curriculum(self, self.folder / f"stage-{stage + 1}").order)

    def before_saving(self) -> None:
        """So that going on from the checkpoint finds the cache as it is, and computes in the same batches."""
        self.teacher.cache.flush()

    def write_state(self, checkpoint: Path) -> None:
        """How far the training is."""
        self.progress.ended = dict(self.planned().ended)
        self.progress.plan = self.planned().identity()
        if self.on_policy is not None:
            self.progress.rollouts = self.on_policy.rollouts.state_dict()
        self.progress.write(checkpoint / STATE)

    def remove_old(self) -> None:
        """But for the newest checkpoints, and the stages' best weights now and at those."""
        super().remove_old()
        states = [found / STATE for found in checkpoints.checkpoints(self.folder)]
        kept = [self.progress, *(Progress.read(state) for state in states if state.is_file())]
        best = {checkpoints.best_path(self.folder, stage, b.step) for p in kept for stage, b in p.best.items()}
        checkpoints.remove_other_weights(self.folder, best)

    def keep_best(self) -> None:
        """Writes the weights as the best of the running stage."""
        path = checkpoints.best_path(self.folder, self.progress.stage, self.state.global_step)
        checkpoints.save_weights(self.model, path, writes=self.is_world_process_zero())  # type: ignore[arg-type]
        if self.args.save_strategy == "no" and self.is_world_process_zero():
            self.remove_old()

    def stop_asked(self) -> bool:
        """Whether a signal asked this or another rank to stop."""
        if self.args.world_size > 1:
            flag = torch.tensor([self._signals.received], device=self.args.device)
            self._signals.received = int(self.accelerator.gather(flag).max())
        return self._signals.received > 0

    def end_step(self, place: Place) -> None:
        """After an optimizer step: counts it; at the end of a pass lets go of the teacher's body once every sample is
        in the cache."""
        self.loss_parts.end_step()
        if self._freed_memory is not None:
            self._freed_memory.return_if_grown()
        if place.ends_epoch:
            self.teacher.release_body_if_cached(self.samples.encoded)
