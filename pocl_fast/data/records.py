"""Instruction samples: reading JSON Lines, and turning a sample into prompt and response tokens.

Knows the three file formats and the two prompt templates. Does not know batches, models or the curriculum.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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

FORMATS = (
    'one of {"instruction", "input" (may be missing), "output"}, {"prompt", "response"} or'
    ' {"messages": [{"role", "content"}]}; "output" and "response" are a string or a list of accepted references'
)


@dataclass(frozen=True)
class Sample:
    """One instruction with its accepted answers. `messages` end before the answer; the first reference is trained
    on."""

    index: int  # position among the samples of the file, from 0
    line: int  # line in the file, from 1
    messages: tuple[dict[str, str], ...]
    references: tuple[str, ...]
    instruction: str = ""  # the last user turn in parts, for the Alpaca template
    input: str = ""


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

    def describe(self, name: str) -> str:
        parts = [f"{name}: {self.samples} samples"]
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped, their prompt is over the limit ({_some_lines(self.skipped)})")
        if self.truncated:
            parts.append(f"{len(self.truncated)} responses cut to the length limit ({_some_lines(self.truncated)})")
        return "; ".join(parts)


def read_samples(path: str | Path) -> list[Sample]:
    """The samples of a JSON Lines file, in file order; blank lines are passed over.

    Raises `InputError` naming file, line and field where something is missing, empty or of the wrong type.
    """
    return list(iter_samples(path))


def iter_samples(path: str | Path) -> Iterator[Sample]:
    """The samples of `read_samples` one by one, none of which is kept; raises the same, where it gets to."""
    path = Path(path)
    count = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield _parse(text, count, number, f"{path}, line {number}")
                    count += 1
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason})") from error
    if not count:
        raise InputError(f"{path} holds no sample; expected JSON Lines, {FORMATS}")


@dataclass(frozen=True)
class SampleSet:
    """Samples, and those of them that fit as tokens; `encoded[i].index` is a position in `samples`."""

    samples: Sequence[Sample]
    encoded: Sequence[EncodedSample]


def samples_from(records: Iterable[Mapping[str, Any]], name: str) -> list[Sample]:
    """The samples of records (a list of dicts, a `datasets.Dataset`) with the fields of one of the file formats.

    Raises `InputError` as `read_samples` does; `line` is the record's number, from 1.
    """
    samples = [_sample(dict(r), i, i + 1, f"{name}, record {i + 1}") for i, r in enumerate(records)]
    if not samples:
        raise InputError(f"{name} holds no sample; expected {FORMATS}")
    return samples


def file_fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _sha256(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _some_lines(lines: Sequence[int]) -> str:
    shown = ", ".join(str(line) for line in lines[:5])
    return f"line{'s' if len(lines) > 1 else ''} {shown}{', ...' if len(lines) > 5 else ''}"


def _parse(text: str, index: int, line: int, where: str) -> Sample:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); expected one object a line, {FORMATS}"
        ) from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}; expected {FORMATS}")
    return _sample(record, index, line, where)


def _sample(record: dict[str, Any], index: int, line: int, where: str) -> Sample:
    if "messages" in record:
        messages, reference = _chat(record["messages"], where)
        last = messages[-1]["content"]
        return Sample(index, line, messages, (reference,), instruction=last)
    if "prompt" in record or "response" in record:
        prompt = _text(record, "prompt", where)
        return Sample(index, line, _user(prompt), _references(record, "response", where), instruction=prompt)
    if "instruction" in record or "output" in record:
        instruction = _text(record, "instruction", where)
        given = record.get("input") or ""
        if not isinstance(given, str):
            raise InputError(f'{where}: field "input" must be a string, got {type(given).__name__}')
        messages = _user(f"{instruction}\n\n{given}" if given.strip() else instruction)
        references = _references(record, "output", where)
        return Sample(index, line, messages, references, instruction=instruction, input=given if given.strip() else "")
    raise InputError(f"{where}: no known field in {sorted(record)}; expected {FORMATS}")


def _user(content: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": content},)


def _text(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise InputError(f'{where}: field "{field}" is missing; the line has {sorted(record)}')
    value = record[field]
    if not isinstance(value, str):
        raise InputError(f'{where}: field "{field}" must be a string, got {type(value).__name__}')
    if not value.strip():
        raise InputError(f'{where}: field "{field}" is empty')
    return value


def _references(record: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    value = record.get(field)
    if not isinstance(value, list):
        return (_text(record, field, where),)
    if not value:
        raise InputError(f'{where}: field "{field}" is an empty list')
    for position, reference in enumerate(value):
        if not isinstance(reference, str) or not reference.strip():
            raise InputError(
                f'{where}: field "{field}", item {position}: expected a non-empty string, got {reference!r}'
            )
    return tuple(value)


def _chat(value: Any, where: str) -> tuple[tuple[dict[str, str], ...], str]:
    if not isinstance(value, list) or len(value) < 2:
        raise InputError(f'{where}: field "messages" must be a list of at least a user and an assistant message')
    messages = []
    for position, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise InputError(f'{where}: field "messages", item {position}: expected "role" and "content"')
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise InputError(f'{where}: field "messages", item {position}: "content" must be a non-empty string')
        messages.append({"role": str(message["role"]), "content": message["content"]})
    if messages[-1]["role"] != "assistant":
        raise InputError(f'{where}: the last of "messages" must be the assistant\'s, got "{messages[-1]["role"]}"')
    return tuple(messages[:-1]), messages[-1]["content"]


class SampleEncoder:
    """Turns samples into tokens: the tokenizer's chat template where it has one, else the Alpaca template of the
    paper's code.

    Of a conversation the last answer is the response; the turns before it are the prompt. `end_id` ends every response
    that is not cut; `end_ids` are the tokens that end an answer in generation.
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
        """Tokens up to where the answer starts."""
        if self.template == "alpaca":
            if len(sample.messages) > 1:
                raise InputError(
                    f"line {sample.line}: a conversation of several turns needs a tokenizer with a chat template"
                )
            form = ALPACA_WITH_INPUT if sample.input else ALPACA_NO_INPUT
            return list(self.tokenizer(form.format(instruction=sample.instruction, input=sample.input)).input_ids)
        return self._tokens(self._render(sample.messages, answer=None))

    def _encode_response(self, messages: Sequence[dict[str, str]], response: str) -> list[int]:
        eos = int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]
        if self.template == "chat":
            prompt, whole = self._render(messages, answer=None), self._render(messages, answer=response)
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

    def _render(self, messages: Sequence[dict[str, str]], answer: str | None) -> str:
        turns = [dict(message) for message in messages]
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
    """Every sample that fits, in order, and a report of those that did not. `name` is the file's, for messages.

    Raises `InputError` where a prompt is over the limit and `long_prompts` is "error", or where none is within it.
    """
    check_limits(max_length, max_prompt_length)
    encoded: list[EncodedSample] = []
    skipped: list[int] = []
    for sample in samples:
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
    return encoded, LengthReport(len(encoded), tuple(skipped), truncated)


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
