"""From a sample to tokens: the chat template or the Alpaca template, length limits, and what these did to a data set.

Knows tokenizers. Does not know files (records.py), batches or models.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pocl_fast.data import unused_fields
from pocl_fast.data.records import Message, Sample
from pocl_fast.system.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "chat", "alpaca"]

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
    """A sample as token ids. `response_ids` end with the end-of-turn token unless `truncated`."""

    index: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    truncated: bool

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @cached_property  # asked for at every step
    def fingerprint(self) -> bytes:
        """16 bytes that identify the tokens, and which of them are the response."""
        digest = hashlib.sha256(str(len(self.prompt_ids)).encode())
        digest.update(array("q", self.prompt_ids + self.response_ids).tobytes())
        return digest.digest()[:16]


@dataclass(frozen=True)
class LengthReport:
    """What the length limits did to a data set; `skipped` and `truncated` hold line numbers."""

    samples: int
    skipped: tuple[int, ...]
    truncated: tuple[int, ...]
    unused: tuple[tuple[str, int], ...] = ()  # fields that no model is told, and how many records have them

    def describe(self, name: str) -> str:
        parts = [f"{name}: {self.samples} samples"]
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped for a prompt over the limit ({_some_lines(self.skipped)})")
        if self.truncated:
            parts.append(f"{_responses(len(self.truncated))} cut to the length limit ({_some_lines(self.truncated)})")
        if self.unused:
            parts.append(unused_fields.describe(self.unused))
        return "; ".join(parts)


@dataclass(frozen=True)
class SampleSet:
    """Samples, and those of them that fit as tokens; `encoded[i].index` is a position in `samples`."""

    samples: Sequence[Sample]
    encoded: Sequence[EncodedSample]


class SampleEncoder:
    """Turns samples into tokens: the tokenizer's chat template where it has one, else the Alpaca template of the
    paper's code.

    The last answer of a conversation is the response, the turns before it are the prompt. Every response ends with
    `end_id` unless it is cut; generation stops at any of `end_ids`. Raises `InputError` for a tokenizer without an
    end-of-sequence token, and for `template` "chat" where it has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template = "auto") -> None:
        if template == "chat" and not tokenizer.chat_template:
            raise InputError("--template chat: the tokenizer has no chat template; use --template alpaca")
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no end-of-sequence token, so no answer could ever end; set one in its files"
            )
        self.tokenizer = tokenizer
        self.template: Template = ("chat" if tokenizer.chat_template else "alpaca") if template == "auto" else template
        end = self._encode_response(({"role": "user", "content": "a"},), "b")[-1]
        self.end_id = int(end)
        self.end_ids = frozenset({int(tokenizer.eos_token_id), end})

    def encode(self, sample: Sample, *, max_length: int, max_prompt_length: int) -> EncodedSample | None:
        """Prompt and response tokens of one sample, or None where the prompt is over `max_prompt_length` tokens.

        A response that passes `max_length` in all is cut and marked `truncated`; at least one token of it always stays.
        """
        prompt_ids = self.encode_prompt(sample)
        if len(prompt_ids) > max_prompt_length:
            return None
        response_ids = self._encode_response(sample.messages, sample.references[0])
        room = max_length - len(prompt_ids)
        return EncodedSample(sample.index, tuple(prompt_ids), tuple(response_ids[:room]), len(response_ids) > room)

    def encode_prompt(self, sample: Sample) -> list[int]:
        """The prompt's tokens, up to where the answer starts."""
        if self.template == "alpaca":
            if len(sample.messages) > 1:
                raise InputError(
                    f"line {sample.line}: a conversation of several turns needs a tokenizer with a chat template"
                )
            form = ALPACA_WITH_INPUT if sample.input else ALPACA_NO_INPUT
            return list(self.tokenizer(form.format(instruction=sample.instruction, input=sample.input)).input_ids)
        return self._tokens(self._apply_chat_template(sample.messages, answer=None))

    def _encode_response(self, messages: Sequence[Message], response: str) -> list[int]:
        eos = int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]
        if self.template == "chat":
            prompt, whole = (
                self._apply_chat_template(messages, answer=None),
                self._apply_chat_template(messages, answer=response),
            )
            if whole.startswith(prompt):
                ids = self._tokens(whole[len(prompt) :])
                ends = [i for i, token in enumerate(ids) if token in self._special_ids]
                return ids[: ends[-1] + 1] if ends else [*ids, eos]
        return [*self._tokens(response), eos]  # also for templates that rewrite the answer they are given

    @property
    def _special_ids(self) -> set[int]:
        return set(self.tokenizer.all_special_ids)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _apply_chat_template(self, messages: Sequence[Message], answer: str | None) -> str:
        turns: list[Any] = [dict(message) for message in messages]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None))


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
    encoded: list[EncodedSample] = []
    skipped: list[int] = []
    fields = unused_fields.UnusedFields(encoder, name)
    for sample in samples:
        fields.see(sample)
        one = encoder.encode(sample, max_length=max_length, max_prompt_length=max_prompt_length)
        if one is None:
            skipped.append(sample.line)
        else:
            encoded.append(one)
    if skipped and (long_prompts == "error" or not encoded):
        longest = max(len(encoder.encode_prompt(sample)) for sample in samples)
        raise over_the_limit(name, skipped, len(samples), longest, max_prompt_length)
    line_of = {sample.index: sample.line for sample in samples}
    truncated = tuple(line_of[one.index] for one in encoded if one.truncated)
    return encoded, LengthReport(len(encoded), tuple(skipped), truncated, fields.counts)


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
