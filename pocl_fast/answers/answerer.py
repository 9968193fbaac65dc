"""A model's answers as samples to train on: how they are asked for, and how they end.

Knows tokens and limits. Does not know whose answers these are, or when they are wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pocl_fast.answers.decoding import generate, generation_batches
from pocl_fast.data.encoding import EncodedSample, SampleEncoder


class Generate(Protocol):
    """Answers to prompts, as token ids without the end token, at most `max_new_tokens` of each; sampled with random
    numbers made from the seed and each prompt's id alone."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], sample_ids: Sequence[int], seed: int
    ) -> Sequence[Sequence[int]]: ...


@dataclass(frozen=True)
class AnswerLimits:
    """How long an answer may be, in tokens, and with what it ends."""

    max_new_tokens: int  # of the answer, without the end token
    max_length: int  # of prompt and response
    end_id: int  # the end-of-turn token of the references


def answered(sample: EncodedSample, answer: Sequence[int], limits: AnswerLimits) -> EncodedSample:
    """The sample with an answer in its response's place: with the end token behind it, unless it was cut, by
    `max_new_tokens` when it was generated or by `max_length` here. An empty answer is the end token alone."""
    room = limits.max_length - len(sample.prompt_ids)
    cut = len(answer) >= limits.max_new_tokens
    response = tuple(int(token) for token in answer) + (() if cut else (limits.end_id,))
    return EncodedSample(sample.index, sample.prompt_ids, response[:room], cut or len(response) > room)


@dataclass(frozen=True, eq=False)
class Answerer:
    """`Generate` by a transformers model, whose mode (training or not) is as before afterwards."""

    model: Any  # without what wraps it for several devices
    limits: AnswerLimits
    end_ids: Collection[int]
    pad_id: int
    temperature: float = 1.0  # 0 is greedy
    batch_size: int = 64  # prompts answered at once,
    batch_tokens: int | None = None  # and at most so many tokens of them and of their answers

    @classmethod
    def of(cls, model: Any, encoder: SampleEncoder, options: Any, *, temperature: float) -> Answerer:
        """As options say, which have `max_new_tokens`, `max_length`, `generation_batch_size` and
        `generation_batch_tokens`."""
        tokenizer: Any = encoder.tokenizer
        return cls(
            model,
            AnswerLimits(options.max_new_tokens, options.max_length, encoder.end_id),
            encoder.end_ids,
            tokenizer.pad_token_id,
            temperature=temperature,
            batch_size=options.generation_batch_size,
            batch_tokens=options.generation_batch_tokens,
        )

    def __call__(self, prompts: Sequence[Sequence[int]], sample_ids: Sequence[int], seed: int) -> list[list[int]]:
        was_training = self.model.training
        self.model.eval()
        try:
            return generate(
                self.model,
                prompts,
                max_new_tokens=self.limits.max_new_tokens,
                end_ids=self.end_ids,
                pad_id=self.pad_id,
                temperature=self.temperature,
                seed=seed,
                sample_ids=sample_ids,
                batch_size=self.batch_size,
                batch_tokens=self.batch_tokens,
            )
        finally:
            self.model.train(was_training)

    def batches(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Indices of the prompts that are answered together."""
        return generation_batches(
            prompts,
            batch_size=self.batch_size,
            max_new_tokens=self.limits.max_new_tokens,
            batch_tokens=self.batch_tokens,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """All that an answer depends on besides the model, the prompt and the seed."""
        return {
            "max_new_tokens": self.limits.max_new_tokens,
            "end_ids": sorted(self.end_ids),
            "temperature": self.temperature,
        }
