"""Exact match: which answers equal a reference, by the project's rule and by that of the published code.

Knows texts and what their punctuation means. Loads no torch.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import numpy as np

_THOUSANDS = r"(?<=\d),(?=\d{3}(?!\d))"
_LETTER = r"[^\W\d_]"
_LONE = rf"{_LETTER}(?!{_LETTER})"  # a variable, as "well-known" has none


def _between(operators: str) -> str:
    return rf"(?:{operators}|[ \t]+{operators}[ \t]+)"


_MATHEMATICS = "|".join(
    (
        r"[+<=>|~]",  # Unicode has these among its mathematical symbols, all else of ASCII's as punctuation
        rf"(?<!{_LETTER})(?:-[ \t]*|\.)(?=\.?\d)",  # a sign, a decimal point, a range; not "covid-19"
        rf"(?<![^\s(\[{{=+*/^<>|~,])-(?={_LONE}|\()",  # -x; not "-word", an item of a list
        r"(?<![^\s(\[{=&|<>,])!+(?=[\w(])|!(?==)",  # not
        r"(?<=\d)[,:%](?=\d)",
        r"(?<=\d)%",
        rf"(?<=[\w)\]}}])(?<!{_LETTER}{_LETTER}){_between('[-*/^]+')}(?=[-+]?\.?(?:\d|{_LONE}|[(\[{{]))",
        rf"(?<=\w){_between('[*^]+')}(?=\w)",  # between words too, as no emphasis is
        rf"(?<=\w){_between('/+')}(?=\d)|(?<=\d)/+(?=\w)",  # not "and/or"
    )
)
_PUNCTUATION = re.compile(f"{_THOUSANDS}|({_MATHEMATICS})|[{re.escape(string.punctuation)}]")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of answers equal to one of their references, letter case, punctuation and spacing aside, as
    `published_exact_matches` counts; but for punctuation that means something.

    What stays of it: the symbols + < = > | ~; a decimal point before and a percent sign behind a digit; : , % between
    digits, but no comma of thousands; a minus before a digit, with blanks or not (but not in "covid-19"), and before
    one letter alone; ! before what it negates; and - * / ^ between numbers, single letters and brackets, with blanks
    on both sides or none, * and ^ between words too; and all of a text that is nothing else. So "1 - x" is not "1 x",
    and "well-known" is "wellknown". An empty answer equals nothing.
    """
    return float(np.mean(exact_matches(answers, references)))


def exact_matches(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each answer equals one of its references, as `exact_match` counts."""
    return [_equals_one(_plain(answer), accepted) for answer, accepted in zip(answers, references, strict=True)]


def published_exact_matches(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each answer equals one of its references as the code of Super-NaturalInstructions, MiniLLM and POCL
    counts: in lower case, without any of ASCII's punctuation, and with single spaces. So "-1" equals "1", and an answer
    of nothing but punctuation equals an empty reference."""
    return [_bare(answer) in map(_bare, accepted) for answer, accepted in zip(answers, references, strict=True)]


def _equals_one(answer: str, accepted: Sequence[str]) -> bool:
    return answer != "" and any(answer == _plain(reference) for reference in accepted)


def _plain(text: str) -> str:
    lowered = text.lower()
    return " ".join(_PUNCTUATION.sub(r"\1", lowered).split()) or " ".join(lowered.split())


def _bare(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())
