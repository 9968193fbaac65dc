"""A transformers trainer whose loss is the fused distillation loss, or cross-entropy, over packed micro-batches.

Knows how a step is computed and how the student is scored. Does not know stages, nor which samples a step has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pocl_fast.answers import evaluation
from pocl_fast.answers.likelihood import LoadedModel
from pocl_fast.answers.sample_scores import Scores
from pocl_fast.curriculum.measured import student_engine
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.output import LossOutput
from pocl_fast.models.lm_head import LmHead, causal_lm, loss_within_forward, sparse_tied_embedding
from pocl_fast.models.parameters import num_parameters, unsharded
from pocl_fast.system.errors import InputError
from pocl_fast.system.memory import FreedMemory, memory_in_use
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.finite_steps import FiniteSteps
from pocl_fast.training.halving import Halving
from pocl_fast.training.metrics import OF_TEACHER, LossParts
from pocl_fast.training.micro_batches import MicroBatch
from pocl_fast.training.saving_trainer import SavingTrainer
from pocl_fast.training.setup import TrainingParts, sample_set

SUPERVISED = Objective(alpha=1.0)  # cross-entropy alone
SHOWN_ANSWERS = 3  # of the dev set, after each evaluation


class DistillingTrainer(SavingTrainer):
    """Computes the steps of a training on `MicroBatch`es."""

    args: PoclConfig
    objective: Objective  # of the step in progress

    def __init__(self, made: TrainingParts, args: PoclConfig, optimizers: tuple[Any, Any]) -> None:
        self.encoder, self.samples, self.dev, self.teacher = made.encoder, made.samples, made.dev, made.teacher
        self.precision, self.packed, self._router = made.precision, made.packed, made.router
        self.distils = made.distils  # whether losses compare the student with the teacher
        self.objective = args.objective()
        self.loss_parts = LossParts()
        self.finite_steps = FiniteSteps(made.samples)
        self._step_batches: list[MicroBatch] = []  # of the step in progress
        self._loss_before = torch.zeros(())  # summed up since the last log, without the step in progress
        self.evaluates_dev = False  # whether the evaluation in progress is one of the dev set
        self._answers: list[str] = []  # of the last evaluation
        self._halving = Halving()
        self._freed_memory = FreedMemory() if args.device.type == "cpu" else None
        super().__init__(
            model=made.student,
            args=args,
            train_dataset=made.samples.encoded,  # type: ignore[arg-type]  # a list is one
            eval_dataset=None if made.dev is None else made.dev.encoded,  # type: ignore[arg-type]
            processing_class=made.tokenizer,
            data_collator=lambda batches: batches[0],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # the loss is divided by the step's tokens, not by its batches

    @contextmanager
    def whole_student(self) -> Iterator[Any]:
        """The student with whole weights, in the training's precision: to generate, and to be scored."""
        with unsharded(self.model) as model, self.accelerator.autocast():
            yield model

    def begin_step(self, batches: Sequence[MicroBatch], device: torch.device) -> Tensor:
        """Before a step's first micro-batch; the step's supervised tokens on all ranks, 0-d."""
        self._step_batches = list(batches)
        tokens = torch.tensor(sum(len(batch.packed.labels) for batch in batches), device=device)
        self.loss_parts.begin_step()
        self._loss_before = self._tr_loss.clone()
        return self.accelerator.reduce(tokens) if self.args.world_size > 1 else tokens  # type: ignore[no-any-return]

    def compute_loss(  # type: ignore[override]  # its batches are MicroBatch
        self, model: nn.Module, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective over a micro-batch, divided by the tokens of the whole step."""
        batch, objective, teacher = inputs.packed.to(self.args.device), SUPERVISED, None
        if inputs.samples and self.distils:  # a rank without a sample has zeros for its part in the gradient's exchange
            assert self.teacher is not None  # else it is refused (`needed_teacher`)
            teacher = (self.teacher.live if inputs.live else self.teacher.output)(inputs.samples)
            objective = replace(self.objective, alpha=0.0) if inputs.live else self.objective
        outputs: list[LossOutput] = []

        def loss(hidden: Tensor, head: LmHead) -> Tensor:
            with self.precision.head_products(head.weight):
                output = linear_distillation_loss(
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
            outputs.append(output)
            return outputs[0].loss

        router = 0.0
        if self._router and inputs.samples:  # the batches of a step by their tokens
            router = 1.0 if num_items_in_batch is None else len(batch.labels) / num_items_in_batch
        with self.accelerator.autocast():
            value = loss_within_forward(model, batch, loss, packed=self.packed, router_weight=router)
        if not self._halving.repeating:
            self.loss_parts.add(inputs.samples, batch, outputs[0])
        value = value * self.args.world_size  # the engines average gradients over ranks
        return (value, {"per_token": outputs[0].per_token}) if return_outputs else value

    def training_step(  # type: ignore[override]  # its batches are MicroBatch
        self, model: nn.Module, inputs: MicroBatch, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of a micro-batch; in pieces from where it does not fit into memory."""
        one_process = self.args.world_size == 1 and not self.is_deepspeed_enabled
        if not inputs.samples and one_process:
            return torch.zeros((), device=self.args.device)
        whole: Any = super().training_step
        number = next(i for i, batch in enumerate(self._step_batches) if batch is inputs)

        def step(piece: MicroBatch) -> Tensor:
            sparse = sparse_tied_embedding(causal_lm(model)) if one_process else nullcontext()
            with self.precision.training(model), sparse:
                return whole(model, piece, num_items_in_batch)  # type: ignore[no-any-return]

        def clear() -> None:
            model.zero_grad()
            self.loss_parts.drop(inputs.samples)

        return self._halving.run(
            step,
            inputs,
            self._step_batches[:number],
            clear,
            ranks=self.args.world_size,
        )

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The micro-batch itself, whose tensors `compute_loss` moves."""
        return inputs

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.finite_steps.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.finite_steps.grad_norm

    def not_finite(self) -> str | None:
        """What of the step in progress is not finite, in words, before the optimizer steps; every rank must call."""
        accelerator, device = self.accelerator, self.args.device
        return self.finite_steps.check(
            self.loss_parts,
            scaled=getattr(accelerator, "scaler", None) is not None,
            on_all_ranks=(lambda flag: accelerator.gather(flag.to(device))) if self.args.world_size > 1 else None,
        )

    def skip_step(self) -> None:
        """Leaves the weights as they are at this step, and the step out of what is logged."""
        self.optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]  # nothing to step on
        self.loss_parts.forget_step()
        self._tr_loss = self._loss_before

    def count_step(self) -> None:
        """After the optimizer has stepped."""
        self.loss_parts.end_step()
        if self._freed_memory is not None:
            self._freed_memory.return_if_grown()

    def step_logs(self) -> dict[str, float]:
        """What was measured of the steps since the last call."""
        logs = self.loss_parts.means(self.accelerator.reduce if self.args.world_size > 1 else None)
        if not self.distils:
            logs = {name: value for name, value in logs.items() if name not in OF_TEACHER}
        return {**logs, "memory_gib": memory_in_use(self.args.device) / 2**30}

    def floating_point_ops(self, inputs: MicroBatch) -> int:  # type: ignore[override]
        """Training flops of a batch by the usual 6 · parameters · tokens."""
        model: Any = self.model
        return 6 * num_parameters(model) * inputs.packed.input_ids.numel()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Greedy ROUGE-L (percent) and cross-entropy (nats a token) on the dev set, or on another one."""
        args = self.args
        dev = self._evaluated_set(eval_dataset)
        start = time.perf_counter()
        self.model.eval()  # type: ignore[union-attr]
        with self.whole_student() as model:
            scores, self._answers = evaluation.dev_scores(model, dev, self.encoder, args, packed=self.packed)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - start
        self.log(dict(metrics))
        self.evaluates_dev = eval_dataset is None and metric_key_prefix == "eval"
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        self.loss_parts.pause(time.perf_counter() - start)  # tokens/s is of training alone
        return metrics

    def final_scores(self, eval_dataset: Any = None) -> tuple[Scores, list[str]]:
        """Scores of sampled answers over `eval_seeds` on the dev set, or on another one, with 95 % intervals over the
        samples, and the first seed's answers: the evaluation of the paper's tables. Call it before and after
        `train`."""
        dev = self._evaluated_set(eval_dataset)
        self.model.eval()  # type: ignore[union-attr]
        with (
            self.whole_student() as model,
            student_engine(model, self.encoder, self.args, bf16=self.precision.name == "bf16") as engine,
        ):
            scores = evaluation.evaluate(
                LoadedModel(model, self.packed),
                dev,
                self.encoder,
                seeds=self.args.eval_seeds,
                max_new_tokens=self.args.max_new_tokens,
                rouge_tokenizer=self.args.rouge_tokenizer,  # type: ignore[arg-type]  # checked by PoclConfig
                engine=engine,
            )
        return scores.summary(), [of_one[0] for of_one in scores.answers]

    def _evaluated_set(self, given: Any) -> SampleSet:
        dev = self.dev if given is None else sample_set(given, self.encoder, self.args, "eval_dataset", scored=True)
        if dev is None:
            raise InputError("there is nothing to evaluate on: give eval_dataset")
        return dev

    @property
    def dev_answers(self) -> list[tuple[str, str]]:
        """Some prompts of the dev set, and the answers of the last evaluation."""
        if self.dev is None:
            return []
        asked = [self.dev.samples[sample.index].messages[-1]["content"] for sample in self.dev.encoded[:SHOWN_ANSWERS]]
        return list(zip(asked, self._answers, strict=False))
