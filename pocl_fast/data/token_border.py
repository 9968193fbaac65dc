"""The tokens of a prompt and of its answer, out of the two as one text: which token begins the answer.

Knows tokenizers. Does not know templates, nor what ends an answer (encoding.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

_ANCHORS = ("1", "a", ".", "\n", "]", "#")  # texts that stand before an answer to be tokenised without its prompt


class TokenBorder:
    """Cuts a tokenised text where the answer begins.

    Prompt and answer are tokenised as one text, as a model reads them. A blank before the answer that its first token
    takes in, as SentencePiece does, belongs to the answer. Any other text of the prompt stays in it: where a token
    would take in some of it, such as the header's line end, prompt and answer are tokenised apart. So every answer to
    a question has the prompt that a model is asked with. A special token that swallows the blanks behind it is the
    prompt's.
    """

    def __init__(self, tokenizer: Any, special: frozenset[int]) -> None:
        """`special` are the ids of the tokenizer's added tokens."""
        self._tokenizer, self._special = tokenizer, special

    def parts(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """The prompt's tokens and the answer's."""
        encoded = self._tokenizer(prompt + answer, add_special_tokens=False)
        ids = list(encoded.input_ids)
        if self._tokenizer.is_fast:
            first, taken = self._first_token(encoded, prompt, answer)
            # no merge crosses the border here; but blanks are split by what follows them
            if not taken and prompt[-2:].isspace() and ids[:first] != (asked := self._ids(prompt)):
                return asked, self._alone(answer) or ids[first:]
        else:
            first, taken = self._first_other(ids, prompt)
        if taken.strip(" ▁Ġ") or len(taken) > 1:
            apart = self._alone(answer)
            if apart is not None:
                return self._ids(prompt), apart
        return ids[:first], ids[first:]

    def turns(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of the texts that make one conversation: what stands before an answer and the answer, by turns.

        Each answer has the tokens that `parts` gives of it as the last one: where a token of the whole text crosses the
        border before or behind an answer, the texts are tokenised apart.
        """
        return (self._joint(texts) if self._tokenizer.is_fast else None) or self._apart(texts)

    def _joint(self, texts: Sequence[str]) -> list[list[int]] | None:
        """The tokens of all as one text; None where one of them crosses a border."""
        whole = "".join(texts)
        encoded = self._tokenizer(whole, add_special_tokens=False)
        ids = list(encoded.input_ids)
        cuts, place = [0], 0
        for number, text in enumerate(texts[:-1]):
            place += len(text)
            first, taken = self._first_token(encoded, whole[:place], whole[place:])
            begins = number % 2 == 0
            if taken.strip(" ▁Ġ") or len(taken) > (1 if begins else 0):
                return None
            if not taken and text[-2:].isspace() and len(text) > 1:  # blanks are split by what follows them
                asked = self._ids(text)[-4:]
                if ids[first - len(asked) : first] != asked:
                    return None
            cuts.append(first)
        return [ids[start:end] for start, end in pairwise([*cuts, len(ids)])]

    def _apart(self, texts: Sequence[str]) -> list[list[int]]:
        made: list[list[int]] = []
        for before, answer in zip(texts[::2], texts[1::2], strict=True):
            made += self._behind(made[-1], before, answer) if made else self.parts(before, answer)
        return made

    def _behind(self, last: Sequence[int], before: str, answer: str) -> tuple[list[int], list[int]]:
        """The `parts` of texts that follow the answer with these tokens, so that they do not begin a text."""
        ends = self._tokenizer.convert_ids_to_tokens([last[-1]]) if last and last[-1] in self._special else []
        for anchor in (*ends, *_ANCHORS):
            known = self._ids(anchor)
            asked, said = self.parts(anchor + before, answer)
            if known and asked[: len(known)] == known:
                return asked[len(known) :], said
        return self.parts(before, answer)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _alone(self, answer: str) -> list[int] | None:
        """The answer's tokens behind a text that none of them takes in, so that it does not count as a text's
        beginning; None where there is no such text."""
        for anchor in _ANCHORS:
            before, both = self._ids(anchor), self._ids(anchor + answer)
            if before and both[: len(before)] == before:
                return both[len(before) :]
        return None

    def _first_token(self, encoded: Any, prompt: str, answer: str) -> tuple[int, str]:
        """The first token with a character of the answer, or one there that stands for no character, such as
        SentencePiece's blank at the start of a word; and the text of the prompt that it takes in."""
        ids, border = encoded.input_ids, len(prompt)
        place = border
        last = encoded.token_to_chars(len(ids) - 1) if ids else None
        limit = last.end if last else border
        first = None
        while first is None and place < limit:  # blanks that the tokenizer drops are in no token
            first, place = encoded.char_to_token(place), place + 1
        if first is None:
            return len(ids), ""
        span = encoded.token_to_chars(first)
        crosses = span is not None and span.start < border
        if crosses and answer[: span.end - border].isspace() and ids[first] in self._special:
            return first + 1, ""
        while first > 0 and (before := encoded.token_to_chars(first - 1)) is not None and before.start >= border:
            first -= 1
        return first, prompt[span.start : border] if crosses else ""

    def _first_other(self, ids: Sequence[int], prompt: str) -> tuple[int, str]:
        """The same of a tokenizer that does not tell where its tokens are: the first token that the prompt alone has
        not."""
        asked = self._ids(prompt)
        pairs = zip(asked, ids, strict=False)
        first = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(asked), len(ids)))
        if first == len(asked):
            return first, ""
        return first, "".join(self._tokenizer.convert_ids_to_tokens(asked[first:]))
