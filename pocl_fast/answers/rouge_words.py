"""The words that ROUGE-L compares, by the tokenizer that is asked for, and which texts a tokenizer does not see.

Knows Unicode. Does not know how words are compared (rouge.py).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from typing import Literal, get_args

Tokenizer = Literal["rouge_score", "unicode_words", "characters"]
TOKENIZERS: tuple[str, ...] = get_args(Tokenizer)

# Scripts that put no spaces between words, by the first word of their characters' Unicode names
_UNSPACED = frozenset({
    "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO", "YI", "TANGUT", "THAI", "LAO",
    "KHMER", "MYANMAR",
})  # fmt: skip


class _Spaced(dict[int, str]):
    """A character -> itself, apart from its neighbours or a space; for `str.translate`, filled as characters come."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if unicodedata.category(char)[0] not in "LMN":  # no letter, mark or number
            shown = " "
        elif unicodedata.name(char, "").split(" ")[0] in _UNSPACED:
            shown = f" {char} "
        else:
            shown = char
        self[code] = shown
        return shown


_SPACED = _Spaced()


def unicode_words(text: str) -> list[str]:
    """The runs of letters, marks and numbers of any script, in NFKC form and with their case folded; each character of
    a script without spaces between words (Chinese, Japanese, Thai, ...) is a word."""
    return _plain(text).translate(_SPACED).split()


def characters(text: str) -> list[str]:
    """Every character but white space, in NFKC form and with its case folded."""
    return list("".join(_plain(text).split()))


def split_by(tokenizer: Tokenizer) -> Callable[[str], list[str]]:
    """What cuts a text into words, for a tokenizer that Python computes."""
    return unicode_words if tokenizer == "unicode_words" else characters


def unseen(text: str, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer finds no word in a text, or less than half of its letters and digits."""
    if tokenizer != "rouge_score":
        return not split_by(tokenizer)(text)
    lowered = text.lower()
    seen = sum(char.isascii() and char.isalnum() for char in lowered)
    return not seen or 2 * seen < sum(map(str.isalnum, lowered))


def unseen_line(references: Iterable[str], tokenizer: Tokenizer, name: str) -> str | None:
    """The line that says in how many references ROUGE-L is blind, and what to do; None where it is in none."""
    count = blind = 0
    for count, text in enumerate(references, start=1):  # noqa: B007 (the last one is how many)
        blind += unseen(text, tokenizer)
    if not blind:
        return None
    others = " or ".join(one for one in TOKENIZERS if one != "rouge_score" and one != tokenizer)
    sees = "a-z and 0-9 alone" if tokenizer == "rouge_score" else "letters and digits alone"
    return (
        f"{name}: ROUGE-L is blind for {blind:,} of {count:,} references: its tokenizer {tokenizer} sees {sees}, which"
        f" is less than half of their letters. Give --rouge-tokenizer {others} for these"
    )


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
