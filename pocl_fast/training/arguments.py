"""`PoclConfig`: a transformers `TrainingArguments` with what distillation along a curriculum needs besides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from pocl_fast.loss.objective import DIVERGENCES, SCALINGS, Objective

COMPILED_ANEW = "each packed batch has lengths of its own, for which it would be compiled again"
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
    "bf16_full_eval": "evaluation is in the training's precision",
    "fp16_full_eval": "evaluation is in the training's precision",
}
PAPER = "paper"  # as a temperature scaling: what the published code does for each divergence


@dataclass
class PoclConfig(TrainingArguments):
    """Arguments of `PoclTrainer`. The defaults are the paper's recipe (arXiv 2506.05695), with the scaling of each
    divergence that keeps its gradient's size.

    `num_train_epochs` counts the whole schedule and stays 1: give `epochs_per_stage`. `eval_strategy` and
    `save_strategy` "epoch" mean each pass over a stage's samples. `max_steps` ends training early. Raises
    ValueError for values out of range.
    """

    # the loss
    divergence: str = field(default="forward_kl", metadata={"help": f"One of {', '.join(DIVERGENCES)}."})
    beta: float = field(default=0.5, metadata={"help": "The teacher's weight in jsd."})
    skew: float = field(default=0.1, metadata={"help": "The other distribution's share in a skew divergence."})
    temperature_scaling: str = field(
        default="auto", metadata={"help": f"Factor on the divergence: {', '.join(SCALINGS)}, or {PAPER}."}
    )
    # the curriculum
    curriculum: str = field(default="pocl", metadata={"help": "pocl: easy to hard in stages; none: all at once."})
    stages: int = field(default=4, metadata={"help": "Stage i trains on the easiest i/n of the samples."})
    signals: str = field(default="rouge_l,cross_entropy", metadata={"help": "What samples are ranked by."})
    rrf_k: float = field(default=60.0, metadata={"help": "The constant k of reciprocal rank fusion."})
    temperature: list[float] = field(
        default_factory=lambda: [1.0, 2.0],
        metadata={"help": "First and last stage's, linear between; or each one's."},
    )
    alpha: list[float] = field(
        default_factory=lambda: [0.3, 0.0], metadata={"help": "Weight of cross-entropy, given as temperature is."}
    )
    within_stage: str = field(
        default="constant", metadata={"help": "constant, or linear: temperature and alpha move in each step."}
    )
    epochs_per_stage: int = field(default=8, metadata={"help": "Passes over a stage's samples."})
    steps_per_stage: int | None = field(default=None, metadata={"help": "Steps of a stage, instead of passes."})
    patience: int | None = field(
        default=None, metadata={"help": "End a stage after so many evaluations without a better score."}
    )
    fresh_optimizer: bool = field(default=True, metadata={"help": "A fresh optimizer state in each stage."})
    fresh_learning_rate: bool = field(
        default=True, metadata={"help": "The learning rate's schedule begins anew in each stage."}
    )
    stage_weights: str = field(
        default="auto", metadata={"help": "A stage starts from the one before's best weights, its last, or auto."}
    )
    remeasure: bool = field(
        default=False, metadata={"help": "Measure the difficulty again, by the student as it is, before each stage."}
    )
    # batches
    tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Tokens of a batch on each device, instead of per_device_train_batch_size."}
    )
    template: str = field(default="auto", metadata={"help": "auto, chat or alpaca."})
    max_length: int = field(default=512, metadata={"help": "Most tokens of prompt and response together."})
    max_prompt_length: int = field(default=256, metadata={"help": "Most tokens of a prompt."})
    long_prompts: str = field(default="error", metadata={"help": "error, or skip the sample and say so."})
    # the teacher
    teacher_quantization: str = field(default="none", metadata={"help": "none, 8bit or 4bit, of a teacher by name."})
    teacher_device: str = field(
        default="student",
        metadata={"help": "student: its device; spread: over GPUs, main memory and disk; or a device's name."},
    )
    cache_mode: str = field(default="hidden", metadata={"help": "hidden states, or topk, are kept of the teacher."})
    cache_dtype: str = field(default="bf16", metadata={"help": "bf16, fp32 or int8, of the kept hidden states."})
    cache_top_k: int = field(default=64, metadata={"help": "Tokens that topk keeps."})
    precision: str = field(
        default="auto",
        metadata={"help": "fp32 or bf16, of products. On a GPU bf16 is autocast; on a CPU oneDNN's, results in fp32."},
    )
    # the student's own answers, and the teacher's
    rollouts: str = field(
        default="none",
        metadata={"help": "none, gkd, mixed or adaptive: when a batch's responses are the student's own."},
    )
    lmbda: float = field(default=0.5, metadata={"help": "gkd: the probability of that."})
    mixed_alpha: float = field(default=0.5, metadata={"help": "mixed: the same."})
    loss_eps: float = field(default=0.1, metadata={"help": "adaptive: rise of the dev loss, in nats, that counts."})
    replay_ratio: str = field(
        default="decreasing", metadata={"help": "adaptive: decreasing, increasing or constant share of fresh answers."}
    )
    replay_capacity: int = field(default=1000, metadata={"help": "mixed and adaptive: answers kept to come again."})
    data_source: str = field(
        default="data", metadata={"help": "data, or teacher: its answers are generated and take the references' place."}
    )
    # answers
    max_new_tokens: int = field(default=128, metadata={"help": "Longest generated answer, in tokens."})
    generation_batch_size: int = field(default=64, metadata={"help": "Most prompts that are answered at once."})
    generation_batch_tokens: int = field(
        default=32_768, metadata={"help": "Most tokens of prompts and answers whose keys and values are in memory."}
    )
    generation_engine: str = field(
        default="auto", metadata={"help": "auto, torch or vllm: what answers when difficulty is measured."}
    )
    measure_temperature: float = field(
        default=0.0, metadata={"help": "Of the answers that difficulty is measured by; 0 is greedy."}
    )
    measure_seed: int = field(default=0, metadata={"help": "Of their random numbers, where they are sampled."})
    # models by name
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a hub model."})
    student_layers: int | None = field(
        default=None, metadata={"help": "Keep this many layers of a student by name: first, last, even between."}
    )
    # faults
    on_nonfinite: str = field(
        default="stop", metadata={"help": "stop, or skip a step whose loss or gradient is not finite."}
    )
    save_minutes: float = field(
        default=10.0, metadata={"help": "A checkpoint at least this often, besides save_strategy's."}
    )

    # defaults of TrainingArguments that differ here
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    lr_scheduler_type: str = "cosine"
    per_device_train_batch_size: int = 16
    num_train_epochs: float = 1.0
    optim: str = "adamw_torch_fused"
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    logging_steps: float = 5
    logging_first_step: bool = True
    logging_nan_inf_filter: bool = False  # transformers would log an average in a NaN's place, and train on
    metric_for_best_model: str | None = "eval_rouge_l"
    greater_is_better: bool | None = True
    remove_unused_columns: bool = False
    report_to: None | str | list[str] = "none"  # noqa: RUF036 (the order that HfArgumentParser reads)
    ddp_find_unused_parameters: bool | None = False  # none are, and looking for them takes time

    def __post_init__(self) -> None:
        for name, instead in NOT_HERE.items():
            if getattr(self, name) not in (None, False, 0, "no"):
                raise ValueError(f"{name}={getattr(self, name)!r} is not for this trainer: {instead}")
        if not self.use_cpu and not self.fp16 and torch.cuda.is_available():  # transformers settles its autocast here
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
            self.bf16 |= self.precision == "bf16" or (self.precision == "auto" and fast)
        super().__post_init__()
        choices = {
            "divergence": DIVERGENCES,
            "temperature_scaling": (*SCALINGS, PAPER),
            "curriculum": ("pocl", "none"),
            "within_stage": ("constant", "linear"),
            "stage_weights": ("auto", "best", "last"),
            "template": ("auto", "chat", "alpaca"),
            "long_prompts": ("error", "skip"),
            "teacher_quantization": ("none", "8bit", "4bit"),
            "cache_mode": ("hidden", "topk"),
            "cache_dtype": ("bf16", "fp32", "int8"),
            "precision": ("auto", "fp32", "bf16"),
            "on_nonfinite": ("stop", "skip"),
            "data_source": ("data", "teacher"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name in ("stages", "epochs_per_stage", "steps_per_stage", "patience", "tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_train_epochs != 1:
            raise ValueError("num_train_epochs counts the whole schedule and must stay 1: give epochs_per_stage")
        if self.save_strategy == "best":
            raise ValueError('save_strategy="best" would not save what a stop leaves: the best weights are kept anyway')
        if str(self.optim).startswith("schedule_free"):
            raise ValueError(f"optim={str(self.optim)!r} has no state of its own stages: take adamw_torch_fused")
        if self.remeasure and self.dataloader_num_workers:
            raise ValueError("remeasure changes the order, and workers have the old one: dataloader_num_workers=0")
        if self.deepspeed and self.on_nonfinite == "skip":
            raise ValueError('DeepSpeed steps before a gradient can be looked at: give on_nonfinite="stop"')
        if self.patience is not None and self.eval_strategy == "no":
            raise ValueError('patience needs evaluations: give eval_strategy "epoch" or "steps"')
        self.objective()

    def objective(self) -> Objective:
        """The loss of the first stage."""
        chosen: dict[str, Any] = {"divergence": self.divergence, "beta": self.beta, "skew": self.skew}
        scaling: Any = self.temperature_scaling
        if scaling == PAPER:
            scaling = Objective.preset(f"paper:{self.divergence}").temperature_scaling
        return Objective(**chosen, temperature_scaling=scaling, temperature=self.temperature[0], alpha=self.alpha[0])

    @property
    def passes(self) -> int:
        """Passes over a stage's samples: without a curriculum as many as there are with one over all samples."""
        if self.curriculum == "pocl":
            return self.epochs_per_stage
        return max(1, round(self.epochs_per_stage * (self.stages + 1) / 2))

    @classmethod
    def preset(cls, name: str, output_dir: str, **changes: Any) -> PoclConfig:
        """A published recipe, with `changes`. "paper" is that of POCL's code: 4 stages of 8 passes, AdamW of learning
        rate 1e-4 with a cosine to zero in each stage and no warm-up, a fresh optimizer, each stage from the best
        weights by ROUGE-L of the one before, temperature 1, 1.33, 1.67, 2 and alpha 0.3, 0.2, 0.1, 0, τ² on the
        divergences that the code scales, jsd's beta 0.1.
        """
        if name != "paper":
            raise ValueError(f"no preset {name!r}; there is paper")
        recipe: dict[str, Any] = {
            "stages": 4, "epochs_per_stage": 8, "temperature": [1.0, 1.33, 1.67, 2.0], "alpha": [0.3, 0.2, 0.1, 0.0],
            "temperature_scaling": PAPER, "beta": 0.1, "learning_rate": 1e-4, "weight_decay": 0.01, "warmup_steps": 0,
            "max_grad_norm": 1.0, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1, "max_length": 512, "max_prompt_length": 256, "stage_weights": "best",
            "fresh_optimizer": True, "fresh_learning_rate": True, "signals": "rouge_l,cross_entropy", "rrf_k": 60.0,
        }  # fmt: skip
        return cls(output_dir=output_dir, **(recipe | changes))
