"""Many texts as token ids, of tokenizers whose tokens are the bytes of their text: these need not be asked where in the
text a token is, which takes a fifth of their time.

Knows tokenizers. Does not know what a text is, nor how one is cut where no token begins (token_border.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

_Parts = tuple[list[int], list[int]]


class ByteTokens:
    """Cuts texts in two at a border between tokens. That a text's tokens are its bytes is seen at each text: the bytes
    of all of them, one behind the other, must be the text's."""

    def __init__(self, tokenizer: Any, bytes_of: list[bytes]) -> None:
        """`bytes_of` are those of each token id."""
        self._tokenizer, self._bytes_of = tokenizer, bytes_of
        self._helps = True

    @classmethod
    def of(cls, tokenizer: Any) -> ByteTokens | None:
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
        return None if bytes_of is None else cls(tokenizer, bytes_of)

    def parts_of(self, texts: Sequence[tuple[str, str]]) -> list[_Parts | None]:
        """The tokens of each prompt and of the answer behind it, tokenised as one text. None where no token begins at
        the answer, where it may be the tokenizer's choice which of the two a blank belongs to, and where the tokens are
        not the text's bytes."""
        if not self._helps:
            return [None] * len(texts)
        self._tokenizer("", add_special_tokens=False)  # the settings of this call, in place of those of the last one
        whole = ["".join(text) for text in texts]
        encoded = self._tokenizer._tokenizer.encode_batch_fast(whole, add_special_tokens=False)
        pairs = zip(encoded, whole, texts, strict=True)
        found = [self._cut(one.ids, text, prompt) for one, text, (prompt, _) in pairs]
        self._helps = sum(parts is None for parts in found) <= len(found) // 2  # else texts are tokenised twice
        return found

    def _cut(self, ids: list[int], text: str, prompt: str) -> _Parts | None:
        if prompt[-1:] == " " or prompt[-2:].isspace() or text[len(prompt) :].isspace():
            return None
        tokens = [self._bytes_of[one] for one in ids]
        if b"".join(tokens) != text.encode():
            return None
        ends = list(accumulate(map(len, tokens)))
        border = len(prompt.encode())
        first = bisect_left(ends, border) + 1 if border else 0
        if border and ends[first - 1] != border:
            return None
        return ids[:first], ids[first:]


def _bytes_of(backend: Any) -> list[bytes] | None:
    """The bytes of each token, by id, of a vocabulary that is written in byte-level BPE's signs for bytes."""
    signs = {sign: byte for byte, sign in enumerate(_signs())}
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


def _signs() -> list[str]:
    """GPT-2's sign of each byte: the byte's own where it can be printed, else the next one from 256 on."""
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    signs, free = [], 256
    for byte in range(256):
        signs.append(chr(byte if byte in printed else free))
        free += byte not in printed
    return signs
