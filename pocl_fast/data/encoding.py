"""From a sample to tokens: the chat template or the Alpaca template, length limits, and what these did to a data set.

Knows tokenizers. Does not know files (records/sources.py), batches or models.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pocl_fast.data import unused_fields
from pocl_fast.data.answer_span import AnswerFinder, Split
from pocl_fast.data.answer_text import PLAIN, AnswerReader
from pocl_fast.data.chat_template import ChatTemplate, TemplateOptions, TemplateRefusal, chosen_template, make_default
from pocl_fast.data.token_border import TokenBorder
from pocl_fast.records.samples import Sample
from pocl_fast.system.console import watched
from pocl_fast.system.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "chat", "alpaca"]
Span: TypeAlias = tuple[int, int]  # from, to

# The templates of Stanford Alpaca, as in the code of MiniLLM, DistiLLM and POCL.
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class EncodedSample:
    """A sample as token ids: what a model is asked with, and the answer to it. `response_ids` end with the end-of-turn
    token unless `truncated`."""

    index: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    truncated: bool
    supervised: tuple[Span, ...] = ()  # the tokens that are trained on, where these are not the response alone

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens."""
        return self.prompt_ids + self.response_ids

    @property
    def spans(self) -> tuple[Span, ...]:
        """The supervised tokens, as places among `ids`: from, to; ascending, apart, none empty, none at place 0."""
        return self.supervised or ((len(self.prompt_ids), len(self)),)

    @property
    def supervised_count(self) -> int:
        """How many tokens are supervised."""
        return sum(end - start for start, end in self.spans)

    @cached_property  # asked for at every step
    def fingerprint(self) -> bytes:
        """16 bytes that identify the tokens, and which of them are supervised and the response."""
        digest = hashlib.sha256(str((len(self.prompt_ids), *self.supervised)).encode())
        digest.update(array("q", self.ids).tobytes())
        return digest.digest()[:16]


@dataclass(frozen=True)
class LengthReport:
    """What the length limits did to a data set; `skipped` and `truncated` hold line numbers."""

    samples: int
    skipped: tuple[int, ...]
    truncated: tuple[int, ...]
    unused: tuple[tuple[str, int], ...] = ()  # fields that no model is told, and how many records have them
    unwritten: tuple[tuple[str, tuple[int, ...]], ...] = ()  # what the template left out, and of which lines

    def describe(self, name: str) -> str:
        parts = [f"{name}: {self.samples} samples"]
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped for a prompt over the limit ({_some_lines(self.skipped)})")
        if self.truncated:
            parts.append(f"{_responses(len(self.truncated))} cut to the length limit ({_some_lines(self.truncated)})")
        if self.unused:
            parts.append(unused_fields.describe(self.unused))
        for what, lines in self.unwritten:
            purpose = ", as many templates do on purpose" if what == unused_fields.EARLIER_REASONING else ""
            parts.append(f"the template does not write the {what} of {len(lines)} ({_some_lines(lines)}){purpose}")
        return "; ".join(parts)


