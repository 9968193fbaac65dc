"""A tokenizer's chat template: which one is taken, what it is given, and the text that it writes of a conversation.

Knows jinja and the templates' own variables. Does not know tokens, nor where in the text an answer is (answer_span.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import jinja2
from jinja2 import meta
from jinja2.ext import Extension

from pocl_fast.system.errors import InputError
from pocl_fast.system.typed_values import did_you_mean
from pocl_fast.templates.rendering import PlainRenderer, is_plain
from pocl_fast.templates.template_date import ASKS_FOR_IT, kept_date, with_date

DEFAULT, WITH_TOOLS = "default", "tool_use"  # transformers' names of templates
_CONTENT = "Qz5content5zQ"  # no template has it
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OF_JINJA = {"raise_exception", ASKS_FOR_IT, "namespace", "dict", "range", "lipsum", "cycler", "joiner", "loop"}


class TemplateOptions(Protocol):
    """Which template, and what it is given: a run's options, a trainer's arguments."""

    @property
    def template(self) -> Any: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def chat_template_kwargs(self) -> dict[str, Any]: ...
    @property
    def system_prompt(self) -> str | None: ...


class TemplateRefusal(Exception):
    """What a template says of a conversation that it does not render; `kind` is what is wrong in a few words."""

    def __init__(self, message: str, kind: str = "the template refuses it") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class ChatTemplate:
    """The templates of a tokenizer among which records choose: "tool_use" for those with tools, else "default"."""

    tokenizer: Any
    texts: Mapping[str, str]  # by name
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None  # of conversations without a system message

    @classmethod
    def chosen(
        cls,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        date: datetime | None = None,
    ) -> ChatTemplate:
        """The tokenizer's template; or the one named `chat_template`, which may be the path of a jinja file. `kwargs`
        are variables of the template, `date` is what it is told of the time.

        Raises `InputError` for a template that is not there or is no jinja, and for variables that it does not read.
        """
        texts = templates_of(tokenizer, chat_template)
        made = cls(tokenizer, texts, dict(kwargs or {}), system_prompt)
        made._check_kwargs()
        if date is not None and made.writes_date:
            texts = {name: with_date(text, date) for name, text in texts.items()}
        return cls(tokenizer, texts, made.kwargs, system_prompt)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the templates read and do not set."""
        return frozenset().union(*(_variables(name, text) for name, text in self.texts.items()))

    @property
    def writes_date(self) -> bool:
        """Whether the date is in what the template writes."""
        return ASKS_FOR_IT in self.variables

    def messages(self, messages: Sequence[Any]) -> list[Any]:
        """The conversation with the system prompt where it has no system message."""
        if self.system_prompt and not any(message["role"] in ("system", "developer") for message in messages):
            return [{"role": "system", "content": self.system_prompt}, *messages]
        return list(messages)

    def render(self, messages: Sequence[Any], tools: Sequence[Any] = (), *, prompt: bool) -> str:
        """The text of a conversation, with what opens an answer behind it where it is a `prompt`. Raises
        `TemplateRefusal`."""
        for noted in self._noting:
            noted.append((messages, prompt))
        return self._written(self._as_read(messages), tools, prompt)

    def _written(self, messages: Sequence[Any], tools: Sequence[Any], prompt: bool) -> str:
        text = self._text(tools)
        given = dict(self.kwargs)
        if text != self.tokenizer.chat_template:
            given["chat_template"] = text
        try:
            plain = None if tools or not is_plain(messages) else self._renderer(text).render(messages, prompt)
            if plain is not None:
                return plain
            written = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=prompt,
                **given,
            )
        except Exception as error:  # a template is a program of its author's: it may raise anything
            raise TemplateRefusal(_said(error)) from error
        return str(written)

    @contextmanager
    def noting(self) -> Iterator[list[tuple[Sequence[Any], bool]]]:
        """Notes the messages that are rendered meanwhile, and whether as a prompt."""
        noted: list[tuple[Sequence[Any], bool]] = []
        self._noting.append(noted)
        try:
            yield noted
        finally:
            self._noting.pop()

    @cached_property
    def _noting(self) -> list[list[tuple[Sequence[Any], bool]]]:
        return []

    @cached_property
    def _with_marks(self) -> frozenset[str]:
        return frozenset(text for text in self.texts.values() if _MARKED.search(text))

    @cached_property
    def _renderers(self) -> dict[str, PlainRenderer]:
        return {}

    def _renderer(self, text: str) -> PlainRenderer:
        if text not in self._renderers:
            self._renderers[text] = PlainRenderer(self.tokenizer, text, self.kwargs)
        return self._renderers[text]

    def asked_of_contents(self, messages: Sequence[Any], *, prompt: bool) -> frozenset[str] | None:
        """What the contents of plain messages may not have in them for `render` to write them as it does these: the
        same text around other contents, which are not empty and neither begin nor end with blanks. None where that is
        not known. Raises `TemplateRefusal`."""
        written = self.render(messages, prompt=prompt)
        watched = self._renderer(self._text(())).watched(self._as_read(messages), prompt)
        return watched[1] if watched is not None and watched[0] == written else None

    def marked(
        self, messages: Sequence[Any], tools: Sequence[Any], *, prompt: bool = False
    ) -> tuple[tuple[int, int], ...]:
        """Where in the text of `render` the template's {% generation %} marks are: from, to; none without marks."""
        text = self._text(tools)
        if text not in self._with_marks:
            return ()
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(  # texts, and where the marks of each are
                conversations=[self._as_read(messages)],
                tools=list(tools) or None,
                chat_template=text,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **{**self.tokenizer.special_tokens_map, **self.kwargs},
            )
        except Exception as error:
            raise TemplateRefusal(_said(error)) from error
        return tuple((int(start), int(end)) for start, end in rendered[1][0])

    @cached_property
    def reads_parts(self) -> bool:
        """Whether the template reads a message's content as a list of parts alone, as some of models with images do."""

        def writes(content: Any) -> bool:
            try:
                return _CONTENT in self._written([{"role": "user", "content": content}], (), True)
            except TemplateRefusal:
                return False

        return not writes(_CONTENT) and writes([{"type": "text", "text": _CONTENT}])

    def _as_read(self, messages: Sequence[Any]) -> list[Any]:
        """The messages with their content as the template reads it."""
        if not self.reads_parts:
            return list(messages)
        texts = [message.get("content") for message in messages]
        return [
            {**message, "content": [{"type": "text", "text": text}]} if isinstance(text, str) else message
            for message, text in zip(messages, texts, strict=True)
        ]

    def _text(self, tools: Sequence[Any]) -> str:
        return self.texts[WITH_TOOLS if tools and WITH_TOOLS in self.texts else next(iter(self.texts))]

    def _check_kwargs(self) -> None:
        own = set(signature(self.tokenizer.apply_chat_template).parameters) | {"messages"} | _OF_JINJA
        known = sorted(self.variables - own - set(self.tokenizer.special_tokens_map))
        for name in self.kwargs:
            if name in own or name not in self.variables:
                if not known:
                    raise InputError(
                        f"--chat-template-kwargs {name}: the chat template reads no variables: leave"
                        " --chat-template-kwargs out"
                    )
                has = f"it reads {', '.join(known)}"
                raise InputError(
                    f"--chat-template-kwargs {name}: the chat template has no such variable to be"
                    f" given{did_you_mean(name, known)}; {has}"
                )


