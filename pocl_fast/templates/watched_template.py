"""What a chat template asks about the contents of messages, seen while it writes them.

A template is a program, which may look at a content before it prints it, and print another text then. Here it is given
contents that note what is asked. Knows jinja's ways of working with text. Does not know conversations
(known_shapes.py), nor what a template's text means.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import Template, Undefined, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Macro
from jinja2.utils import Namespace
from markupsafe import Markup

from pocl_fast.templates.watched_contents import (
    FOLLOWED,
    Content,
    Length,
    Method,
    NotTold,
    is_alike,
    joined,
    may_hold,
    not_told,
)


class WatchedTemplate:
    """A compiled template that is given contents which watch."""

    def __init__(self, compiled: Template, text: str) -> None:
        """`compiled` is transformers' own, of this text."""
        environment = compiled.environment.overlay()
        kind = type(compiled.environment)
        environment.__class__ = type("Watching", (_Watching, kind), {})
        environment.filters = {name: _filter(name, made) for name, made in compiled.environment.filters.items()}
        tests: dict[str, Any] = compiled.environment.tests
        environment.tests = {name: _test(name, made) for name, made in tests.items()}
        self._template = environment.from_string(text, globals=compiled.globals)

    def render(self, messages: Iterable[Mapping[str, Any]], variables: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
        """The text of messages, which are a role and a content, and what of other texts it depends on.

        It is written alike, with the contents put in, of all contents of which `is_alike` holds with the returned
        texts. Raises `NotTold` where this is not known, or does not hold of these contents; and what the template
        raises.
        """
        asked: set[str] = set()
        contents: list[str] = []

        def watching(text: str) -> Content:
            contents.append(text)
            return Content(text, asked)

        def in_parts(content: Any) -> Any:
            whole = isinstance(content, str)
            return watching(content) if whole else [{**part, "text": watching(part["text"])} for part in content]

        given = [{**one, "content": in_parts(one["content"])} for one in messages]
        context = self._template.new_context({**variables, "messages": given})
        text = "".join(self._template.root_render_func(context))
        if not all(is_alike(content, asked) for content in contents):
            raise NotTold
        return text, frozenset(asked)


class _Generator(CodeGenerator):
    visit_ScopedEvalContextModifier = not_told  # {% autoescape %}

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # jinja's name; its own joins what is in a str
        self.write("environment.concat((")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # its own asks a plain str what is in it
        self.write("environment.compared(")
        self.visit(node.expr, frame)
        for one in node.ops:
            self.write(f", ({one.op!r}, lambda: ")
            self.visit(one.expr, frame)
            self.write(")")
        self.write(")")


_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt,
    "gteq": operator.ge, "in": lambda one, other: one in other, "notin": lambda one, other: one not in other,
}  # fmt: skip


