"""The text that a chat template writes of a sample, split at its answers, and what of the sample is not in it.

Knows samples and templates. Does not know tokens (encoding.py), nor how an answer is found (answer_span.py,
turn_spans.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.samples import Sample
from pocl_fast.templates import unused_fields
from pocl_fast.templates.answer_span import AnswerFinder, Split
from pocl_fast.templates.chat_template import TemplateRefusal
from pocl_fast.templates.decisions import Decision
from pocl_fast.templates.known_shapes import KnownShapes
from pocl_fast.templates.turn_spans import TurnFinder

UNASKED = Decision("earlier answers not trained on, because nothing is asked before them")
_NO_QUESTION = {"system", "developer", "assistant"}


class Written(NamedTuple):
    """A sample's text, and what is to be said of it."""

    split: Split
    left: Sequence[tuple[Decision, int]] = ()  # why earlier answers are not trained on, and how many
    unwritten: Sequence[str] = ()  # what of the sample is not in the text


class ConversationText:
    """Writes the texts of samples."""

    def __init__(self, finder: AnswerFinder, turns: TurnFinder | None, unmarked: Callable[[str], str] = str) -> None:
        """`turns` finds earlier answers; None where these are not trained on. `unmarked` gives a text as a person wrote
        it, for errors."""
        self._chat, self._finder, self._turns, self._unmarked = finder.template, finder, turns, unmarked
        self._tags = finder.shape.reasoning
        self._unshown = unused_fields.UnshownTurns(self._chat, self._tags)
        self._shapes = KnownShapes(self._chat, self._tags, self._plainly)

    def written(self, sample: Sample, where: str) -> Written:
        """A sample's text. Raises `BadRecord`, with `where` the sample is, where the template refuses it, or leaves the
        question out."""
        known = self._shapes.split(sample)
        return self._rendered(sample, where) if known is None else Written(known)

    def _plainly(self, sample: Sample) -> Split | None:
        """A sample's text; None where the template refuses it, or something is to be said of it."""
        try:
            made = self._rendered(sample, "")
        except BadRecord:
            return None
        return None if made.unwritten or any(count for _, count in made.left) else made.split

    def _rendered(self, sample: Sample, where: str) -> Written:
        try:
            split = self._finder.split(sample.messages, sample.tools, sample.answer_turn)
        except TemplateRefusal as refusal:
            hint = " (the system message is --system-prompt's)" if self._chat.system_prompt else ""
            raise BadRecord(
                f"{where}: {self._unmarked(str(refusal))}{hint}."
                f" {'Take' if self._finder.shape.leaves_out else 'Change this record or take'}"
                " another template: --chat-template NAME or FILE, --template alpaca",
                refusal.kind,
            ) from refusal
        messages = self._chat.messages(sample.messages)
        unshown = self._unshown.places(messages, sample.tools, split.prompt)
        asks = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        if not {asks, len(messages) - 1}.isdisjoint(unshown):
            raise unused_fields.means_more(
                where,
                "the chat template leaves the question out, or a part of it",
                "the template leaves the question out",
            )
        unwritten = unused_fields.unwritten(messages, sample.tools, sample.answer_turn, split, self._tags)
        unwritten += ["earlier turns"] if unshown else []
        return Written(*self._with_earlier(split, sample, messages, unshown), unwritten)

    def _with_earlier(
        self, split: Split, sample: Sample, messages: Sequence[Any], unshown: Collection[int]
    ) -> tuple[Split, Sequence[tuple[Decision, int]]]:
        """The split with the earlier answers that are trained on, and how many are not, by why. `messages` are those of
        the sample as the template is given them; those that it leaves out, `unshown`, are said elsewhere."""
        if not sample.earlier or self._turns is None:
            return split, ()
        shift = len(messages) - len(sample.messages)  # a system prompt
        roles = [turn["role"] for turn in messages]
        asked = next((i for i, role in enumerate(roles) if role not in _NO_QUESTION), len(roles))
        answered = [place + shift for place in sample.earlier if place + shift > asked]
        # of a turn that calls tools the text alone may be left out
        wanted = [place for place in answered if place not in unshown or messages[place].get("tool_calls")]
        found = self._turns.find(split, messages, sample.tools, sample.answer_turn, wanted)
        left = (*found.left, (UNASKED, len(sample.earlier) - len(answered)))
        return replace(split, earlier=tuple(turn._replace(place=turn.place - shift) for turn in found.turns)), left
