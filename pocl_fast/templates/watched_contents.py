"""Contents of messages which note what a chat template asks of them.

Knows texts, and what of them is the same whatever the contents say. Does not know jinja (watched_template.py), nor
conversations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import Undefined


class NotTold(Exception):
    """The text that a template writes may depend on the contents in a way that is not followed here."""


def has_bare_ends(content: str) -> bool:
    """Whether a content is not empty, and neither begins nor ends with blanks."""
    return bool(content) and not content[0].isspace() and not content[-1].isspace()


def is_alike(content: str, asked: Iterable[str]) -> bool:
    """Whether a content is none that a template which asks for these texts may write otherwise."""
    return has_bare_ends(content) and not any(text in content for text in asked)


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
        if type(text) is not str:
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
        if type(new) is not str:
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
        made = text if isinstance(text, Content) else str(text)
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


def not_told(*_: Any, **__: Any) -> Any:
    raise NotTold


_OF_OBJECTS = {
    "__class__", "__new__", "__init__", "__getattribute__", "__setattr__", "__delattr__", "__dir__", "__doc__",
    "__init_subclass__", "__subclasshook__", "__reduce__", "__reduce_ex__", "__sizeof__", "__getstate__",
}  # fmt: skip
FOLLOWED = frozenset(name for name, made in vars(Content).items() if made is not None) - _OF_OBJECTS
for _name in {*dir(str), "__radd__"} - _OF_OBJECTS - FOLLOWED:
    setattr(Content, _name, not_told)


def _blanks(signs: Any) -> Any:
    """Signs to strip, if they are blanks, which no content begins or ends with."""
    if signs is not None and not (type(signs) is str and signs.isspace()):
        raise NotTold
    return signs


class Method:
    """A content's method, which is called and no more."""

    def __init__(self, followed: Callable[..., Any]) -> None:
        self._followed = followed

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._followed(*given, **named)

    __eq__ = __hash__ = __str__ = __repr__ = not_told  # type: ignore[assignment]


class Length:
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

    __hash__ = __lt__ = __ge__ = __str__ = __repr__ = not_told  # type: ignore[assignment]


def may_hold(value: Any) -> bool:
    """Whether there may be a content in a value."""
    if isinstance(value, Content):
        return True
    if value is None or isinstance(value, (str, int, float, Undefined)):
        return False
    if type(value) is dict:
        return any(map(may_hold, value)) or any(map(may_hold, value.values()))
    if type(value) in (list, tuple):
        return any(map(may_hold, value))
    return True  # a generator, say
