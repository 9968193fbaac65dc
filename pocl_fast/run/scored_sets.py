"""The sets of samples that a run scores its models on: what they are called, and whether a model can read them, and
which of their samples are trained on.

Knows samples, names and vocabularies. Does not know how samples are read, nor how they are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pocl_fast.answers.evaluation import unseen_by_rouge
from pocl_fast.answers.rouge_words import Tokenizer
from pocl_fast.data.sample_set import SampleSet, same_samples_lines
from pocl_fast.settings.evaluation_sets import NamedSet
from pocl_fast.teacher.pair import Vocabulary, check_tokens, places


@dataclass(frozen=True)
class ScoredSet:
    """Samples that models are scored on."""

    named: NamedSet
    given: str  # what was read for them
    data: SampleSet

    @property
    def source(self) -> str:
        """Where they come from, in words."""
        return self.given if self.named.source is not None else f"held out of {self.given}"

    @property
    def title(self) -> str:
        """The set's kind and name: "dev set", "test set news"."""
        kind, name = self.named.role, self.named.name
        return f"{kind} set" if kind == name else f"{kind} set {name}"

    def described(self, *, chooses: bool) -> str:
        """The set in words; `chooses`: its scores choose weights."""
        return f"{self.title}, {len(self.data.encoded):,} samples" + (", which chooses the weights" if chooses else "")


def scored_set(
    named: NamedSet, train: str | None, data: SampleSet, rouge: Tokenizer, say: Callable[[str], object]
) -> ScoredSet:
    """The set of these samples, with a line where ROUGE-L is blind for their references."""
    given = str(named.source or train)
    if line := unseen_by_rouge(data, rouge, given):
        say(line)
    return ScoredSet(named, given, data)


def check_sets(sets: Sequence[ScoredSet], vocabulary: Vocabulary, tokenizer: Any) -> None:
    """Raises `InputError` where a sample has a token that a model does not know."""
    for one in sets:
        check_tokens(one.data, vocabulary, tokenizer, places(one.given, one.named.option))


def same_samples(train: str, samples: SampleSet, sets: Sequence[ScoredSet], chosen_by: ScoredSet | None) -> list[str]:
    """The lines of `same_samples_lines`; `chosen_by` is the set whose scores choose weights."""
    return same_samples_lines(
        (train, samples.used()),
        [(one.title, one.data.used()) for one in sets],
        tests=[one.title for one in sets if one.named.role == "test"],
        choosing=None if chosen_by is None else chosen_by.title,
    )
