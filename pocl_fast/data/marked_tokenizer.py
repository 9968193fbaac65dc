"""A tokenizer for texts in which some control tokens are marked as plain text.

Knows tokenizers from inside: the `tokenizers` library's description of one, and those in Python. Does not know which
tokens are control tokens, nor where the marks come from (control_text.py).
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from pocl_fast.records.bad_records import BadRecord

# Syllables of Yi: letters without case, so no normalizer, filter of jinja or repr() changes them. Four by chance are
# in no text.
_FIRST, _LAST = 0xA000, 0xA48C
# texts that the copy must cut as the tokenizer does
_PROBES = ("Hello, world! It's 12.", " two  spaces\n\n\tx ", "caf\u00e9 \u4f60\u597d", "<a|b> [c] </d>")


def can_be_marked(token: str) -> bool:
    """Whether a mark can stand within a token: single signs and blanks are text in any case."""
    return len(token) > 1 and not token.isspace()


class MarkedTokenizer:
    """Cuts texts with marks as if these were not there, but for control tokens with a mark in them, which are text.

    A text without marks is the tokenizer's own. Else the control tokens that the tokenizer finds in it, those without
    marks, are written under names that no text has, the marks are taken out, and a copy of the tokenizer that knows
    control tokens by these names alone cuts the whole. So what stands around the plain ones is read as any text is.
    Places in a text are those of the text with marks. Raises `BadRecord` where a tokenizer cannot be copied so, or its
    model makes control tokens out of plain text.
    """

    def __init__(self, tokenizer: Any, control: Mapping[str, int]) -> None:
        self._tokenizer, self._control = tokenizer, dict(control)
        signs = list(map(chr, random.SystemRandom().sample(range(_FIRST, _LAST + 1), 7)))
        self.mark, self._prefix = "".join(signs[:4]), "".join(signs[4:])
        self.where = ""  # the sample that is cut, for errors
        codes = [f"u{ord(sign):04x}" for sign in self.mark]  # as json.dumps writes it where it is to be ASCII
        self._escaped = (codes[0], codes[0].upper().replace("U", "u"))
        escaped = "".join(rf"\\+{code}" for code in codes)
        self._marks = re.compile(f"{self.mark}|(?:{escaped})", re.IGNORECASE)
        self._unknown = tokenizer.unk_token_id

    @property
    def is_fast(self) -> bool:
        return bool(self._tokenizer.is_fast)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """As the tokenizer's."""
        return list(self._tokenizer.convert_ids_to_tokens(ids))

    def unmarked(self, text: str) -> str:
        """The text without marks."""
        return self._marks.sub("", text)

    def has_marks(self, text: str) -> bool:
        """Whether there are marks in a text."""
        return self.mark in text or any(code in text for code in self._escaped)

    def __call__(self, text: str, add_special_tokens: bool = False) -> Any:
        """`input_ids` of a text and, of a fast tokenizer, `encodings`: of it alone."""
        if not self.has_marks(text):
            return self._tokenizer(text, add_special_tokens=add_special_tokens)
        written = self._written(text)
        renamed = _Renamed(text, [(a, b, self._names[token]) for a, b, token in written], self._marks)
        encoded = self._copy(renamed.text)
        ids = list(encoded.input_ids)
        known = set(self._control.values()) - {self._unknown}
        if [i for i in ids if i in known] != [i for *_, token in written if (i := self._control[token]) in known]:
            raise self._refusal(self._first_marked(text))
        return renamed.encoding(ids, encoded)

    def normalized_places(self, text: str, tokens: Collection[str]) -> list[int]:
        """Where control tokens begin that the tokenizer finds after normalising the text alone, such as </S>."""
        if not self.finds_normalized:
            return []
        return [start for start, _, token in self._written(text) if token in tokens]

    # -- inside -----------------------------------------------------------------------------------------------------

    @cached_property
    def finds_normalized(self) -> bool:
        """Whether control tokens are found in the normalised text, so that others than their own signs say them."""
        if not self.is_fast or self._tokenizer.backend_tokenizer.normalizer is None:
            return False
        added = self._tokenizer.added_tokens_decoder.values()
        return any(token.normalized and token.content in self._control for token in added)

    def _written(self, text: str) -> list[tuple[int, int, str]]:
        """The control tokens that the tokenizer finds in a text: from, to, which."""
        if not self.is_fast:
            return self._split_by_trie(text)
        of_id = self._of_id
        encoded = self._tokenizer(text, add_special_tokens=False)
        found = []
        for place, id_ in enumerate(encoded.input_ids):
            token = of_id.get(id_)
            span = encoded.token_to_chars(place) if token is not None else None
            if token is None or span is None:
                continue
            said = text[span.start : span.end]
            blanks = len(said) - len(said.lstrip())  # a token may take in the blanks around it
            start = span.start + (said.find(token) if token in said else blanks)
            end = start + (len(token) if token in said else len(said.strip()))
            if id_ != self._unknown or token in said:  # an unknown word is no <unk>
                found.append((start, end, token))
        return found

    def _split_by_trie(self, text: str) -> list[tuple[int, int, str]]:
        try:
            parts = self._tokenizer.tokens_trie.split(text)
        except AttributeError as error:
            raise self._refusal(self._first_marked(text)) from error
        found, place = [], 0
        for part in parts:
            if part in self._control:
                found.append((place, place + len(part), part))
            place += len(part)
        return found

    @cached_property
    def _of_id(self) -> dict[int, str]:
        return {id_: token for token, id_ in self._control.items()}

    @cached_property
    def _names(self) -> dict[str, str]:
        """A name of each control token that no text has; none begins another."""
        width = _LAST - _FIRST + 1
        pairs = (divmod(number, width) for number in range(len(self._control)))
        return {
            token: f"{self._prefix}{chr(_FIRST + one)}{chr(_FIRST + other)}"
            for token, (one, other) in zip(self._control, pairs, strict=True)
        }

    @cached_property
    def _copy(self) -> Callable[[str], Any]:
        """Cuts texts in which control tokens have their other names."""
        try:
            cut = (
                _fast_copy(self._tokenizer, self._names) if self.is_fast else _python_copy(self._tokenizer, self._names)
            )
            named = list(cut(" ".join(self._names.values())).input_ids)
            same = all(list(cut(text).input_ids) == self._own(text) for text in _PROBES)
        except Exception as error:  # a tokenizer may be anybody's code
            raise self._refusal(None, f" ({type(error).__name__}: {error})") from error
        known = set(self._control.values()) - {self._unknown}
        if not same or [i for i in named if i in known] != [i for i in self._control.values() if i in known]:
            raise self._refusal(None)
        return cut

    def _own(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _first_marked(self, text: str) -> str | None:
        """The first control token that is marked as text."""
        found = self._marks.search(text)
        said = self.unmarked(text[max(0, found.start() - 1) :]) if found else ""
        return next((token for token in self._control if said.startswith(token)), None)

    def _refusal(self, token: str | None, why: str = "") -> BadRecord:
        which = f"the control token {token!r}" if token else "a control token"
        return BadRecord(
            f"{self.where}: its text has {which}, which this tokenizer ({type(self._tokenizer).__name__}) cannot keep"
            f" as text{why}: leave the record out, write the token otherwise, or make it the token itself with"
            " --special-tokens parse",
            "control tokens that cannot stay text",
        )


class _Renamed:
    """A text with some of its tokens under other names and without marks, and where its characters come from."""

    def __init__(self, text: str, names: Sequence[tuple[int, int, str]], marks: re.Pattern[str]) -> None:
        pieces = [*names, *((match.start(), match.end(), "") for match in marks.finditer(text))]
        self._from: list[int] = []  # of each character of `text`: where it is in the given text
        self._to: list[int] = []
        self._place: list[int] = []  # of each character of the given text: where it is in `text`
        before = length = 0
        written: list[str] = []
        for start, end, name in [*sorted(pieces), (len(text), len(text), "")]:
            self._from += [*range(before, start), *[start] * len(name)]
            self._to += [*range(before + 1, start + 1), *[end] * len(name)]
            kept = length + start - before
            self._place += [*range(length, kept), *[kept] * (end - start)]
            written += [text[before:start], name]
            before, length = end, kept + len(name)
        self.text = "".join(written)

    def encoding(self, ids: list[int], encoded: Any) -> Any:
        """The tokens of `text` with the places of the given text."""

        def chars(token: int) -> tuple[int, int] | None:
            span = encoded.token_to_chars(token)
            if span is None or not self._from:
                return None
            if span.start == span.end:  # stands for no character
                place = self._from[span.start] if span.start < len(self._from) else self._to[-1]
                return place, place
            return self._from[span.start], self._to[span.end - 1]

        def token(place: int) -> Any:
            inside = place < len(self._place) and self._place[place] < len(self.text)
            return encoded.char_to_token(self._place[place]) if inside else None

        one = SimpleNamespace(ids=ids, token_to_chars=chars, char_to_token=token)
        return SimpleNamespace(input_ids=ids, encodings=[one])


def _fast_copy(tokenizer: Any, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A copy of a tokenizer of the `tokenizers` library that knows some tokens by these names alone, in its model's
    vocabulary too, where no plain text makes them then."""
    from tokenizers import Tokenizer
    from transformers import BatchEncoding

    made = json.loads(tokenizer.backend_tokenizer.to_str())
    made["truncation"] = made["padding"] = None
    for token in made["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = made["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): id_ for piece, id_ in model["vocab"].items()}
    else:  # Unigram: pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]
    backend = Tokenizer.from_str(json.dumps(made))

    def cut(text: str) -> Any:
        encoding = backend.encode(text, add_special_tokens=False)
        return BatchEncoding({"input_ids": encoding.ids}, encoding=encoding)

    return cut


def _makes(merge: Any, names: Mapping[str, str]) -> bool:
    """Whether a merge makes one of these tokens, or is of one."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _python_copy(tokenizer: Any, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The same of a tokenizer in Python, whose model is left as it is."""
    from tokenizers import AddedToken
    from transformers.tokenization_python import Trie

    def renamed(token: Any) -> Any:
        other = names.get(str(token))
        if other is None:
            return token
        return (
            AddedToken(other, **{flag: getattr(token, flag) for flag in _FLAGS}) if hasattr(token, "content") else other
        )

    made = copy.deepcopy(tokenizer)
    made._added_tokens_decoder = {id_: renamed(token) for id_, token in made._added_tokens_decoder.items()}
    made._added_tokens_encoder = {token.content: id_ for id_, token in made._added_tokens_decoder.items()}
    made._special_tokens_map = {
        field: [renamed(one) for one in token] if isinstance(token, (list, tuple)) else renamed(token)
        for field, token in made._special_tokens_map.items()
    }
    made._extra_special_tokens = [renamed(token) for token in made._extra_special_tokens]
    made.tokens_trie = Trie()
    made._update_trie()
    return lambda text: made(text, add_special_tokens=False)


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