class _Watching:
    """What transformers' sandbox lets templates do, without what is not followed."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    concat = staticmethod(joined)
    globals: Mapping[str, Any]
    undefined: type[Undefined]

    def call(self, context: Any, called: Any, *given: Any, **named: Any) -> Any:
        arguments = {name: value for name, value in named.items() if name not in _OF_JINJA}
        is_told = hasattr(called, "jinja_pass_arg") or any(map(may_hold, (*given, *arguments.values())))
        if is_told and not _takes_contents(called, self.globals, set(arguments)):
            raise NotTold
        if any(called is self.globals.get(name) for name in _EACH_TIME_ANEW):
            raise NotTold
        return super().call(context, called, *given, **named)  # type: ignore[misc]

    @staticmethod
    def compared(first: Any, *others: tuple[str, Callable[[], Any]]) -> bool:
        for name, made in others:
            other = made()
            if isinstance(first, Content) and isinstance(other, str) and name in ("in", "notin"):
                raise NotTold
            if not _COMPARED[name](first, other):
                return False
            first = other
        return True

    def call_binop(self, context: Any, sign: str, left: Any, right: Any) -> Any:
        if not (may_hold(left) or may_hold(right)):
            return super().call_binop(context, sign, left, right)  # type: ignore[misc]
        if sign == "+" and all(isinstance(one, Content) or type(one) is str for one in (left, right)):
            return joined((left, right))
        if sign == "+" and type(left) is type(right) and type(left) in (list, tuple):
            return left + right
        raise NotTold

    def getattr(self, given: Any, attribute: str) -> Any:
        if isinstance(given, Length):
            raise NotTold
        if not isinstance(given, Content):
            return super().getattr(given, attribute)  # type: ignore[misc]
        if attribute in FOLLOWED and not attribute.startswith("_"):
            return Method(getattr(given, attribute))
        if hasattr(given, attribute):
            raise NotTold
        return self.undefined(obj=given, name=attribute)

    def getitem(self, given: Any, argument: Any) -> Any:
        if isinstance(given, Length) or isinstance(argument, (Content, Length)):
            raise NotTold
        if isinstance(given, Content) and isinstance(argument, str):
            return self.getattr(given, argument)  # as jinja does, once it has seen that a text has no such item
        return super().getitem(given, argument)  # type: ignore[misc]


_EACH_TIME_ANEW = ("strftime_now", "lipsum")
_OF_JINJA = {"_loop_vars", "_block_vars"}  # arguments that jinja adds, of functions that are told of the context


def _takes_contents(called: Any, known: Mapping[str, Any], names: set[str]) -> bool:
    """Whether what is called is followed here: what the template itself says, a namespace, a content's own method, what
    raises an error, and transformers' tag {% generation %}, which gives back what it is given to write."""
    if isinstance(called, (Macro, Method)) or (isinstance(called, type) and issubclass(called, Namespace)):
        return True
    if getattr(called, "__name__", "") == "_generation_support":
        return names == {"caller"}
    return called is known.get("raise_exception") or called is known.get("dict")


_TYPE_TESTS = {
    "defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "boolean", "number", "integer",
    "float", "true", "false", "callable",
}  # fmt: skip
_EQUALITY_TESTS = {"eq", "equalto", "==", "ne", "!="}
_OF_LISTS = {
    "length", "count", "first", "last", "list", "reverse", "default", "d", "map", "select", "reject", "selectattr",
    "rejectattr", "items",
}  # fmt: skip  # which keep what is in a list, or look at it by tests, filters and fields
_OF_TEXTS: dict[str, Callable[..., Any]] = {
    "trim": Content.strip,
    "string": Content.__str__,
    "replace": Content.replace,
    "length": Length,
    "count": Length,
    "default": lambda content, *_, **__: content,
    "d": lambda content, *_, **__: content,
}


def _filter(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes contents, or raises `NotTold`."""

    @functools.wraps(made)
    def watching(*given: Any, **named: Any) -> Any:
        value, *others = given[1:] if hasattr(made, "jinja_pass_arg") else given
        if name == "random" or (name not in ("default", "d") and any(map(may_hold, (*others, *named.values())))):
            raise NotTold
        if isinstance(value, Content):
            return _OF_TEXTS.get(name, not_told)(value, *others, **named)
        if may_hold(value) and name not in _OF_LISTS:
            raise NotTold
        written = made(*given, **named)
        if isinstance(written, Markup):  # a str that escapes, and compares itself with contents
            raise NotTold
        return written

    return watching


def _test(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """A test that takes contents, or raises `NotTold`."""

    @functools.wraps(made)
    def watching(*given: Any, **named: Any) -> Any:
        passed = given[:1] if hasattr(made, "jinja_pass_arg") else ()
        value, *others = given[len(passed) :]
        if not any(map(may_hold, (value, *others, *named.values()))):
            return made(*given, **named)
        if name in _TYPE_TESTS:
            return made(*passed, "a text" if isinstance(value, Content) else 1 if isinstance(value, Length) else value)
        if name in _EQUALITY_TESTS and all(isinstance(one, str) for one in (value, *others)):
            return made(*given, **named)
        raise NotTold

    return watching