def templates_of(tokenizer: Any, chosen: str | None) -> dict[str, str]:
    """The templates that records choose from, by name, the default one first; one alone where one is chosen.

    Raises `InputError` where none is there by that name, or where a name is needed.
    """
    own = tokenizer.chat_template or {}
    named = own if isinstance(own, dict) else {DEFAULT: own}
    if chosen is not None:
        if chosen in named:
            return {chosen: named[chosen]}
        return {chosen: _file(chosen, list(named))}
    if DEFAULT not in named:
        raise InputError(
            f"the tokenizer has several chat templates and none is its default: give --chat-template NAME, one of"
            f" {', '.join(sorted(named))}"
        )
    others = {WITH_TOOLS: named[WITH_TOOLS]} if WITH_TOOLS in named else {}
    return {DEFAULT: named[DEFAULT], **others}


def make_default(tokenizer: Any, chosen: str) -> None:
    """Gives the tokenizer the chosen template as its default; a name keeps its meaning."""
    named = isinstance(tokenizer.chat_template, dict) and chosen in tokenizer.chat_template and chosen != DEFAULT
    text = templates_of(tokenizer, chosen)[chosen]
    tokenizer.chat_template = {DEFAULT: text, chosen: text} if named else text


def _file(path: str, names: Sequence[str]) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        have = f"has {', '.join(sorted(names))}" if names else "has none"
        raise InputError(
            f"--chat-template {path}: the tokenizer has no chat template of this name (it {have}), and it is no file"
            f" that can be read ({getattr(error, 'strerror', None) or error}){did_you_mean(path, names)}"
        ) from error


