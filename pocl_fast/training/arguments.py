"""`PoclConfig`: transformers' `TrainingArguments` with the options of distillation along a curriculum.

Knows which arguments go together. Does not declare options: `pocl_fast.options` does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from pocl_fast.curriculum.signals import teacher_columns, top_k_lacks
from pocl_fast.curriculum.stages import Curriculum, is_measured
from pocl_fast.cutting.layer_choice import check_choice
from pocl_fast.inputs.adapters import check_options
from pocl_fast.loss.objective import Objective
from pocl_fast.models.placement import choose_device
from pocl_fast.models.precision import Precision
from pocl_fast.options.answers import DifficultyOptions, EvaluationOptions, GenerationOptions
from pocl_fast.options.data import AdapterOptions, DataOptions, ModelOptions
from pocl_fast.options.declaring import option_name
from pocl_fast.options.presets import PRESETS
from pocl_fast.options.run import RunConfig
from pocl_fast.options.training import (
    CacheOptions,
    LoggingOptions,
    LossOptions,
    OptimisationOptions,
    RolloutOptions,
    ScheduleOptions,
    StageOptions,
)
from pocl_fast.records.forms import check_names
from pocl_fast.system.errors import InputError
from pocl_fast.system.typed_values import did_you_mean, hints_of, typed

COMPILED_ANEW = "each packed batch has lengths of its own, for which it would be compiled again"
EVALUATES_ANSWERS = "an evaluation generates answers: give generation_batch_size or generation_batch_tokens"
BATCHES_OF_THE_SCHEDULE = "the schedule makes the batches: give batch_size or tokens_per_batch"
# arguments of transformers that would do nothing here, or harm
NOT_HERE = {
    "load_best_model_at_end": 'stage_weights="best" is that, and also holds between stages',
    "label_smoothing_factor": "its loss is the objective's",
    "include_num_input_tokens_seen": "tokens/s are logged",
    "auto_find_batch_size": "a batch that does not fit is halved by itself",
    "neftune_noise_alpha": "its size would be that of the packed row, not of a sample",
    "torch_compile": COMPILED_ANEW,
    "torch_compile_backend": COMPILED_ANEW,
    "torch_compile_mode": COMPILED_ANEW,
    "eval_delay": "give eval_strategy and eval_steps",
    "per_device_eval_batch_size": EVALUATES_ANSWERS,
    "eval_accumulation_steps": EVALUATES_ANSWERS,
    "batch_eval_metrics": EVALUATES_ANSWERS,
    "prediction_loss_only": EVALUATES_ANSWERS,
    "include_for_metrics": EVALUATES_ANSWERS,
    "label_names": "its batches are packed rows with labels of their own",
    "train_sampling_strategy": BATCHES_OF_THE_SCHEDULE,
    "length_column_name": BATCHES_OF_THE_SCHEDULE,
    "dataloader_drop_last": BATCHES_OF_THE_SCHEDULE,
    "bf16_full_eval": "evaluation is in the training's precision",
    "fp16_full_eval": "evaluation is in the training's precision",
}
WHOLE_SCHEDULE = "num_train_epochs counts the whole schedule and must stay 1: give epochs_per_stage"
RENAMED = {"warmup_ratio": "warmup_steps"}  # transformers 5: a number below 1 is the ratio
UNLISTED = ("azure_ml", "flyte")  # integrations that transformers does not look for
METRICS = ("rouge_l", "cross_entropy")  # of an evaluation of the dev set
PAPER = "paper"  # as a temperature scaling: what the published code does for each divergence


@dataclass
class PoclConfig(  # type: ignore[misc]  # two options are narrower than transformers' arguments of these names
    ModelOptions,
    DataOptions,
    AdapterOptions,
    GenerationOptions,
    DifficultyOptions,
    ScheduleOptions,
    LossOptions,
    StageOptions,
    OptimisationOptions,
    LoggingOptions,
    RolloutOptions,
    CacheOptions,
    EvaluationOptions,
    TrainingArguments,
):
    """Arguments of `PoclTrainer`: those of transformers' `TrainingArguments` and the options of `pocl_fast.options`.
    The defaults are the paper's recipe (arXiv 2506.05695), with the scaling of each divergence that keeps its
    gradient's size.

    `num_train_epochs` counts the whole schedule and stays 1: give `epochs_per_stage`. `eval_strategy` and
    `save_strategy` "epoch" mean each pass over a stage's samples. `max_steps` ends training early. `device` is given as
    text ("auto", "cpu", "cuda:1") and read as a torch.device. Raises `InputError`, a ValueError, for unknown names, for
    values of the wrong type or out of range, and for arguments that do not go together.
    """

    # defaults of TrainingArguments that differ here and are no option
    lr_scheduler_type: str = "cosine"
    num_train_epochs: float = 1.0
    optim: str = "adamw_torch_fused"
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    logging_first_step: bool = True
    logging_nan_inf_filter: bool = False  # transformers would log an average in a NaN's place, and train on
    metric_for_best_model: str | None = "eval_rouge_l"
    greater_is_better: bool | None = True
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False  # none are, and looking for them takes time

    def __new__(cls, *_: Any, **given: Any) -> PoclConfig:
        known = [argument.name for argument in fields(cls)]
        if unknown := sorted(given.keys() - known):
            what = "unknown arguments" if len(unknown) > 1 else "unknown argument"
            raise InputError(f"PoclConfig: {what} {', '.join(name + _near(name, known) for name in unknown)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.computed_in: Precision | None = None  # where a run has chosen it; else the trainer does
        self._check_options()
        check_report_to(self.report_to)
        defaults = {argument.name: argument.default for argument in fields(self)}
        for name, instead in NOT_HERE.items():
            if hasattr(self, name) and getattr(self, name) not in (None, False, 0, "no", [], defaults[name]):
                raise InputError(f"{name}={getattr(self, name)!r} is not for this trainer: {instead}")
        if self.gradient_checkpointing:  # the older name
            self.activation_checkpointing = True
        self.gradient_checkpointing = self.activation_checkpointing  # transformers before 5.24 reads this one alone
        with self._chosen_device():
            if not self.use_cpu and not self.fp16 and torch.cuda.is_available():  # transformers settles its autocast
                fast = torch.cuda.is_bf16_supported(including_emulation=False)
                self.bf16 |= self.precision == "bf16" or (self.precision == "auto" and fast)
            super().__post_init__()
        asked = vars(self)["device"]
        if asked != "auto" and self.device.type != torch.device(asked).type:
            raise InputError(f"device {asked!r}: transformers trains on {self.device} here")
        self._check_together()
        self.objective()

    def _check_options(self) -> None:
        """Raises `InputError` for an option's value that is of the wrong type or out of range."""
        values = vars(self)  # `self.device` is what transformers makes of the option
        for group in TRAINER_GROUPS:
            for name, kind in hints_of(group).items():
                try:
                    values[name] = typed(values[name], kind)
                except ValueError as error:
                    raise InputError(f"{name}{', ' if str(error).startswith('value ') else ' '}{error}") from error
        try:
            check_names(self.fields)
        except InputError as error:
            raise InputError(f"fields: {error}") from error

    def _check_together(self) -> None:
        """Raises `InputError` for arguments that do not go together."""
        if self.num_train_epochs != 1:
            raise InputError(WHOLE_SCHEDULE)
        if self.save_strategy == "best":
            raise InputError('save_strategy="best" would not save what a stop leaves: the best weights are kept anyway')
        if (metric := self.metric_for_best_model or METRICS[0]).removeprefix("eval_") not in METRICS:
            raise InputError(f"metric_for_best_model must be one of {', '.join(METRICS)}; got {metric!r}")
        if self.dataloader_num_workers < 0:
            raise InputError(f"dataloader_num_workers must be at least 0, got {self.dataloader_num_workers}")
        try:
            self.get_process_log_level()
        except KeyError as error:
            raise InputError(f"log_level {self.log_level!r} is none that transformers knows") from error
        if (optim := value_of(self.optim)).startswith("schedule_free"):
            raise InputError(f"optim={optim!r} has no state of its own stages: take adamw_torch_fused")
        if self.remeasure and (not is_measured(self) or self.pacing == "competence"):
            instead = f"curriculum={self.curriculum!r} does not measure it: leave it out"
            if is_measured(self):
                instead = 'give pacing="baby-steps", or leave it out'
            raise InputError(f"remeasure ranks the samples of each baby step by their difficulty: {instead}")
        if self.remeasure and self.dataloader_num_workers:
            raise InputError("remeasure changes the order, and workers have the old one: dataloader_num_workers=0")
        if self.deepspeed and self.on_nonfinite == "skip":
            raise InputError('DeepSpeed steps before a gradient can be looked at: give on_nonfinite="stop"')
        columns = teacher_columns(self.signals)
        if columns and self.remeasure and self.cache_mode == "topk":
            raise InputError(top_k_lacks(columns))
        check_options(self)
        check_choice(self)
        if self.patience is not None and self.eval_strategy == "no":
            raise InputError('patience needs evaluations: give eval_strategy "epoch" or "steps"')

    @property  # type: ignore[misc, override]  # the option is given as text
    def device(self) -> torch.device:
        """Where this process trains."""
        return self._setup_devices

    @device.setter
    def device(self, asked: str | torch.device) -> None:
        vars(self)["device"] = str(asked)

    @contextlib.contextmanager
    def _chosen_device(self) -> Iterator[None]:
        """Within the block transformers chooses the device that the option asks for.

        Raises `InputError` for a device that is not there, that use_cpu contradicts, or that is one rank's of several.
        """
        asked: str = vars(self)["device"]
        device = choose_device(asked)
        if (
            device.type == "cpu"
        ):  # "auto" too: transformers would take a Mac's GPU, and each of torchrun's ranks be alone
            self.use_cpu = True
        if self.use_cpu and device.type != "cpu" and asked != "auto":
            raise InputError(f"device {asked!r} and use_cpu=True contradict each other: give one of them")
        if self.use_cpu or device.index is None:
            yield
            return
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if device.index == int(os.environ.get("LOCAL_RANK", "0")):
                yield
                return
            raise InputError(f'device {asked!r}: torchrun gives each process a GPU of its own; give device="cuda"')
        before = os.environ.get("ACCELERATE_TORCH_DEVICE")
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)  # accelerate's choice; transformers takes the first GPU
        try:
            yield
        finally:
            os.environ.pop("ACCELERATE_TORCH_DEVICE")
            if before is not None:
                os.environ["ACCELERATE_TORCH_DEVICE"] = before
        vars(self)["_setup_devices"], self._n_gpu = device, 1
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def to_dict(self) -> dict[str, Any]:
        """As transformers' own, with `device` as it was given, and paths as text."""
        text = None if self.peft_config is None else str(self.peft_config)
        return super().to_dict() | {"device": vars(self)["device"], "peft_config": text}

    def objective(self) -> Objective:
        """The loss of the first stage."""
        chosen: dict[str, Any] = {"divergence": self.divergence, "beta": self.beta, "skew": self.skew}
        scaling: Any = self.temperature_scaling
        if scaling == PAPER:
            scaling = Objective.preset(f"paper:{self.divergence}").temperature_scaling
        return Objective(**chosen, temperature_scaling=scaling, temperature=self.temperature[0], alpha=self.alpha[0])

    @classmethod
    def of_run(cls, config: RunConfig, output_dir: Path) -> PoclConfig:
        """The arguments of a run's training: all its options but models and files, which a trainer is given besides.

        Raises `InputError` for what transformers refuses, too.
        """
        # what a run does before it trains: the teacher's answers, the student's cut, the loading of the teacher
        done = {
            "data_source": "data",
            "student_layers": None,
            "layer_choice": "even",
            "teacher_quantization": "none",
            "teacher_device": "student",
        }
        options = config.trainer_options() | done
        try:
            return cls(output_dir=str(output_dir), **({"disable_tqdm": True} | options | config.trainer.set))
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, ArithmeticError, ImportError, OSError) as error:
            others = " ".join(config.trainer.set)
            raise InputError(f"--set {others}: {error}" if others else str(error)) from error

    @classmethod
    def preset(cls, name: str, output_dir: str, **changes: Any) -> PoclConfig:
        """A published recipe, with `changes`. "paper" is that of POCL's code: 4 stages of 8 passes, AdamW of learning
        rate 1e-4 with a cosine to zero in each stage and no warm-up, a fresh optimizer, each stage from the best
        weights by ROUGE-L of the one before, temperature 1, 1.33, 1.67, 2 and alpha 0.3, 0.2, 0.1, 0, τ² on the
        divergences that the code scales, jsd's beta 0.1, of samples with equal scores the earlier one first.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there is {', '.join(PRESETS)}")
        of_transformers = {"warmup_steps": 0, "lr_scheduler_type": "cosine"}
        return cls(output_dir=output_dir, **(PRESETS[name] | of_transformers | changes))


TRAINER_GROUPS: tuple[type, ...] = PoclConfig.__bases__[:-1]  # those of pocl_fast.options


def check_arguments(args: Any, curriculum: Any, callbacks: Any, optimizers: Any) -> None:
    """Raises `InputError` for arguments of a trainer that are of another kind than it takes."""
    if not isinstance(args, PoclConfig):
        raise InputError(f"args is a {type(args).__name__}: give a PoclConfig, which has TrainingArguments' fields too")
    if curriculum is not None and not isinstance(curriculum, Curriculum):
        raise InputError(f"curriculum is a {type(curriculum).__name__}: give a Curriculum, as Curriculum.load(path)")
    if isinstance(callbacks, (TrainerCallback, type)) or not hasattr(callbacks, "__iter__"):
        raise InputError("callbacks must be a list of transformers' TrainerCallback: put the one into a list")
    if not isinstance(optimizers, (tuple, list)) or len(optimizers) != 2:
        raise InputError("optimizers must be a pair: an optimizer and a learning rate's schedule, or None for each")


def check_report_to(names: str | Sequence[str] | None) -> None:
    """Raises `InputError` where a name is none of transformers' integrations, or where its package is missing."""
    alone = [name for name in ("none", "all") if not isinstance(names, str) and name in (names or ())]
    if alone and len(names or ()) > 1:
        raise InputError(f"report_to: {alone[0]!r} stands alone; got {list(names or ())}")
    available = get_available_reporting_integrations()
    for name in [names] if isinstance(names, str) else names or ():
        if name in ("none", "all", *UNLISTED) or name in available:
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ["none", "all", *sorted(INTEGRATION_TO_CALLBACK)]
            raise InputError(f"report_to must be among {', '.join(known)}; got {name!r}{did_you_mean(name, known)}")
        raise InputError(f"report_to {name!r}: the package that it needs is not installed; here are {available}")


def _near(name: str, known: Sequence[str]) -> str:
    if name in RENAMED:
        return f" (it is {RENAMED[name]} since transformers 5, where a number below 1 is the ratio)"
    aliases = {option_name(option): option.name for group in TRAINER_GROUPS for option in fields(group)}
    return f" (it is {aliases[name]} here)" if name in aliases else did_you_mean(name, known)


def value_of(choice: Any) -> str:
    """The value of one of transformers' enumerations, or the text itself."""
    return str(getattr(choice, "value", choice))
