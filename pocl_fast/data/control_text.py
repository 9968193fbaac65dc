"""Control tokens that stand in a record's text, such as <|im_end|> in an answer about chat templates: they stay text.

Knows samples, and which of a tokenizer's tokens control a conversation. Does not know how the marked text becomes
tokens (marked_tokenizer.py), nor where in it an answer is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from pocl_fast.data.marked_tokenizer import MarkedTokenizer, can_be_marked
from pocl_fast.records.samples import Sample
from pocl_fast.templates.answer_span import PROBE, REASONING_TAGS, Shape
from pocl_fast.templates.chat_template import ChatTemplate, TemplateRefusal

_PLAIN_TURNS = (
    {"role": "system", "content": "Qz3system3zQ"},
    {"role": "user", "content": "Qz5question5zQ"},
    {"role": "assistant", "content": PROBE},
    {"role": "user", "content": "Qz5question5zQ"},
    {"role": "assistant", "content": PROBE},
)
_SPOKEN = frozenset({"content", "reasoning_content"})  # fields of the assistant in which reasoning tags are meant


@dataclass(frozen=True)
class KeptAsText:
    """The lines of a data set that have control tokens in their text, and the first of these tokens."""

    lines: tuple[int, ...] = ()
    token: str = ""

    def describe(self, lines: str) -> str:
        """In words; `lines` says where the samples are."""
        if len(self.lines) == 1:
            has, kept, makes = f"1 sample has a control token in its text, {self.token}", "it is", "makes it a token"
        else:
            has = f"{len(self.lines)} samples have control tokens in their text, such as {self.token}"
            kept, makes = "these are", "makes them tokens"
        return f"{has} ({lines}): {kept} kept as text; --special-tokens parse {makes}"


class ControlText:
    """Marks the control tokens in samples' text, so that the tokenizer tells them from those that a template writes.

    A control token is one that is special, or one that the template writes around plain turns, as DeepSeek's
    <｜User｜>, which its tokenizer does not call special. Who writes one of these in a record would end a turn or
    begin another one. Not among them:

    - tags of reasoning, in what the assistant says: there a record has no other way to say that reasoning ends. In a
      question they are text where the tokenizer calls them special;
    - tags that are neither special nor written around plain turns, such as <tool_call> of Qwen: an answer that has one
      calls a tool;
    - single signs, blanks, and words that are not special: text has no other token for them.

    Each control token found gets a mark behind its first sign. The template writes the marks on, `tokenizer` cuts the
    text as if they were not there, and what they stand in is no control token.
    """

    def __init__(self, tokenizer: Any, chat: ChatTemplate | None, shape: Shape, plain: str = "") -> None:
        """`shape` says what the chat template writes around answers; without one `plain` is the text of a question."""
        written = plain if chat is None else _written_around_turns(chat)
        reasoning = _reasoning_tags(shape)
        control = control_tokens(tokenizer, written, reasoning)
        self.tokenizer = MarkedTokenizer(tokenizer, control)
        self._all = _Finder(control, self.tokenizer)
        self._spoken = _Finder([token for token in control if token not in reasoning], self.tokenizer)
        self._found: dict[int, str] = {}  # line -> the first control token in its text

    def chat(self, chat: ChatTemplate) -> ChatTemplate:
        """The template with marks in the system prompt that the options give it."""
        prompt = chat.system_prompt
        return replace(chat, system_prompt=self._all.marked(prompt)) if prompt and self._all.first(prompt) else chat

    def marked(self, sample: Sample, where: str) -> Sample:
        """The sample with marks in its control tokens; itself where it has none. `where` stands for it in errors."""
        self.tokenizer.where = where
        if self._has_none(sample):
            return sample
        found = next(filter(None, self._firsts(sample)), None)
        if found is None:
            return sample
        self._found[sample.line] = found
        return replace(
            sample,
            messages=tuple(self._turn(turn) for turn in sample.messages),
            references=tuple(map(self._spoken.marked, sample.references)),
            instruction=self._all.marked(sample.instruction),
            input=self._all.marked(sample.input),
            tools=tuple(_changed(tool, self._all.marked) for tool in sample.tools),
            answer=None if sample.answer is None else self._turn(sample.answer),
        )

    def unmarked(self, text: str) -> str:
        """A text without marks, for messages."""
        return self.tokenizer.unmarked(text)

    def forget(self, line: int) -> None:
        """Drops what was noted of a record."""
        self._found.pop(line, None)

    def take_kept(self) -> KeptAsText:
        """What was marked since the last call."""
        lines = tuple(sorted(self._found))
        kept = KeptAsText(lines, self._found[lines[0]]) if lines else KeptAsText()
        self._found.clear()
        return kept

    # -- inside -----------------------------------------------------------------------------------------------------

    def _has_none(self, sample: Sample) -> bool:
        """Whether a sample of plain turns has surely none: most are such, and this is 5 times as fast as to look."""
        if sample.tools or sample.answer is not None or self.tokenizer.finds_normalized:
            return False
        texts: list[Any] = [sample.references[0]]
        for turn in sample.messages:
            if len(turn) != 2:
                return False
            texts += turn.values()  # role and content
        return not self._all.may_be_in("\n".join(texts))

    def _firsts(self, sample: Sample) -> Iterator[str | None]:
        for turn in (*sample.messages, sample.answer_turn):
            for field, value in turn.items():
                finder = self._finder(turn, field)
                yield finder.first(value) if value.__class__ is str else _first(value, finder)  # type: ignore[arg-type]
        if sample.tools:
            yield _first(sample.tools, self._all)

    def _turn(self, turn: Any) -> Any:
        return {field: _changed(value, self._finder(turn, field).marked) for field, value in turn.items()}

    def _finder(self, turn: Mapping[str, Any], field: str) -> _Finder:
        return self._spoken if field in _SPOKEN and turn["role"] == "assistant" else self._all


class _Finder:
    """Finds some control tokens in texts, wherever they begin. Most texts have none, which two signs in a row tell."""

    def __init__(self, tokens: Collection[str], tokenizer: MarkedTokenizer) -> None:
        self._tokens = frozenset(tokens)
        self._lengths = sorted({len(token) for token in tokens})
        self._starts = sorted({token[:2] for token in tokens})
        self._signs = sorted({token[:1] for token in tokens})
        self._begins = re.compile(f"(?={'|'.join(map(re.escape, self._starts))})")  # overlapping ones too
        self._tokenizer = tokenizer

    def may_be_in(self, text: str) -> bool:
        """Whether a text has two signs that a control token begins with. 0.1 us for each, against 20 us for the tokens
        of 100 words; most texts have not even the first one."""
        for sign in self._signs:  # a third of the time of `any`
            if sign in text:
                return any(start in text for start in self._starts)
        return False

    def first(self, text: str) -> str | None:
        """The first control token in the text, None where it has none."""
        places = self._places(text)
        if not places:
            return None
        found = (token for token in self._tokens if text.startswith(token, places[0]))
        return max(found, key=len, default=text[places[0] :][:20])

    def marked(self, text: str) -> str:
        """The text with marks."""
        places = self._places(text)
        if not places:
            return text
        cuts = [0, *(place + 1 for place in places), len(text)]
        return self._tokenizer.mark.join(text[a:b] for a, b in pairwise(cuts))

    def _places(self, text: str) -> list[int]:
        """Where control tokens begin."""
        found = []
        if self.may_be_in(text):
            begins = (match.start() for match in self._begins.finditer(text))
            found = [at for at in begins if any(text[at : at + n] in self._tokens for n in self._lengths)]
        others = self._tokenizer.normalized_places(text, self._tokens)  # of tokenizers that read </S> as </s>
        return sorted({*found, *others}) if others else found


def control_tokens(tokenizer: Any, written: str, reasoning: Collection[str] = ()) -> dict[str, int]:
    """The tokenizer's control tokens with their ids; `written` is what a template writes around plain turns."""
    added = tokenizer.get_added_vocab()
    special = {str(token) for token in tokenizer.all_special_tokens}
    special.update(str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special)
    others = {token: id_ for token, id_ in added.items() if token not in special}
    used = set(tokenizer(written, add_special_tokens=False).input_ids) if written and others else set()
    special.update(
        token for token, id_ in others.items() if id_ in used and token not in reasoning and not token.strip().isalnum()
    )
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in sorted(special)}
    return {token: id_ for token, id_ in ids.items() if can_be_marked(token)}


