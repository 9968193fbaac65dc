"""The tokens of a prompt and of its answer, out of the two as one text: which token begins the answer.

Knows tokenizers. Does not know templates, nor what ends an answer (encoding.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise
from typing import Any

from pocl_fast.data.byte_tokens import ByteTokens
from pocl_fast.data.marked_tokenizer import MarkedTokenizer
from pocl_fast.system import tokenizer_threads

_NEAR = 16  # tokens from the end of a prompt in which an added token is looked for: a header has fewer
_ANCHORS = ("1", "a", ".", "\n", "]", "#")  # texts that stand before an answer to be tokenised without its prompt


class TokenBorder:
    """Cuts a tokenised text where the answer begins.

    Prompt and answer are tokenised as one text, as a model reads them. A blank before the answer that its first token
    takes in, as SentencePiece does, belongs to the answer. Any other text of the prompt stays in it: where a token
    would take in some of it, such as the header's line end, prompt and answer are tokenised apart. So every answer to
    a question has the prompt that a model is asked with. A special token that swallows the blanks behind it is the
    prompt's.
    """

    def __init__(self, tokenizer: Any, special: frozenset[int], marked: MarkedTokenizer | None = None) -> None:
        """`special` are the ids of the tokenizer's added tokens; `marked` cuts texts that may have marks."""
        self._plain, self._special, self._marked = tokenizer, special, marked
        self._tokenizer = marked or tokenizer
        self._bytes = ByteTokens.of(tokenizer, self._as_asked)
        self._tails: dict[str, list[int]] = {}  # ends of prompts, from an added token on

    def parts(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """The prompt's tokens and the answer's."""
        return self._parts(self._tokenizer(prompt + answer, add_special_tokens=False), 0, prompt, answer)

    def turns_of(self, conversations: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """The `turns` of each conversation's texts. Fast tokenizers take all without marks in one call, on several
        threads."""
        if not self._plain.is_fast or len(conversations) == 1:
            return [self.turns(texts) for texts in conversations]
        whole = ["".join(texts) for texts in conversations]
        if self._marked is not None and any(map(self._marked.has_marks, whole)):
            plain = [not self._marked.has_marks(text) for text in whole]
            pairs = list(zip(conversations, plain, strict=True))
            others = iter(self.turns_of([texts for texts, one in pairs if one]))
            return [next(others) if one else self.turns(texts) for texts, one in pairs]
        with tokenizer_threads.on():
            found = self._bytes.turns_of(conversations) if self._bytes else [None] * len(conversations)
            left = [text for text, turns in zip(whole, found, strict=True) if turns is None]
            encoded = self._plain(left, add_special_tokens=False) if left else None
        number = count()
        pairs_found = zip(conversations, found, strict=True)
        return [turns or self._turns(encoded, next(number), texts) for texts, turns in pairs_found]

    def turns(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of the texts that make one conversation: what stands before an answer and the answer, by turns.

        Each answer has the tokens that `parts` gives of it as the last one: where a token of the whole text crosses the
        border before or behind an answer, the texts are tokenised apart.
        """
        if len(texts) > 2 and not self._tokenizer.is_fast:
            return self._apart(texts)
        return self._turns(self._tokenizer("".join(texts), add_special_tokens=False), 0, texts)

    def _turns(self, encoded: Any, number: int, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts that were tokenised with others, as the ones of this `number`."""
        if len(texts) == 2:
            return list(self._parts(encoded, number, *texts))
        return self._joint(encoded.encodings[number], texts) or self._apart(texts)

    def _parts(self, encoded: Any, number: int, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """The two parts of a text that was tokenised with others, as the one of this `number`."""
        if self._tokenizer.is_fast:
            encoding = encoded.encodings[number]
            ids = encoding.ids
            first, taken = self._first_token(encoding, prompt, answer)
            # no merge crosses the border here; but blanks are split by what follows them
            blanks = not taken and prompt[-2:].isspace() and not self._as_asked(prompt, ids[:first])
            if blanks and ids[:first] != (asked := self._ids(prompt)):
                return asked, self._alone(answer) or ids[first:]
        else:
            ids = list(encoded.input_ids)
            first, taken = self._first_other(ids, prompt)
        if taken.strip(" ▁Ġ") or len(taken) > 1:
            apart = self._alone(answer)
            if apart is not None:
                return self._ids(prompt), apart
        return ids[:first], ids[first:]

    def _joint(self, encoding: Any, texts: Sequence[str]) -> list[list[int]] | None:
        """The tokens of all as one text; None where one of them crosses a border."""
        whole, ids = "".join(texts), encoding.ids
        cuts, place = [0], 0
        for number, text in enumerate(texts[:-1]):
            place += len(text)
            first, taken = self._first_token(encoding, whole[:place], whole[place:])
            begins = number % 2 == 0
            if taken.strip(" ▁Ġ") or len(taken) > (1 if begins else 0):
                return None
            blank = not taken and text[-2:].isspace() and len(text) > 1  # blanks are split by what follows them
            if blank and not self._as_asked(whole[:place], ids[:first]):
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

    def _as_asked(self, prompt: str, ids: Sequence[int]) -> bool:
        """Whether these tokens, of a prompt with more behind it, are surely those of it alone: an added token near its
        end cuts the text, and what stands from there on has these tokens too."""
        place = next((i for i in range(len(ids) - 1, max(-1, len(ids) - _NEAR), -1) if ids[i] in self._special), None)
        if place is None:
            return False
        tail = prompt[max(0, prompt.rfind(self._tokenizer.convert_ids_to_tokens([ids[place]])[0])) :]
        if len(tail) > _NEAR * 4:
            return False
        if tail not in self._tails:
            if len(self._tails) > 1000:
                self._tails.clear()
            self._tails[tail] = self._ids(tail)
        return self._tails[tail] == list(ids[place:])

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

    def _first_token(self, encoding: Any, prompt: str, answer: str) -> tuple[int, str]:
        """The first token with a character of the answer, or one there that stands for no character, such as
        SentencePiece's blank at the start of a word; and the text of the prompt that it takes in."""
        ids, border = encoding.ids, len(prompt)
        place = border
        last = encoding.token_to_chars(len(ids) - 1) if ids else None
        limit = last[1] if last else border
        first = None
        while first is None and place < limit:  # blanks that the tokenizer drops are in no token
            first, place = encoding.char_to_token(place), place + 1
        if first is None:
            return len(ids), ""
        span = encoding.token_to_chars(first)
        crosses = span is not None and span[0] < border
        if crosses and answer[: span[1] - border].isspace() and ids[first] in self._special:
            return first + 1, ""
        while first > 0 and (before := encoding.token_to_chars(first - 1)) is not None and before[0] >= border:
            first -= 1
        return first, prompt[span[0] : border] if crosses else ""

    def _first_other(self, ids: Sequence[int], prompt: str) -> tuple[int, str]:
        """The same of a tokenizer that does not tell where its tokens are: the first token that the prompt alone has
        not."""
        asked = self._ids(prompt)
        pairs = zip(asked, ids, strict=False)
        first = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(asked), len(ids)))
        if first == len(asked):
            return first, ""
        return first, "".join(self._tokenizer.convert_ids_to_tokens(asked[first:]))
