"""Conversations of the same roles as some before, whose text need not be rendered: what the template writes around
their contents is known.

Knows plain conversations, and what a template asks of their contents. Does not know how a template's text is split
(answer_span.py, turn_spans.py), which it is told once for each shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

from pocl_fast.records.samples import Sample
from pocl_fast.templates.answer_span import REASONING_TAGS, Split, Turn, tags_at_end
from pocl_fast.templates.chat_template import ChatTemplate, TemplateRefusal
from pocl_fast.templates.watched_contents import has_bare_ends

_PROBE = "Qz7n{}nzQzQzQzQzQ"  # stands for a content; no template has it, nor is it in a text by chance
_PROBES = re.compile(_PROBE.format(r"\d+"))
_MOST = 10_000  # shapes that are kept: a data set has few, but for one of long conversations
_Shape: TypeAlias = tuple[object, ...]  # the roles, and which of the turns are answers


class _Place(NamedTuple):
    """An earlier answer: how many contents are before its start and its end, and how many other characters."""

    start: int
    start_other: int
    end: int
    end_other: int
    turn: Turn


class _Known(NamedTuple):
    """What a template writes of one shape."""

    prompt: str  # with %s for each content
    answer: str
    ended: bool
    places: tuple[_Place, ...]
    unlike: tuple[str, ...]  # a content with one of these in it may be written otherwise

    def split(self, contents: list[str]) -> Split | None:
        """The conversation with these contents; None where it may be written otherwise."""
        together = "\0".join(contents)  # one search for all
        for text in self.unlike:
            if text in together:
                return None
        for content in contents:
            if not has_bare_ends(content):
                return None
        before = tuple(contents[:-1])
        earlier: tuple[Turn, ...] = ()
        if self.places:
            lengths = list(accumulate(map(len, before), initial=0))
            earlier = tuple(
                Turn(lengths[start] + start_other, lengths[end] + end_other, turn.ended, turn.place)
                for start, start_other, end, end_other, turn in self.places
            )
        return Split(self.prompt % before, self.answer % contents[-1], self.ended, earlier)


class KnownShapes:
    """Assembles the text of plain conversations whose roles were met twice before.

    A shape is learned from a conversation with other contents, by the way that all conversations go, and checked on the
    one at hand. It is not learned where the template looks at contents in a way that is not followed, where a content
    is not written once, and where anything is to be noted of it.
    """

    def __init__(
        self, chat: ChatTemplate, reasoning: Iterable[tuple[str, str]], written: Callable[[Sample], Split | None]
    ) -> None:
        """`reasoning` are the tags around it; a content with one of these goes the other way. `written` is that way:
        the split of a sample, None where it is refused, or where something is to be noted of it."""
        self._chat, self._written = chat, written
        self._tags = {tag for pair in (REASONING_TAGS, *reasoning) for tag in pair if tag}
        self._known: dict[_Shape, _Known | None] = {}
        self._met: set[_Shape] = set()

    def split(self, sample: Sample) -> Split | None:
        """The sample's split; None where it is to go the other way."""
        if sample.tools or sample.answer is not None:
            return None
        roles: list[object] = []
        contents: list[str] = []
        for message in sample.messages:
            if len(message) != 2:
                return None
            roles.append(message["role"])
            contents.append(message["content"])
        contents.append(sample.references[0])
        shape = (*roles, *sample.earlier)
        known = self._known.get(shape)
        if known is not None:
            return known.split(contents)
        if shape not in self._known:
            if shape in self._met:
                self._known[shape] = self._learned(sample, contents)
            elif len(self._met) < _MOST:
                self._met.add(shape)
        return None

    def _learned(self, sample: Sample, contents: list[str]) -> _Known | None:
        """What is known of the sample's shape; None where that is not enough."""
        probe = _with_contents(sample, [_PROBE.format(place) for place in range(len(contents))])
        with self._chat.noting() as rendered:
            split = self._written(probe)
        if split is None:
            return None
        try:
            unlike = self._unlike(probe, split, rendered)
        except TemplateRefusal:
            return None
        known = None if unlike is None else _known(split, len(contents), unlike)
        if known is None:
            return None
        made, theirs = known.split(contents), self._written(sample)
        return known if made is None or made == theirs else None

    def _unlike(
        self, probe: Sample, split: Split, rendered: Iterable[tuple[Sequence[Any], bool]]
    ) -> tuple[str, ...] | None:
        """Texts without which contents are written alike; None where that is not known. `rendered` is what was rendered
        for the split; what of this has other contents than the probe's says nothing of contents. Raises
        `TemplateRefusal`."""
        turns = self._chat.messages((*probe.messages, probe.answer_turn))
        lengths = {(len(turns), False), *((len(one), asks) for one, asks in rendered if [*one] == turns[: len(one)])}
        unlike, prompts = set(self._tags), [split.prompt]
        wholes: list[str] = []
        for length, asks in lengths:
            asked = self._chat.asked_of_contents(turns[:length], prompt=asks)
            if asked is None:
                return None
            unlike |= asked
            (prompts if asks else wholes).append(self._chat.render(turns[:length], prompt=asks))
        opened = {text for written in (*prompts, *wholes) for text in _PROBES.split(written)[:-1]}  # before contents
        for prompt in prompts:
            unlike.update(tags_at_end(prompt))
            header = _PROBES.split(prompt)[-1]  # an answer that begins with the rest of it seems to stand behind it
            unlike |= {header[len(text) :].strip() for text in opened if header.startswith(text)}
        return tuple(sorted(unlike - {""}))


def _with_contents(sample: Sample, contents: Sequence[str]) -> Sample:
    *before, answer = contents
    messages = ({**turn, "content": one} for turn, one in zip(sample.messages, before, strict=True))
    return replace(sample, messages=tuple(messages), references=(answer,), unused=())  # type: ignore[arg-type]


def _known(split: Split, count: int, unlike: tuple[str, ...]) -> _Known | None:
    """What is around the contents of a split whose contents are probes; None where one is not there once, in order."""
    probes = [_PROBE.format(place) for place in range(count)]
    if [_PROBES.findall(split.prompt), _PROBES.findall(split.answer)] != [probes[:-1], probes[-1:]]:
        return None
    places = []
    for turn in split.earlier:
        start, start_other = _before(split.prompt[: turn.start])
        end, end_other = _before(split.prompt[: turn.end])
        places.append(_Place(start, start_other, end, end_other, turn))
    prompt, answer = (_PROBES.sub("%s", text.replace("%", "%%")) for text in (split.prompt, split.answer))
    return _Known(prompt, answer, split.ended, tuple(places), unlike)


def _before(text: str) -> tuple[int, int]:
    """How many contents a text has, and how many other characters."""
    probes = _PROBES.findall(text)
    return len(probes), len(text) - sum(map(len, probes))