def _written_around_turns(chat: ChatTemplate) -> str:
    """What a template writes around plain turns, with a system message or not, asked on and ended."""
    written = []
    for turns in (_PLAIN_TURNS, _PLAIN_TURNS[1:], _PLAIN_TURNS[1:3]):
        for count, asks in ((len(turns), False), (len(turns) - 1, True)):
            try:
                written.append(chat.render(turns[:count], prompt=asks))
            except TemplateRefusal:
                continue
    return "\n".join(written)


def _reasoning_tags(shape: Shape) -> frozenset[str]:
    """The tags around reasoning; what ends the turn is none, whatever stands around it."""
    tags = {tag for pair in (REASONING_TAGS, *shape.reasoning) for tag in pair}
    return frozenset(tags - {"", shape.end.strip()})


def _first(value: Any, finder: _Finder) -> str | None:
    return next(filter(None, map(finder.first, _texts(value))), None)


def _texts(value: Any) -> Iterator[str]:
    """All texts within a value, the names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        inner: Iterable[Any] = (one for pair in value.items() for one in pair) if isinstance(value, Mapping) else value
        for one in inner:
            yield from _texts(one)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """The value with each text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(name, change): _changed(one, change) for name, one in value.items()}
    return [_changed(one, change) for one in value] if isinstance(value, (list, tuple)) else value
