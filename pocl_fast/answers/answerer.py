"""A model's answers as samples to train on: how they are generated, and how they end.

Knows tokens and limits. Does not know whether teacher or student answers, nor when answers are wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pocl_fast.answers.engine import AnswerOptions, Engine, TorchEngine, own_ends
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder


class Generate(Protocol):
    """Answers to prompts, as token ids without the end token, at most `max_new_tokens` of each; sampled with random
    numbers made from the seed and each prompt's id alone."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], sample_ids: Sequence[int], seed: int
    ) -> Sequence[Sequence[int]]: ...


class SampleAnswerOptions(AnswerOptions, Protocol):
    """How answers are generated that become samples."""

    @property
    def max_length(self) -> int: ...


@dataclass(frozen=True)
class AnswerLimits:
    """How long an answer may be, in tokens, and the token that ends it."""

    max_new_tokens: int  # of the answer, without the end token
    max_length: int  # of prompt and response
    end_id: int  # the end-of-turn token of the references


def answered(sample: EncodedSample, answer: Sequence[int], limits: AnswerLimits) -> EncodedSample:
    """The sample with an answer as its response, which alone is supervised. The end token follows the answer unless the
    answer was cut: by `max_new_tokens` when it was generated, or by `max_length` here. An empty answer is the end token
    alone."""
    room = limits.max_length - len(sample.prompt_ids)
    cut = len(answer) >= limits.max_new_tokens
    response = tuple(int(token) for token in answer) + (() if cut else (limits.end_id,))
    return EncodedSample(sample.index, sample.prompt_ids, response[:room], cut or len(response) > room)


@dataclass(frozen=True, eq=False)
class Answerer:
    """`Generate` by an engine, with the settings that all its answers have in common."""

    engine: Engine
    limits: AnswerLimits
    end_ids: Collection[int]
    temperature: float = 1.0  # 0 is greedy

    @classmethod
    def of(
        cls, model: Any, encoder: SampleEncoder, options: SampleAnswerOptions, *, temperature: float, rows: int
    ) -> Answerer:
        """Answers by torch, as long and in such batches as the options say; with tokens below the `rows` of the model
        that is to read them."""
        limits = AnswerLimits(options.max_new_tokens, options.max_length, encoder.end_id)
        ends = encoder.end_ids | own_ends(model)
        return cls(TorchEngine.of(model, encoder, options, rows=rows), limits, ends, temperature)

    def __call__(self, prompts: Sequence[Sequence[int]], sample_ids: Sequence[int], seed: int) -> list[list[int]]:
        return self.engine.generate(
            prompts,
            sample_ids=sample_ids,
            end_ids=self.end_ids,
            max_new_tokens=self.limits.max_new_tokens,
            temperature=self.temperature,
            seed=seed,
        )

    def batches(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Indices of the prompts that are answered together."""
        return self.engine.batches(prompts, self.limits.max_new_tokens)

    @property
    def settings(self) -> dict[str, Any]:
        """All that an answer depends on besides the model, the prompt and the seed."""
        forbidden = list(getattr(self.engine, "forbidden_ids", ()))
        return ({"forbidden_ids": forbidden} if forbidden else {}) | {
            "max_new_tokens": self.limits.max_new_tokens,
            "end_ids": sorted(self.end_ids),
            "temperature": self.temperature,
        }
