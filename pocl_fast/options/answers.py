"""Options of answers: how they are generated, what makes a sample hard, how a student is scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pocl_fast.options.declaring import Count, NotNegative, Seed, document
from pocl_fast.system.typed_values import NotEmpty


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
class EvaluationOptions:
    """The final evaluation: sampling at temperature 1, top-p 1."""

    eval_seeds: Annotated[list[Seed], NotEmpty()] = field(default_factory=lambda: [10, 20, 30, 40, 50])
    """One set of sampled answers for each seed; scores are their mean and spread."""


@dataclass
class TeacherEvaluation:
    """Whether the teacher takes part in the final evaluation."""

    score_teacher: bool = True
    """Where a teacher is named, score its answers as the student's, once, and the student's divergence from it."""


document(__name__)
