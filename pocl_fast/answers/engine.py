"""What answers prompts: the interface of an engine, and the engine that decodes with torch.

Knows models and how prompts are put into batches. Does not know samples, nor what the answers are for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pocl_fast.answers.decoding import generate, generation_batches
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.inputs.vocabulary import unsayable_ids
from pocl_fast.models.loading import readable_errors, resolve
from pocl_fast.models.probing import evaluating
from pocl_fast.system.console import Report


class Engine(Protocol):
    """A model that answers prompts. Prompts and answers are token ids; an answer is without its end token."""

    def batches(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Indices of the prompts that are answered together, for callers that keep the answers batch by batch."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sample_ids: Sequence[int],
        end_ids: Collection[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        shared: bool = False,
        progress: Report | None = None,
    ) -> list[list[int]]:
        """The answer to each prompt, of at most `max_new_tokens` tokens. It ends at any of `end_ids` and of the model's
        own stop tokens (`own_ends`).

        `temperature` 0 is greedy; otherwise an answer is sampled from the whole distribution, with random numbers made
        from `seed` and the prompt's entry in `sample_ids`. With `shared` every rank calls with the same arguments,
        answers its share of the prompts, and has all answers at the end.
        """
        ...


def own_ends(model: Any) -> frozenset[int]:
    """The tokens at which a model's own `generate` stops: `eos_token_id` of its generation config."""
    return _end_ids(getattr(model, "generation_config", None))


def _end_ids(config: Any) -> frozenset[int]:
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset(map(int, ends if isinstance(ends, (list, tuple)) else [ends]))


def configured_ends(source: str, *, trust_remote_code: bool = False) -> frozenset[int]:
    """The same of the model behind `source`, before its weights are read; none where its files do not tell."""
    from transformers import AutoConfig, GenerationConfig

    where = resolve(source)
    if where.gguf_file is not None:
        return frozenset()
    with readable_errors(source, "model"):
        try:
            known = GenerationConfig.from_pretrained(where.path)
        except OSError:  # transformers makes one of the model's configuration
            config = AutoConfig.from_pretrained(where.path, trust_remote_code=trust_remote_code)
            known = GenerationConfig.from_model_config(config)
    return _end_ids(known)


class BatchOptions(Protocol):
    """How many prompts torch answers at once: a run's options, a trainer's arguments."""

    @property
    def generation_batch_size(self) -> int: ...
    @property
    def generation_batch_tokens(self) -> int: ...


class AnswerOptions(BatchOptions, Protocol):
    """The same, and how long an answer may be."""

    @property
    def max_new_tokens(self) -> int: ...


@dataclass(frozen=True, eq=False)
class TorchEngine:
    """An `Engine` by a transformers model, whose mode (training or not) is as before after each call."""

    model: Any  # without what wraps it for several devices
    pad_id: int
    batch_size: int = 64  # the most prompts that are answered at once,
    batch_tokens: int | None = None  # and the most tokens of these prompts and their answers
    forbidden_ids: Sequence[int] = ()  # that no answer has

    @classmethod
    def of(cls, model: Any, encoder: SampleEncoder, options: BatchOptions, *, rows: int | None = None) -> TorchEngine:
        """The engine of a model with the encoder's tokenizer, whose answers have tokens of that alone; where another
        model is to read them, tokens below the `rows` that it has."""
        tokenizer: Any = encoder.tokenizer
        forbidden = unsayable_ids(tokenizer, model, rows)
        batch = options.generation_batch_size, options.generation_batch_tokens
        return cls(model, tokenizer.pad_token_id, *batch, forbidden)

    def batches(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        return generation_batches(
            prompts, batch_size=self.batch_size, max_new_tokens=max_new_tokens, batch_tokens=self.batch_tokens
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sample_ids: Sequence[int],
        end_ids: Collection[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        shared: bool = False,
        progress: Report | None = None,
    ) -> list[list[int]]:
        with evaluating(self.model):
            return generate(
                self.model,
                prompts,
                max_new_tokens=max_new_tokens,
                end_ids=own_ends(self.model) | set(end_ids),
                pad_id=self.pad_id,
                temperature=temperature,
                seed=seed,
                sample_ids=sample_ids,
                forbidden_ids=self.forbidden_ids,
                batch_size=self.batch_size,
                batch_tokens=self.batch_tokens,
                shared=shared,
                progress=progress,
            )
