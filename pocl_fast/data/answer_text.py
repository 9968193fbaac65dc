"""What of a model's answer is compared with a reference: its text without what the template writes around an answer,
and without reasoning that the reference has not.

Knows tokens and texts. Does not know how answers are scored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pocl_fast.templates.answer_span import REASONING_TAGS, Shape


class AnswerReader:
    """Reads answers of a model that was prompted in a template of this shape."""

    def __init__(self, tokenizer: Any, shape: Shape, *, ends_with_token: bool = False) -> None:
        """`ends_with_token`: the template's end of turn is a token, before which an answer stops. As text it is a part
        of the answer then."""
        self._tokenizer, self._shape = tokenizer, shape
        self._plain_end = "" if ends_with_token else shape.end.strip()

    def texts(self, answers: Sequence[Sequence[int]], references: Sequence[Sequence[str]] | None = None) -> list[str]:
        """The text of each answer, given as token ids without the end token, without special tokens and outer blanks.

        A block of reasoning before the answer is left out, but where a reference has one too: there it gets the opening
        tag and the blanks around tags that the reference has, for the prompt may have opened it. What the template
        writes between prompt and answer, such as an empty block, is always left out.
        """
        plain = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        raw = self._tokenizer.batch_decode(answers, skip_special_tokens=False)
        texts = []
        for place, answer in enumerate(answers):
            before = self._before(raw[place], references[place] if references else ())
            text = plain[place]
            if references and (block := self._reasoning_as_in(answer, raw[place], references[place])):
                text = block
            elif before:
                first = self._first_behind(answer, before)
                text = self._tokenizer.decode(list(answer[first:]), skip_special_tokens=True)
            texts.append(self._without_end(text).strip())
        return texts

    def _before(self, raw: str, references: Sequence[str]) -> int:
        """How many characters of the answer are not to be compared."""
        opening = self._shape.opening.strip()
        skipped = len(raw) - len(raw.lstrip())
        if opening and raw.startswith(opening, skipped):
            return skipped + len(opening)
        for opens, closes in self._shape.reasoning:
            if any(closes in reference for reference in references):
                continue
            found = raw.find(closes)
            if found >= 0 and raw.startswith(opens, skipped):
                return found + len(closes)
        return 0

    def _reasoning_as_in(self, answer: Sequence[int], raw: str, references: Sequence[str]) -> str:
        """The answer with its block of reasoning written as in the first reference that has one; empty where there is
        no such reference, or no such block in the answer."""
        opening = self._shape.opening.strip()
        skipped = raw.find(opening) + len(opening) if opening and raw.lstrip().startswith(opening) else 0
        for opens, closes in self._shape.reasoning:
            reference = next((one for one in references if closes in one), None)
            if reference is None or closes not in raw:
                continue
            tag = opens or closes.replace("/", "", 1)
            start = skipped if closes in raw[skipped:] else 0  # behind an empty block that the template writes
            if not raw[start:].lstrip().startswith(opens) and reference.lstrip().startswith(tag):
                continue
            begin, first = (
                self._first_behind(answer, place) for place in (start, raw.index(closes, start) + len(closes))
            )
            block = self._tokenizer.decode(list(answer[begin:first]), skip_special_tokens=True)
            said = self._tokenizer.decode(list(answer[first:]), skip_special_tokens=True)
            thought = block.strip().removesuffix(closes).strip().removeprefix(tag).strip()
            theirs, _, behind = reference.lstrip().partition(closes)
            head = theirs[: len(theirs) - len(theirs.removeprefix(tag).lstrip())]
            foot = theirs[max(len(head), len(theirs.rstrip())) :]
            gap = behind[: len(behind) - len(behind.lstrip())]
            return head + thought + foot + closes + gap + said.strip()
        return ""

    def _first_behind(self, answer: Sequence[int], characters: int) -> int:
        """The first token that begins behind so many characters of the answer."""
        low, high = 0, len(answer)
        while low < high:
            middle = (low + high) // 2
            if len(self._tokenizer.decode(list(answer[:middle]), skip_special_tokens=False)) < characters:
                low = middle + 1
            else:
                high = middle
        return low

    def _without_end(self, text: str) -> str:
        """Without an end of turn that is plain text: words in brackets end the answer wherever they are."""
        end = self._plain_end
        if not end:
            return text
        if re.fullmatch(r"<\S+>|\[\S+\]", end):
            return text.partition(end)[0]
        return text.rstrip().removesuffix(end)


PLAIN = Shape(reasoning=(REASONING_TAGS,))  # of the Alpaca template
