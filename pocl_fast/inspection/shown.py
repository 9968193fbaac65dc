"""What a token looks like: blanks, line ends and control characters made visible, for terminal and page alike.

Knows characters. Does not know colours.
"""

from __future__ import annotations

import unicodedata

from pocl_fast.data.token_view import Token

LINE_END = "⏎"
_SIGNS = {"\n": LINE_END + "\n", "\r": "␍", "\t": "⇥"}
_JOINERS = "\u200c\u200d"  # within words of some scripts, and within emoji
_SELECTORS = range(0xFE00, 0xFE10)  # choose how the character before them is drawn
_UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs")  # controls, formats, no characters, other blanks


def visible(token: Token) -> str:
    """A token's text as it is shown: the line ends of the text are kept, behind a sign; a token of blanks alone has a
    sign for each; what would not be seen, or would reorder or erase what is, is written as its code."""
    if token.raw:
        return token.raw
    text = token.text
    if text and not text.strip(" "):
        return "␣" * len(text)
    alone = all(sign in _JOINERS or ord(sign) in _SELECTORS for sign in text)
    holder = "◌" if text and unicodedata.combining(text[0]) else ""  # for a mark without its letter
    return holder + "".join(_SIGNS.get(sign) or _seen(sign, alone) for sign in text)


def _seen(sign: str, alone: bool) -> str:
    if sign == " " or (sign in _JOINERS and not alone):
        return sign
    if (alone and ord(sign) in _SELECTORS) or unicodedata.category(sign) in _UNSEEN:
        return f"\\x{ord(sign):02x}" if ord(sign) < 256 else f"\\u{{{ord(sign):x}}}"
    return sign


def columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(_columns(sign) for sign in text)


def _columns(sign: str) -> int:
    if unicodedata.combining(sign) or sign in _JOINERS:
        return 0
    return 2 if unicodedata.east_asian_width(sign) in "WF" else 1
