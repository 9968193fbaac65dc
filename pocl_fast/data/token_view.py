"""A sample's tokens as text, each with what training does with it: asked, trained on, read along, cut.

Knows tokenizers and encoded samples. Does not know how a sample became tokens (encoding.py), nor how tokens are shown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any, Literal

from pocl_fast.data.byte_tokens import byte_signs
from pocl_fast.data.encoded import EncodedSample

Kind = Literal["prompt", "supervised", "context", "cut"]
KINDS: dict[Kind, str] = {
    "prompt": "what the model is asked with",
    "supervised": "what it is trained to say",
    "context": "read along, not trained on",
    "cut": "in the record, and left out",
}
_PARTIAL = "\ufffd"  # what a decoder writes for a part of a character
_LONGEST = 4  # bytes of a character, so of tokens that share one
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's tokens of one byte
_EXACT = 4096  # tokens; more are not decoded anew from the beginning for each


@dataclass(frozen=True)
class Token:
    """One token; or several that share a character, which none of them says alone."""

    ids: tuple[int, ...]
    text: str  # the characters that it completes: those of all tokens joined are the sample's text
    kind: Kind
    place: int | None  # of the first id among the sample's tokens, from 0; None of what is cut
    added: bool = False  # a token that no text is cut into: special tokens, and others beside the vocabulary's own
    raw: str = ""  # its bytes, where it is a part of a character whose other part is of another kind


@dataclass(frozen=True)
class TokenView:
    """A sample's tokens in the record's order; what is cut stands where it was."""

    tokens: tuple[Token, ...]

    @property
    def text(self) -> str:
        """What all tokens say, those that are cut too."""
        return "".join(token.text for token in self.tokens)

    def count(self, kind: Kind) -> int:
        """How many ids are of a kind."""
        return sum(len(token.ids) for token in self.tokens if token.kind == kind)


def token_view(encoded: EncodedSample | None, tokenizer: Any, whole: EncodedSample | None = None) -> TokenView:
    """The tokens of a sample. `whole` is the sample without limits, to show what these took away; `encoded` is None
    where they took all of it."""
    if encoded is None:
        placed: list[_Placed] = [(token, "cut", None) for token in (whole.ids if whole else ())]
    else:
        placed = _with_cut(_kept(encoded), whole.ids if whole else encoded.ids)
    added = frozenset(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    ids = [token for token, _, _ in placed]
    tokens: list[Token] = []
    for start, end, text in _characters(ids, tokenizer):
        tokens += _tokens(placed[start:end], text, tokenizer, added)
    return TokenView(tuple(tokens))


# -- which tokens, and what is done with them --------------------------------------------------------------------------

_Placed = tuple[int, Kind, int | None]  # an id, its kind, its place


def _kept(encoded: EncodedSample) -> list[_Placed]:
    kinds: list[Kind] = ["context"] * len(encoded)
    kinds[: encoded.spans[0][0]] = ["prompt"] * encoded.spans[0][0]
    for start, end in encoded.spans:
        kinds[start:end] = ["supervised"] * (end - start)
    return [(token, kind, place) for place, (token, kind) in enumerate(zip(encoded.ids, kinds, strict=True))]


def _with_cut(kept: list[_Placed], whole: Sequence[int]) -> list[_Placed]:
    """The tokens of a sample with those between them and behind them that only the whole sample has."""
    ids = [token for token, _, _ in kept]
    same = next((i for i, (one, other) in enumerate(zip(ids, whole, strict=False)) if one != other), len(ids))
    if same == len(ids) <= len(whole):
        return [*kept, *_cut(whole[same:])]
    rest = ids[same:]
    for start in range(same, len(whole) - len(rest) + 1):  # turns or text taken out of the prompt, at one place
        if whole[start] == rest[0] and list(whole[start : start + len(rest)]) == rest:
            return [*kept[:same], *_cut(whole[same:start]), *kept[same:], *_cut(whole[start + len(rest) :])]
    joined: list[_Placed] = []
    for what, a, b, c, d in SequenceMatcher(None, list(whole), ids, autojunk=False).get_opcodes():
        joined += _cut(whole[a:b]) if what in ("delete", "replace") else []
        joined += kept[c:d]
    return joined


def _cut(ids: Sequence[int]) -> list[_Placed]:
    return [(token, "cut", None) for token in ids]


def _tokens(placed: Sequence[_Placed], text: str, tokenizer: Any, added: frozenset[int]) -> list[Token]:
    """The tokens that share the characters of a text: one, or one a kind, of which the last has the text."""
    runs = [list(run) for _, run in groupby(placed, key=lambda one: one[1])]
    broken = len(runs) > 1 or (_PARTIAL in text and not _is_whole([token for token, _, _ in placed], tokenizer))
    tokens = []
    for position, run in enumerate(runs):
        ids = tuple(token for token, _, _ in run)
        raw = _bytes_in_words(ids, tokenizer) if broken else ""
        said = text if position == len(runs) - 1 else ""
        tokens.append(Token(ids, said, run[0][1], run[0][2], len(ids) == 1 and ids[0] in added, raw))
    return tokens


# -- what tokens say ---------------------------------------------------------------------------------------------------


def _characters(ids: Sequence[int], tokenizer: Any) -> list[tuple[int, int, str]]:
    """Which tokens say which text together: from, to, text. The texts joined are what the tokenizer decodes of all."""
    found = _decoded(ids, tokenizer, anew=False)
    if len(ids) <= _EXACT and "".join(text for _, _, text in found) != _decode(ids, tokenizer):
        found = _decoded(ids, tokenizer, anew=True)
    return found


def _decoded(ids: Sequence[int], tokenizer: Any, *, anew: bool) -> list[tuple[int, int, str]]:
    """What each token adds to the text of those before it: of the last ones alone, which are all that matter to most
    decoders, or `anew` from the first."""
    found: list[tuple[int, int, str]] = []
    behind = start = 0
    for end in range(1, len(ids) + 1):
        before, now = _decode(ids[behind:start], tokenizer), _decode(ids[behind:end], tokenizer)
        text = now[len(before) :] if now.startswith(before) else _PARTIAL
        goes_on = end < len(ids) and end - start < _LONGEST
        if text.endswith(_PARTIAL) and goes_on and not _is_whole(ids[start:end], tokenizer):
            continue
        if not now.startswith(before):
            text = _decode(ids[start:end], tokenizer)
        found.append((start, end, text))
        behind, start = 0 if anew else start, end
    return found


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return (
        str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
    )


def _is_whole(ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether the tokens' bytes are whole characters: a text may have a U+FFFD of its own."""
    parts = [_bytes(token, tokenizer) for token in ids]
    if None in parts:
        return False
    try:
        b"".join(part for part in parts if part is not None).decode()
    except UnicodeDecodeError:
        return False
    return True


def _bytes(token: int, tokenizer: Any) -> bytes | None:
    """The bytes of a token that stands for some; None where its vocabulary is not of bytes."""
    piece = tokenizer.convert_ids_to_tokens(int(token))
    if isinstance(piece, bytes):
        return piece
    if found := _BYTE.fullmatch(piece or ""):
        return bytes([int(found[1], 16)])
    alphabet = byte_signs()
    return bytes(alphabet[sign] for sign in piece) if piece and all(sign in alphabet for sign in piece) else None


def _bytes_in_words(ids: Sequence[int], tokenizer: Any) -> str:
    """The bytes in hexadecimal, such as ⟨F0 9F⟩; of a token that is not known by bytes its name in the vocabulary."""
    parts = []
    for token in ids:
        known = _bytes(token, tokenizer)
        parts.append(str(tokenizer.convert_ids_to_tokens(int(token))) if known is None else known.hex(" ").upper())
    return f"⟨{' '.join(parts)}⟩"