class _GenerationTag(Extension):
    """The tag {% generation %}, for parsing alone."""

    tags = {"generation"}  # noqa: RUF012  (as jinja's own class has it)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _variables(name: str, text: str) -> set[str]:
    environment = jinja2.Environment(extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(environment.parse(text))
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template {name!r} is no jinja: line {error.lineno}: {error.message}") from error


def _said(error: Exception) -> str:
    """A template's refusal in its own words, or what went wrong in it."""
    if type(error) is jinja2.TemplateError:  # raise_exception
        return f"the chat template refuses it: {error}"
    return f"the chat template fails on it ({type(error).__name__}: {error})"


def chosen_template(
    tokenizer: Any, options: TemplateOptions, folder: Path, say: Callable[[str], object]
) -> ChatTemplate | None:
    """The chat template that the options ask for, None for the Alpaca template. The date of one that writes it is kept
    in `folder`. Every rank must call.

    Raises `InputError` for options that do not fit together or do not fit the tokenizer.
    """
    has = bool(tokenizer.chat_template) or options.chat_template is not None
    if options.template == "chat" and not has:
        raise InputError("--template chat: the tokenizer has no chat template; use --template alpaca")
    if options.template == "alpaca" or not has:
        for name in ("chat_template", "chat_template_kwargs", "system_prompt"):
            if getattr(options, name):
                why = "--template alpaca has no place for it" if has else "the tokenizer has no chat template"
                raise InputError(f"--{name.replace('_', '-')}: {why}")
        return None
    given: dict[str, Any] = {
        "chat_template": options.chat_template,
        "kwargs": options.chat_template_kwargs,
        "system_prompt": options.system_prompt,
    }
    made = ChatTemplate.chosen(tokenizer, **given)
    return ChatTemplate.chosen(tokenizer, **given, date=kept_date(folder, tokenizer, say)) if made.writes_date else made


def unused_template(used: ChatTemplate | None, template: str, other: Any, chosen: str | None = None) -> str | None:
    """A line that says that another tokenizer's chat template, the teacher's, is not used; None where nothing is to be
    said, as where the user has `chosen` a template."""
    if not other.chat_template or chosen is not None:
        return None
    if used is not None:
        return _other_template(used, other)
    if template != "auto":
        return None
    return (
        "the student's tokenizer has no chat template: prompts are in the Alpaca template, and the teacher's chat"
        " template is not used. To use it give it as a file, --chat-template FILE (chat_template.jinja of the teacher's"
        " folder); --template alpaca says that this is meant"
    )


def _other_template(used: ChatTemplate, other: Any) -> str | None:
    try:
        texts = templates_of(other, None)
    except InputError:
        return None  # several, and none is the teacher's default
    theirs = ChatTemplate(other, texts, used.kwargs, used.system_prompt)
    if used.tokenizer.chat_template == other.chat_template or _probed(used) == _probed(theirs):
        return None
    return (
        "student and teacher have different chat templates: the student's is used for both. To use the teacher's give"
        " it as a file, --chat-template FILE (chat_template.jinja of the teacher's folder)"
    )


def _probed(template: ChatTemplate) -> tuple[str, ...]:
    """What a template writes of a small conversation, asked on and ended; or its refusal."""
    turns = [{"role": role, "content": _CONTENT} for role in ("user", "assistant", "user", "assistant")]
    try:
        return tuple(
            template.render(template.messages(turns[:count]), prompt=asks) for count, asks in ((3, True), (4, False))
        )
    except TemplateRefusal as refusal:
        return (str(refusal),)