class SampleEncoder:
    """Turns samples into tokens: the tokenizer's chat template where it has one, else the Alpaca template of the
    paper's code.

    The last answer of a conversation is the response, the turns before it are the prompt. Both are tokenised as one
    text, as a model reads them, and cut as `TokenBorder` says: every answer to a question has the same prompt. Every
    response ends with the template's end of turn, and with the end-of-sequence token where the template has none or
    writes one that is no single token, unless it is cut; generation stops at any of `end_ids`. Raises `InputError` for
    a tokenizer without an end-of-sequence token, and for `template` "chat" where it has no chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template = "auto", *, chat: ChatTemplate | None = None
    ) -> None:
        """`chat` is the chat template where it is not the tokenizer's own without further variables."""
        if template == "chat" and not (tokenizer.chat_template or chat):
            raise InputError("--template chat: the tokenizer has no chat template; use --template alpaca")
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no end-of-sequence token, so no answer could ever end; set one in its files"
            )
        self.tokenizer = tokenizer
        if template == "auto":
            template = "chat" if chat or tokenizer.chat_template else "alpaca"
        self.template: Template = template
        self._eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        self._special = frozenset(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
        self._border = TokenBorder(tokenizer, self._special)
        self.end_id, self._ends = self._eos, {self._eos}
        self._end_is_known = template == "alpaca"
        self._unwritten: dict[str, list[int]] = {}
        self.chat: ChatTemplate | None = None
        shape = PLAIN
        if template == "chat":
            self.chat = chat or ChatTemplate.chosen(tokenizer)
            self._unshown = unused_fields.UnshownTurns(self.chat)
            self._finder = AnswerFinder(self.chat, tokenizer.get_added_vocab())
            shape = self._finder.shape
            self._learn_end()
        else:
            self._begin = self._tokens_before_a_text()
        self._reader = AnswerReader(tokenizer, shape)

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the end-of-sequence token and the template's ends of turn."""
        return frozenset(self._ends)

    def stop_also_at(self, ids: Iterable[int]) -> None:
        """Adds stop tokens of a model whose answers are trained on."""
        self._ends.update(ids)

    def encode(
        self, sample: Sample, *, max_length: int, max_prompt_length: int, name: str = ""
    ) -> EncodedSample | None:
        """Prompt and response tokens of one sample, or None where the prompt is over `max_prompt_length` tokens.

        A response that passes `max_length` in all is cut and marked `truncated`; at least one token of it always stays.
        Raises `InputError` with the sample's line, and the `name` of its file, where the template cannot render it.
        """
        prompt_ids, response_ids = self._tokens_of(sample, name)
        if len(prompt_ids) > max_prompt_length:
            return None
        room = max_length - len(prompt_ids)
        return EncodedSample(sample.index, tuple(prompt_ids), tuple(response_ids[:room]), len(response_ids) > room)

    def encode_prompt(self, sample: Sample) -> list[int]:
        """The prompt's tokens, up to where the answer starts."""
        return self._tokens_of(sample, "")[0]

    def answer_texts(
        self, answers: Sequence[Sequence[int]], references: Sequence[Sequence[str]] | None = None
    ) -> list[str]:
        """The text of each answer (token ids without the end token) that is compared with its references: without what
        the template writes around it, and without reasoning where no reference has any."""
        return self._reader.texts(answers, references)

    def take_unwritten(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What the chat template did not write of the samples encoded since the last call, each with line numbers."""
        taken = tuple((what, tuple(dict.fromkeys(lines))) for what, lines in self._unwritten.items())
        self._unwritten.clear()
        return taken

    # -- inside -----------------------------------------------------------------------------------------------------

    def _tokens_of(self, sample: Sample, name: str) -> tuple[list[int], list[int]]:
        where = f"{name}, line {sample.line}" if name else f"line {sample.line}"
        if self.template == "alpaca":
            return self._tokens(self._alpaca(sample, where), self._begin)
        assert self.chat is not None
        try:
            split = self._finder.split(sample.messages, sample.tools, sample.answer_turn)
        except TemplateRefusal as refusal:
            hint = " (the system message is --system-prompt's)" if self.chat.system_prompt else ""
            raise InputError(
                f"{where}: {refusal}{hint}. {'Take' if self._finder.shape.leaves_out else 'Change this record or take'}"
                " another template: --chat-template NAME or FILE, --template alpaca"
            ) from refusal
        messages = self.chat.messages(sample.messages)
        self._check_turns(messages, sample, split, where)
        for what in unused_fields.unwritten(messages, sample.tools, sample.answer_turn, split):
            self._unwritten.setdefault(what, []).append(sample.line)
        prompt, response = self._tokens(split)
        if not self._end_is_known:
            self.end_id, self._end_is_known = response[-1], True
        return prompt, response

    def _check_turns(self, messages: Sequence[Any], sample: Sample, split: Split, where: str) -> None:
        """Counts earlier turns that the template leaves out. Raises `InputError` where it leaves the question out."""
        places = self._unshown.places(messages, sample.tools, split.prompt)
        if not places:
            return
        asks = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        if not {asks, len(messages) - 1}.isdisjoint(places):
            raise unused_fields.means_more(where, "the chat template leaves the question out, or a part of it")
        self._unwritten.setdefault("earlier turns", []).append(sample.line)

    def _alpaca(self, sample: Sample, where: str) -> Split:
        if len(sample.messages) > 1:
            raise InputError(f"{where}: a conversation of several turns needs a tokenizer with a chat template")
        if sample.tools or sample.answer_turn.get("tool_calls"):
            raise InputError(f"{where}: tools and tool calls need a tokenizer with a chat template")
        if sample.answer_turn.get("reasoning_content"):
            self._unwritten.setdefault("reasoning", []).append(sample.line)
        form = ALPACA_WITH_INPUT if sample.input else ALPACA_NO_INPUT
        prompt = form.format(instruction=sample.instruction, input=sample.input)
        return Split(prompt, sample.references[0], ended=False)

    def _tokens(self, split: Split, begin: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """The text's tokens before and from where the response starts, `begin` before them, an end behind them."""
        prompt, response = self._border.parts(split.prompt, split.answer)
        ended = split.ended and response and response[-1] in self._special
        if ended and response[-1] != self.tokenizer.unk_token_id:
            self._ends.add(response[-1])
        elif not response or response[-1] != self._eos:
            response.append(self._eos)
        return [*begin, *prompt], response

    def _tokens_before_a_text(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text; what it puts behind one would end the prompt."""
        bare = list(self.tokenizer("a", add_special_tokens=False).input_ids)
        full = list(self.tokenizer("a").input_ids)
        found = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
        return full[:found]

    def _learn_end(self) -> None:
        """The end of turn of a plain answer; of a template that refuses plain questions it is that of the first
        sample."""
        system, question = {"role": "system", "content": "s"}, {"role": "user", "content": "a"}
        for messages in ((question,), (system, question)):
            try:
                split = self._finder.split(messages, (), {"role": "assistant", "content": "b"})
            except TemplateRefusal:
                continue
            self.end_id, self._end_is_known = self._tokens(split)[1][-1], True
            return


def encoder_of(
    tokenizer: PreTrainedTokenizerBase, options: TemplateOptions, folder: Path, say: Callable[[str], object]
) -> SampleEncoder:
    """The encoder that a run's options or a trainer's arguments ask for.

    The date of a template that writes it is kept in `folder`; a template that the options choose becomes the
    tokenizer's own. Every rank must call. Raises `InputError` as `chosen_template` and `SampleEncoder` do.
    """
    chat = chosen_template(tokenizer, options, folder, say)
    if options.chat_template is not None:
        make_default(tokenizer, options.chat_template)  # whoever loads the student asks it as it was trained
    return SampleEncoder(tokenizer, "chat" if chat else "alpaca", chat=chat)


def encode_all(
    samples: Sequence[Sample],
    encoder: SampleEncoder,
    *,
    max_length: int,
    max_prompt_length: int,
    long_prompts: Literal["error", "skip"],
    name: str,
) -> tuple[list[EncodedSample], LengthReport]:
    """Every sample that fits, in order, and a report of those that did not; `name` stands for the file in messages.

    Raises `InputError` where a prompt is over the limit and `long_prompts` is "error", or where all are over it.
    """
    check_limits(max_length, max_prompt_length)
    encoder.take_unwritten()
    encoded: list[EncodedSample] = []
    skipped: list[int] = []
    fields = unused_fields.UnusedFields(encoder, name)
    for sample in watched(samples, f"reading {name}", "samples"):
        fields.see(sample)
        one = encoder.encode(sample, max_length=max_length, max_prompt_length=max_prompt_length, name=name)
        if one is None:
            skipped.append(sample.line)
        else:
            encoded.append(one)
    left_out = encoder.take_unwritten()
    if skipped and (long_prompts == "error" or not encoded):
        longest = max(len(encoder.encode_prompt(sample)) for sample in samples)
        raise over_the_limit(name, skipped, len(samples), longest, max_prompt_length)
    line_of = {sample.index: sample.line for sample in samples}
    truncated = tuple(line_of[one.index] for one in encoded if one.truncated)
    return encoded, LengthReport(len(encoded), tuple(skipped), truncated, fields.counts, left_out)


def check_limits(max_length: int, max_prompt_length: int) -> None:
    """Raises `InputError` where a longest prompt would leave no room for a response."""
    if not 0 < max_prompt_length < max_length:
        raise InputError(
            f"--max-prompt-length ({max_prompt_length}) must be at least 1 and below --max-length ({max_length}),"
            " so that every response has room"
        )


def over_the_limit(name: str, lines: Sequence[int], samples: int, longest: int, max_prompt_length: int) -> InputError:
    """The error that says which prompts are over the limit, and what to do."""
    return InputError(
        f"{name}: {len(lines)} of {samples} prompts are over --max-prompt-length {max_prompt_length} tokens"
        f" ({_some_lines(lines)}; the longest has {longest}). Raise --max-prompt-length and --max-length,"
        " or pass --long-prompts skip to leave these samples out"
    )


def _responses(count: int) -> str:
    return "1 response" if count == 1 else f"{count} responses"


def _some_lines(lines: Sequence[int]) -> str:
    shown = ", ".join(str(line) for line in lines[:5])
    return f"line{'s' if len(lines) > 1 else ''} {shown}{', ...' if len(lines) > 5 else ''}"
