"""What transformers writes of plain conversations, without what it does anew at each call.

Its `apply_chat_template` copies and checks every message, and makes a list of all that a template may call. Of turns
that are a role and a text nothing is left to copy or to check. Does not know which template is taken
(chat_template.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pocl_fast.templates.watched_template import WatchedTemplate

_PLAIN = (str, int, float, bool, type(None))


def is_plain(messages: Sequence[Any]) -> bool:
    """Whether each message is a role and a text, and no more."""
    for message in messages:
        if message.__class__ is not dict or len(message) != 2:
            return False
        if message.get("role").__class__ is not str or message.get("content").__class__ is not str:
            return False
    return len(messages) > 0


class PlainRenderer:
    """One template's texts of plain conversations without tools."""

    def __init__(self, tokenizer: Any, text: str, kwargs: Mapping[str, Any]) -> None:
        """`text` is the template, `kwargs` its variables. A tokenizer of another kind than transformers' own may write
        otherwise: it is asked itself."""
        self._tokenizer, self._text, self._given = tokenizer, text, dict(kwargs)
        self._template = _compiled(tokenizer, text) if all(type(value) in _PLAIN for value in kwargs.values()) else None
        self._globals = {} if self._template is None else dict(self._template.globals)
        self._watching: WatchedTemplate | None = None
        self._agrees: dict[bool, bool] = {}  # with transformers: of prompts, of whole conversations

    def render(self, messages: Sequence[Any], prompt: bool) -> str | None:
        """The text, as transformers writes it; None where it is to be asked. Raises what the template raises."""
        if self._template is None or not self._agrees.get(prompt, True):
            return None
        written = self._written(messages, prompt)
        if prompt not in self._agrees:  # once, in case that this version of transformers gives templates something else
            theirs = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, chat_template=self._text, **self._given
            )
            self._agrees[prompt] = written == theirs
            return str(theirs)
        return written

    def watched(self, messages: Sequence[Any], prompt: bool) -> tuple[str, frozenset[str]] | None:
        """The text, and what contents may not have in them for being written alike: see `WatchedTemplate`. None where
        that is not known. Contents may be in parts."""
        if self._template is None or not self._agrees.get(prompt, True):
            return None
        try:
            self._watching = self._watching or WatchedTemplate(self._template, self._text)
            return self._watching.render(messages, self._variables(messages, prompt))
        except Exception:  # a template is a program of its author's: it may raise anything
            return None

    def _written(self, messages: Sequence[Any], prompt: bool) -> str:
        assert self._template is not None
        environment, variables = self._template.environment, self._variables(messages, prompt)
        context = environment.context_class(environment, variables, self._template.name, self._template.blocks)
        return str(environment.concat(self._template.root_render_func(context)))

    def _variables(self, messages: Sequence[Any], prompt: bool) -> dict[str, Any]:
        return {
            **self._globals,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": prompt,
            **self._tokenizer.special_tokens_map,
            **self._given,
        }


def renders_as_transformers(tokenizer: Any) -> bool:
    """Whether a tokenizer writes texts as transformers' own do, from the template alone."""
    from transformers import PreTrainedTokenizerBase

    return getattr(type(tokenizer), "apply_chat_template", None) is PreTrainedTokenizerBase.apply_chat_template


def _compiled(tokenizer: Any, text: str) -> Any | None:
    """transformers' own compiled template; None where the tokenizer renders otherwise, or transformers has none."""
    from transformers.utils import chat_template_utils

    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    return None if compile_template is None or not renders_as_transformers(tokenizer) else compile_template(text)
