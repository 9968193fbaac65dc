"""Many texts as token ids, of tokenizers whose tokens are the bytes of their text: these need not be asked where in the
text a token is, which takes a fifth of their time.

Knows tokenizers. Does not know what a text is, nor how one is cut where no token begins (token_border.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Any, TypeAlias

_AsAsked: TypeAlias = Callable[[str, Sequence[int]], bool]


class ByteTokens:
    """Cuts texts at borders between tokens. That a text's tokens are its bytes is seen at each text: the bytes
    of all of them, one behind the other, must be the text's."""

    def __init__(self, tokenizer: Any, bytes_of: list[bytes], as_asked: _AsAsked) -> None:
        """`bytes_of` are those of each token id. `as_asked` says whether a text that ends with blanks has these tokens
        as the beginning of a longer one and alone."""
        self._tokenizer, self._bytes_of, self._as_asked = tokenizer, bytes_of, as_asked
        self._helps = True

    @classmethod
    def of(cls, tokenizer: Any, as_asked: _AsAsked = lambda *_: False) -> ByteTokens | None:
        """None of a tokenizer whose tokens are not known to be bytes, and of one that is not as transformers has it."""
        from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

        kind, backend = type(tokenizer), getattr(tokenizer, "_tokenizer", None)
        if not tokenizer.is_fast or not hasattr(backend, "encode_batch_fast"):
            return None
        if kind.__call__ is not PreTrainedTokenizerBase.__call__:
            return None
        if kind._encode_plus is not PreTrainedTokenizerFast._encode_plus:
            return None
        bytes_of = _bytes_of(backend)
        return None if bytes_of is None else cls(tokenizer, bytes_of, as_asked)

    def turns_of(self, conversations: Sequence[Sequence[str]]) -> list[list[list[int]] | None]:
        """The tokens of each conversation's texts, tokenised as one text. None where no token begins at one of them,
        where it may be the tokenizer's choice which of two a blank belongs to, and where the tokens are not the text's
        bytes."""
        if not self._helps:
            return [None] * len(conversations)
        self._tokenizer("", add_special_tokens=False)  # the settings of this call, in place of those of the last one
        whole = ["".join(texts) for texts in conversations]
        encoded = self._tokenizer._tokenizer.encode_batch_fast(whole, add_special_tokens=False)
        each = zip(encoded, whole, conversations, strict=True)
        found = [self._cut(one.ids, text, texts) for one, text, texts in each]
        self._helps = sum(parts is None for parts in found) <= len(found) // 2  # else texts are tokenised twice
        return found

    def _cut(self, ids: list[int], whole: str, texts: Sequence[str]) -> list[list[int]] | None:
        *before, last = texts
        if last.isspace() or any(text[-1:] == " " or text.isspace() for text in before):
            return None
        tokens = itemgetter(*ids)(self._bytes_of) if len(ids) > 1 else [self._bytes_of[one] for one in ids]
        if b"".join(tokens) != whole.encode():
            return None
        ends = list(accumulate(map(len, tokens)))
        cuts, border, place = [0], 0, 0
        for text in before:
            border, place = border + len(text.encode()), place + len(text)
            first = bisect_left(ends, border) + 1 if border else 0
            if border and ends[first - 1] != border:
                return None
            if text[-2:].isspace() and not self._as_asked(whole[:place], ids[:first]):
                return None
            cuts.append(first)
        return [ids[start:end] for start, end in pairwise([*cuts, len(ids)])]


def _bytes_of(backend: Any) -> list[bytes] | None:
    """The bytes of each token, by id, of a vocabulary that is written in byte-level BPE's signs for bytes."""
    signs = byte_signs()
    added = {one: token.content for one, token in backend.get_added_tokens_decoder().items()}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    bytes_of = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, one in vocabulary.items():
        if one in added:
            bytes_of[one] = added[one].encode()
        elif all(sign in signs for sign in token):
            bytes_of[one] = bytes(signs[sign] for sign in token)
        else:
            return None
    return bytes_of


@cache
def byte_signs() -> dict[str, int]:
    """The characters that stand for bytes in the vocabularies of GPT-2's kind."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {sign: byte for byte, sign in bytes_to_unicode().items()}
