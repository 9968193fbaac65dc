"""What a chat template asks about the contents of messages, seen while it writes them.

A template is a program, which may look at a content before it prints it, and print another text then. Here it is given
contents that note what is asked. Knows jinja's ways of working with text. Does not know conversations
(known_shapes.py), nor what a template's text means.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import Template, Undefined, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Macro
from jinja2.utils import Namespace


class NotTold(Exception):
    """The text that a template writes may depend on the contents in a way that is not followed here."""


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

        It is written alike, with the contents put in, of all contents that are not empty, neither begin nor end with
        blanks, and have none of the returned texts in them. Raises `NotTold` where this is not known, and what the
        template raises.
        """
        asked: set[str] = set()
        given = [{**one, "content": _watching(one["content"], asked)} for one in messages]
        context = self._template.new_context({**variables, "messages": given})
        return "".join(self._template.root_render_func(context)), frozenset(asked)


def _watching(content: Any, asked: set[str]) -> Any:
    """A content, or one in parts, which notes what is asked of it."""
    if isinstance(content, str):
        return Content(content, asked)
    return [{**part, "text": Content(part["text"], asked)} for part in content]


class Content(str):
    """A content, or a text with contents in it, that a template works with. What could tell a content from another one
    raises `NotTold`; whether it has some text in it is denied, and noted."""

    _asked: set[str]
    _parts: tuple[str, ...]  # contents, and plain text around them; no two plain ones side by side, none empty

    def __new__(cls, text: str, asked: set[str], parts: tuple[str, ...] = ()) -> Content:
        made = super().__new__(cls, text)
        made._asked, made._parts = asked, parts or (made,)
        return made

    def _has(self, text: Any) -> bool:
        """Whether another text is in this one."""
        if not isinstance(text, str) or isinstance(text, Content):
            raise NotTold
        self._note(text)
        return any(text in part for part in self._parts if not isinstance(part, Content))

    def _note(self, text: str) -> None:
        """Notes that the text is in no content. Raises `NotTold` where a part of it may be in one and the rest beside
        it."""
        if not text:
            raise NotTold
        self._asked.add(text)
        for place, part in enumerate(self._parts):
            before, behind = place > 0, place + 1 < len(self._parts)  # contents, but for two side by side
            if isinstance(part, Content):
                if behind and isinstance(self._parts[place + 1], Content) and len(text) > 1:
                    raise NotTold
                continue
            cuts = range(1, len(text))
            begins = behind and any(part.endswith(text[:cut]) for cut in cuts)
            ends = before and any(part.startswith(text[cut:]) for cut in cuts)
            if begins or ends or (before and behind and part in text[1:-1]):
                raise NotTold

    def _changed(self, change: Callable[[str], list[str]]) -> list[str]:
        """The texts that are left of this one where each plain part becomes one or several others."""
        made: list[list[str]] = [[]]
        for part in self._parts:
            pieces = [part] if isinstance(part, Content) else change(part)
            made[-1].append(pieces[0])
            made += [[piece] for piece in pieces[1:]]
        return [joined(one) for one in made]

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, str) or not other:
            return self is other
        if len(self._parts) > 1:
            raise NotTold
        return self._has(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __contains__(self, text: Any) -> bool:
        return text == "" or self._has(text)

    def startswith(self, prefix: Any) -> bool:  # type: ignore[override]
        return self._at_end(prefix, self._parts[0], str.startswith)

    def endswith(self, suffix: Any) -> bool:  # type: ignore[override]
        return self._at_end(suffix, self._parts[-1], str.endswith)

    def _at_end(self, texts: Any, part: str, holds: Callable[[str, str], bool]) -> bool:
        each = texts if isinstance(texts, tuple) else (texts,)
        for text in each:
            self._has(text)
        return not isinstance(part, Content) and any(holds(part, text) for text in each)

    def find(self, text: Any) -> int:  # type: ignore[override]
        if self._has(text):
            raise NotTold
        return -1

    def count(self, text: Any) -> int:  # type: ignore[override]
        self._has(text)
        return sum(part.count(text) for part in self._parts if not isinstance(part, Content))

    def split(self, by: Any = None) -> list[str]:  # type: ignore[override]
        self._has(by)
        return self._changed(lambda part: part.split(by))

    def replace(self, old: Any, new: Any) -> str:  # type: ignore[override]
        if not self._has(old):
            return self
        if not isinstance(new, str) or isinstance(new, Content):
            raise NotTold
        [made] = self._changed(lambda part: [part.replace(old, new)])
        return made

    def removeprefix(self, text: Any) -> str:  # type: ignore[override]
        if len(self._parts) > 1 or self._has(text):
            raise NotTold
        return self

    removesuffix = removeprefix  # type: ignore[assignment]

    def strip(self, signs: Any = None) -> str:  # type: ignore[override]
        return Content.rstrip(self.lstrip(signs), signs)  # type: ignore[arg-type]

    def lstrip(self, signs: Any = None) -> str:  # type: ignore[override]
        first, *others = self._parts
        blanks = _blanks(signs)
        return self if isinstance(first, Content) else joined((first.lstrip(blanks), *others))

    def rstrip(self, signs: Any = None) -> str:  # type: ignore[override]
        *others, last = self._parts
        blanks = _blanks(signs)
        return self if isinstance(last, Content) else joined((*others, last.rstrip(blanks)))


def joined(texts: Iterable[Any]) -> str:
    """Texts behind one another."""
    parts: list[str] = []
    for text in texts:
        made = text if isinstance(text, str) else str(text)
        for part in made._parts if isinstance(made, Content) else (made,):
            if parts and not isinstance(part, Content) and not isinstance(parts[-1], Content):
                parts[-1] += part
            elif part:
                parts.append(part)
    contents = [part for part in parts if isinstance(part, Content)]
    if len(parts) == 1 and contents:
        return contents[0]
    whole = "".join(parts)
    return Content(whole, contents[0]._asked, tuple(parts)) if contents else whole


def _not_told(*_: Any, **__: Any) -> Any:
    raise NotTold


_OF_OBJECTS = {
    "__class__", "__new__", "__init__", "__getattribute__", "__setattr__", "__delattr__", "__dir__", "__doc__",
    "__init_subclass__", "__subclasshook__", "__reduce__", "__reduce_ex__", "__sizeof__", "__getstate__",
}  # fmt: skip
_FOLLOWED = frozenset(vars(Content)) - _OF_OBJECTS
for _name in {*dir(str), "__radd__"} - _OF_OBJECTS - _FOLLOWED:
    setattr(Content, _name, _not_told)


def _blanks(signs: Any) -> Any:
    """Signs to strip, if they are blanks, which no content begins or ends with."""
    if signs is not None and not (type(signs) is str and signs.isspace()):
        raise NotTold
    return signs


class _Length:
    """The length of a content: more than none."""

    def __init__(self, content: Content) -> None:
        pass

    def _than_none(self, other: Any, answer: bool) -> bool:
        if type(other) is not int or other != 0:
            raise NotTold
        return answer

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self._than_none(other, False)

    def __ne__(self, other: object) -> bool:
        return self._than_none(other, True)

    def __gt__(self, other: Any) -> bool:
        return self._than_none(other, True)

    def __le__(self, other: Any) -> bool:
        return self._than_none(other, False)

    __hash__ = __lt__ = __ge__ = __str__ = __repr__ = _not_told  # type: ignore[assignment]


def _may_hold(value: Any) -> bool:
    """Whether there may be a content in a value."""
    if isinstance(value, Content):
        return True
    if value is None or isinstance(value, (str, int, float, Undefined)):
        return False
    if type(value) is dict:
        return any(map(_may_hold, value)) or any(map(_may_hold, value.values()))
    if type(value) in (list, tuple):
        return any(map(_may_hold, value))
    return True  # a generator, say


class _Generator(CodeGenerator):
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
            self.write(f", ({one.op!r}, ")
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
        is_told = hasattr(called, "jinja_pass_arg") or any(map(_may_hold, (*given, *arguments.values())))
        if is_told and not _takes_contents(called, self.globals, set(arguments)):
            raise NotTold
        return super().call(context, called, *given, **named)  # type: ignore[misc]

    @staticmethod
    def compared(first: Any, *others: tuple[str, Any]) -> bool:
        for name, other in others:
            if isinstance(first, Content) and isinstance(other, str) and name in ("in", "notin"):
                raise NotTold
            if not _COMPARED[name](first, other):
                return False
            first = other
        return True

    def call_binop(self, context: Any, sign: str, left: Any, right: Any) -> Any:
        if not (_may_hold(left) or _may_hold(right)):
            return super().call_binop(context, sign, left, right)  # type: ignore[misc]
        if sign == "+" and isinstance(left, str) and isinstance(right, str):
            return joined((left, right))
        if sign == "+" and type(left) is type(right) and type(left) in (list, tuple):
            return left + right
        raise NotTold

    def getattr(self, given: Any, attribute: str) -> Any:
        if isinstance(given, (Content, _Length)) and attribute not in _FOLLOWED:
            if hasattr(str, attribute) or hasattr(given, attribute):
                raise NotTold
            return self.undefined(obj=given, name=attribute)
        return super().getattr(given, attribute)  # type: ignore[misc]

    def getitem(self, given: Any, argument: Any) -> Any:
        if isinstance(argument, (Content, _Length)):
            raise NotTold
        if isinstance(given, Content) and isinstance(argument, str):
            return self.getattr(given, argument)  # as jinja does, once it has seen that a text has no such item
        return super().getitem(given, argument)  # type: ignore[misc]


_OF_JINJA = {"_loop_vars", "_block_vars"}  # arguments that jinja adds, of functions that are told of the context


def _takes_contents(called: Any, known: Mapping[str, Any], names: set[str]) -> bool:
    """Whether what is called is followed here: what the template itself says, a namespace, a content's own method, what
    raises an error, and transformers' tag {% generation %}, which gives back what it is given to write."""
    if isinstance(called, Macro) or (isinstance(called, type) and issubclass(called, Namespace)):
        return True
    if isinstance(called, types.MethodType):
        return isinstance(called.__self__, Content) or (
            called.__name__ == "_generation_support" and names == {"caller"}
        )
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
    "length": _Length,
    "count": _Length,
    "default": lambda content, *_, **__: content,
    "d": lambda content, *_, **__: content,
}


def _filter(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes contents, or raises `NotTold`."""

    @functools.wraps(made)
    def watching(*given: Any, **named: Any) -> Any:
        value, *others = given[1:] if hasattr(made, "jinja_pass_arg") else given
        if any(map(_may_hold, (*others, *named.values()))) and name not in ("default", "d"):
            raise NotTold
        if isinstance(value, Content):
            return _OF_TEXTS.get(name, _not_told)(value, *others, **named)
        if _may_hold(value) and name not in _OF_LISTS:
            raise NotTold
        return made(*given, **named)

    return watching


def _test(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """A test that takes contents, or raises `NotTold`."""

    @functools.wraps(made)
    def watching(*given: Any, **named: Any) -> Any:
        passed = given[:1] if hasattr(made, "jinja_pass_arg") else ()
        value, *others = given[len(passed) :]
        if not any(map(_may_hold, (value, *others, *named.values()))):
            return made(*given, **named)
        if name in _TYPE_TESTS:
            return made(*passed, "a text" if isinstance(value, Content) else value)
        if name in _EQUALITY_TESTS and all(isinstance(one, str) for one in (value, *others)):
            return made(*given, **named)
        raise NotTold

    return watching
