"""ROUGE-L, equal to `rouge-score` 0.1.2 to the last bit.

Knows texts and the stems of words. Does not know how rouge-score's words are cut and how words are compared: that is
C++. The words of other tokenizers come from rouge_words.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import pocl_fast._C as _C
from pocl_fast.answers.rouge_words import TOKENIZERS, Tokenizer, split_by

_VALID = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class RougeL:
    """Scores from 0 to 1, one of each a prediction: [predictions] float64."""

    precision: np.ndarray
    recall: np.ndarray
    fmeasure: np.ndarray


def rouge_l(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    use_stemmer: bool = True,
    tokenizer: Tokenizer = "rouge_score",
    threads: int | None = None,
) -> RougeL:
    """ROUGE-L of each prediction against its reference, or the best of its references (by F, the first at ties).

    Tokens are those of `rouge-score` 0.1.2: runs of a-z and 0-9 in the lower-cased text; with `use_stemmer` those of
    more than three characters are stemmed (Porter, as nltk has it). With `tokenizer` "unicode_words" or "characters"
    they are those of `rouge_words`, and none is stemmed, as when rouge-score is given a tokenizer. A text without
    tokens scores 0. `threads` is by default one for each processor that the process may use; the scores do not depend
    on it.

    Precision and recall are the length of the longest common subsequence over that of the prediction and that of the
    reference, in tokens; F = 2PR / (P + R) (Lin 2004, "ROUGE: a package for automatic evaluation of summaries").

    Raises ValueError for unequal numbers of predictions and references, an empty list of references, an unknown
    tokenizer or `threads` below 1, and TypeError for anything that is not text.
    """
    texts = _checked_predictions(predictions)
    first = _append_references(texts, references)
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer must be one of {', '.join(TOKENIZERS)}; got {tokenizer!r}")
    if tokenizer != "rouge_score":
        texts, use_stemmer = _as_numbers(texts, split_by(tokenizer)), False
    tokens = _C.tokenize(texts, threads)
    forms = _stems(tokens.words) if use_stemmer else np.arange(len(tokens.words), dtype=np.int32)
    return RougeL(*_C.rouge_l(tokens, forms, first, threads))


def _checked_predictions(predictions: Sequence[str]) -> list[str]:
    if isinstance(predictions, str):
        raise TypeError("predictions must be a list of strings, got one string")
    texts = list(predictions)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"predictions[{i}] must be a string, got {type(text).__name__}")
    return texts


def _append_references(texts: list[str], references: Sequence[str | Sequence[str]]) -> np.ndarray:
    """Puts the references behind the predictions in `texts`. Returns where those of each begin: [predictions + 1]."""
    if isinstance(references, str):
        raise TypeError("references must be a list of strings or of lists of strings, got one string")
    count = len(texts)
    if len(references) != count:
        raise ValueError(f"as many references as predictions are needed, got {len(references)} for {count} predictions")
    first = np.zeros(count + 1, dtype=np.int64)
    for i, given in enumerate(references):
        if isinstance(given, str):
            texts.append(given)
        else:
            texts.extend(_checked_references(i, given))
        first[i + 1] = len(texts) - count
    return first


def _checked_references(i: int, given: Sequence[str]) -> Sequence[str]:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"references[{i}] must be a string or a list of strings, got {type(given).__name__}")
    if not given:
        raise ValueError(f"references[{i}] is an empty list: each prediction needs at least one reference")
    for j, text in enumerate(given):
        if not isinstance(text, str):
            raise TypeError(f"references[{i}][{j}] must be a string, got {type(text).__name__}")
    return given


def _as_numbers(texts: Sequence[str], split: Callable[[str], list[str]]) -> list[str]:
    """Each text with a number for each of its words, which rouge-score's tokenizer, in C++, takes for words."""
    numbers: dict[str, str] = {}
    return [" ".join([numbers.setdefault(word, str(len(numbers))) for word in split(text)]) for text in texts]


def _stems(words: Sequence[str]) -> np.ndarray:
    """A number for each word's stem, below the number of words; -1 where the stem does not count. [words] int32."""
    numbers = {"": -1}
    return np.array([numbers.setdefault(stem, len(numbers) - 1) for stem in map(_stem, words)], dtype=np.int32)


@functools.lru_cache(maxsize=1 << 18)  # words: a stem takes ten microseconds, and texts share most of their words
def _stem(word: str) -> str:
    """The stem; empty where it has characters besides a-z and 0-9, for which rouge-score drops a token."""
    stem = _stemmer().stem(word) if len(word) > 3 else word
    return stem if _VALID.fullmatch(stem) else ""


@functools.cache
def _stemmer() -> Any:
    from nltk.stem import porter  # here, not above: importing nltk takes a second

    return porter.PorterStemmer()
