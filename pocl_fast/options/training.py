"""Options of training: the curriculum, the loss, stages, the optimisation, logs, own answers, the teacher's cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pocl_fast.options.declaring import Count, NotNegative, Positive, Seed, Share, document
from pocl_fast.system.typed_values import NotEmpty, Range


@dataclass
class ScheduleOptions:
    """The curriculum: which samples when, at what temperature and loss weight (arXiv 2506.05695)."""

    curriculum: Literal["pocl", "none", "random", "reverse", "length"] = "pocl"
    """"pocl": easy to hard in cumulative stages. Controls of as many optimizer steps: "none": all samples from the
    start, in one stage, with the first temperature and alpha; "random": the same stages over a shuffled order;
    "reverse": hard to easy; "length": the shortest responses first. "pocl" and "reverse" alone measure difficulty."""
    stages: Count = 4
    """Number of stages; stage i trains on the easiest i/n of the samples."""
    pacing: Literal["auto", "baby-steps", "competence"] = "auto"
    """How harder samples come in: "competence": with each step, as a share of the samples that grows with the square
    root of the steps (arXiv 1903.09848); stages then have equally many steps. "baby-steps" (the paper's): with each
    stage. "auto": baby steps with `remeasure`, and where a trainer is given a curriculum; else competence."""
    initial_competence: Annotated[float, Range(above=0, at_most=1)] = 0.4
    """pacing competence: the share of the samples, easiest first, that the first step may draw."""
    full_competence: Annotated[float, Range(above=0, at_most=1)] = 0.3
    """pacing competence: the share of all steps after which every sample may be drawn; of four baby steps it is 0.6."""
    rrf_k: Positive = 60.0
    """The constant k of reciprocal rank fusion."""
    ties: Literal["average", "first"] = "average"
    """Ranks of samples with the same score by a signal: "average": all have the mean of their ranks; "first": the
    earlier one in the file ranks first (the paper's code)."""
    temperature: Annotated[list[float], NotEmpty()] = field(default_factory=lambda: [1.0, 1.0])
    """First and last stage's temperature, linear between; or one value for each stage."""
    alpha: Annotated[list[float], NotEmpty()] = field(default_factory=lambda: [0.3, 0.3])
    """First and last stage's weight of cross-entropy in alpha·CE + (1 - alpha)·KD; or one value for each stage."""


@dataclass
class LossOptions:
    """The divergence between teacher and student."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"] = "forward_kl"
    """What pulls the student to the teacher."""
    beta: Share = 0.5
    """The teacher's weight in jsd."""
    skew: Annotated[float, Range(above=0, below=1)] = 0.1
    """The share of the other distribution in a skew divergence."""
    temperature_scaling: Literal["auto", "none", "tau", "tau2", "paper"] = "auto"
    """Factor on the divergence; "auto" keeps its gradient's size when the temperature rises, "paper" is what the
    published code does for each divergence."""


@dataclass
class StageOptions:
    """How long a stage is, and what it starts from."""

    within_stage: Literal["constant", "linear"] = "constant"
    """Whether temperature and alpha are constant within a stage, or move to the next stage's values step by step."""
    epochs_per_stage: Count = 8
    """Passes over a stage's samples."""
    steps_per_stage: Count | None = None
    """Optimizer steps of a stage, instead of passes."""
    stage_length: Literal["passes", "equal"] = "passes"
    """"passes": a stage is as long as its passes are; "equal": the steps of all these passes are shared evenly among
    the stages."""
    patience: Count | None = None
    """End a stage when so many evaluations in a row (one a pass) brought no better ROUGE-L, nor the same with a lower
    cross-entropy."""
    fresh_optimizer: bool = False
    """Start each stage with a fresh optimizer state."""
    fresh_learning_rate: bool = False
    """Start the schedule of the learning rate anew in each stage; otherwise one schedule goes over all stages."""
    stage_weights: Literal["auto", "best", "last"] = "auto"
    """Weights that a stage starts from: those of the previous stage with the best dev ROUGE-L ("best"), or its last
    ones. "auto" is "best" where there are evaluations."""
    remeasure: bool = False
    """Measure the difficulty again before each stage, by the student as it is then."""


@dataclass
class OptimisationOptions:
    """The optimisation: AdamW and a cosine to zero."""

    per_device_train_batch_size: Count = field(default=16, metadata={"aliases": ["--batch_size", "--batch-size"]})
    """Samples of a batch on each device."""
    tokens_per_batch: Count | None = None
    """Tokens of a batch on each device, instead of samples; a longer sample is a batch of its own."""
    gradient_accumulation_steps: Count = 1
    """Batches whose gradients are added before a step; every token weighs alike."""
    learning_rate: Positive = 1e-4
    """Peak of the learning rate."""
    weight_decay: NotNegative = 0.01
    """AdamW's weight decay, on all weights but biases and norms."""
    max_grad_norm: NotNegative = 1.0
    """The gradient is clipped to this norm; 0: it is not clipped."""
    activation_checkpointing: bool = False
    """Compute activations again in backward instead of keeping them: less memory, more time."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do at a step whose loss or gradient is not finite: stop and name the samples, or leave the step out."""
    seed: Seed = 42
    """Seed of the order of the samples and of the student's own answers."""


@dataclass
class LoggingOptions:
    """What training logs and saves on the way."""

    logging_steps: Positive = 5.0
    """Steps between two lines of the log; below 1, a share of all steps."""
    report_to: list[str] = field(default_factory=lambda: ["none"])
    """Where losses and scores go besides metrics.jsonl: tensorboard, wandb, ... as transformers names them."""
    save_minutes: Positive = 10.0
    """Most minutes between two checkpoints; there is also one at the end of each pass."""


@dataclass
class WarmupOptions:
    """A warm-up of the student: supervised fine-tuning on the references before it is measured. The learning rate's
    warm-up is another thing: --set warmup_steps=N."""

    warmup_epochs: Count | None = None
    """Fine-tune the student for so many passes over the training samples before its difficulty with them is measured;
    without it, or warmup_steps, it is measured and trained as it is given."""
    warmup_steps: Count | None = None
    """The same by optimizer steps, instead of passes. (Steps in which the learning rate rises are --set
    warmup_steps=N.)"""
    warmup_learning_rate: Positive | None = None
    """Peak of the warm-up's learning rate, which falls by one cosine to 0; without it, that of the training."""


@dataclass
class RolloutOptions:
    """The student's own answers in training."""

    rollouts: Literal["none", "gkd", "mixed", "adaptive"] = "none"
    """When a batch has them: "gkd" with a fixed probability (arXiv 2306.13649); "mixed" the same with a replay buffer,
    "adaptive" more of them when the dev loss rises (DistiLLM, arXiv 2402.03898)."""
    lmbda: Share = 0.5
    """gkd: the probability that a batch has the student's answers."""
    mixed_alpha: Share = 0.5
    """mixed: the probability that a batch has the student's answers."""
    loss_eps: NotNegative = 0.1
    """adaptive: how far the dev loss must rise, in nats, before there are more of them."""
    replay_ratio: Literal["decreasing", "increasing", "constant"] = "decreasing"
    """adaptive: how the share of fresh answers, against those of the replay buffer, changes over the training."""
    replay_capacity: Count = 1000
    """mixed and adaptive: answers in the replay buffer."""


@dataclass
class CacheOptions:
    """What is kept on disk of the teacher, so that it runs once a sample."""

    cache_mode: Literal["hidden", "topk"] = "hidden"
    """"hidden": the last hidden states, which give the whole distribution; "topk": the most likely tokens alone."""
    cache_dtype: Literal["bf16", "fp32", "int8"] = "bf16"
    """How hidden states are kept; int8 has a scale for each token. The error that this causes is measured and
    printed."""
    cache_top_k: Count = 64
    """How many tokens "topk" keeps, at 8 bytes each."""


document(__name__)
