"""One record as the model sees it: its tokens, how many are of which kind, and what is not told to any model.

Knows encoders and the options of data. Does not know how it is shown (terminal.py, page.py).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any, Protocol

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.data.length_report import LengthReport
from pocl_fast.data.sample_set import SetOptions
from pocl_fast.data.token_view import TokenView, token_view
from pocl_fast.inspection.picked import OneRecord, Record
from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.samples import Sample, iter_samples
from pocl_fast.records.sources import Source
from pocl_fast.templates import unused_fields
from pocl_fast.templates.chat_template import TemplateOptions

_NO_LIMIT = sys.maxsize


class Options(SetOptions, TemplateOptions, Protocol):
    """How records become samples and samples tokens."""

    @property
    def data_source(self) -> Any: ...


@dataclass(frozen=True)
class Inspected:
    """A record, its tokens, and what there is to say of them."""

    where: str  # file and number, as messages name it
    view: TokenView
    facts: tuple[tuple[str, str], ...] = ()  # name and value
    notes: tuple[str, ...] = ()  # what no model is told, and what was cut
    left_out: str = ""  # why it is not trained on
    record: str = ""  # as it is in the file, where it is no sample


class Inspector:
    """Looks at records one by one, with the encoder and the options of a run."""

    def __init__(self, source: Source, encoder: SampleEncoder, options: Options) -> None:
        self._source, self._encoder, self._options = source, encoder, options

    def look(self, record: Record) -> Inspected:
        """A record as the model sees it, with what a run would do about it.

        Raises `InputError` as a run does, but for a prompt over the limit, which is shown.
        """
        try:
            [sample] = iter_samples(OneRecord(self._source, record), fields=self._options.fields)
            return self.look_at(sample)
        except BadRecord as error:
            if self._options.bad_records == "error":
                raise
            said = json.dumps(record[1], ensure_ascii=False, default=str)
            return Inspected(
                self._where(record[0]), TokenView(()), left_out=f"{error} (--bad-records skip)", record=said
            )

    def look_at(self, sample: Sample) -> Inspected:
        """The same for a record that is read already."""
        options = self._options
        whole, report = self._encoded(sample, _NO_LIMIT)
        left_out = self._over_the_limit(_asked(whole))
        one = None if left_out else self._encoded(sample, options.max_length)[0]
        view = token_view(one, self._encoder.tokenizer, whole)
        facts = (*self._counts(view), *self._facts(one or whole, whole, sample))
        notes = (*self._cut(one, whole), *self._untold(sample, report))
        return Inspected(self._where(sample.line), view, facts, notes, left_out)

    def _where(self, number: int) -> str:
        return f"{self._source.name}, {self._source.unit} {number}"

    def _encoded(self, sample: Sample, max_length: int) -> tuple[EncodedSample, LengthReport]:
        """The sample's tokens, as a run makes them."""
        encoded, report = encode_all(
            [sample],
            self._encoder,
            max_length=max_length,
            max_prompt_length=max_length - 1 if max_length == _NO_LIMIT else self._options.max_prompt_length,
            long_prompts=self._options.long_prompts,
            name=self._source.name,
        )
        return encoded[0], report

    def _over_the_limit(self, tokens: int) -> str:
        most, policy = self._options.max_prompt_length, self._options.long_prompts
        if tokens <= most or policy == "truncate-left":
            return ""
        does = "it is left out" if policy == "skip" else "a run stops before it begins"
        return f"its prompt has {tokens} tokens, over --max-prompt-length {most}: {does} (--long-prompts {policy})"

    # -- what there is to say -----------------------------------------------------------------------------------------

    def _counts(self, view: TokenView) -> list[tuple[str, str]]:
        counts: dict[str, int] = {kind: view.count(kind) for kind in ("prompt", "supervised", "context", "cut")}
        kept = sum(counts.values()) - counts["cut"]
        limits = f"--max-length {self._options.max_length}, --max-prompt-length {self._options.max_prompt_length}"
        if not counts["context"]:
            del counts["context"]
        return [*((kind, _tokens(count)) for kind, count in counts.items()), ("kept", f"{_tokens(kept)} ({limits})")]

    def _facts(self, one: EncodedSample, whole: EncodedSample, sample: Sample) -> list[tuple[str, str]]:
        last = one.ids[one.spans[-1][1] - 1]
        if one.truncated or last not in self._encoder.end_ids:
            end = "none: the answer is cut before its end"
        else:
            end = f"{self._encoder.tokenizer.convert_ids_to_tokens(last)} (id {last})"
        return [
            ("end of answer", end),
            ("template", self._template(sample)),
            ("trained on", _turns(one, whole, sample)),
        ]

    def _template(self, sample: Sample) -> str:
        chat = self._encoder.chat
        if chat is None:
            return "the Alpaca template of the paper's code"
        if (chosen := self._options.chat_template) is not None:
            return f"--chat-template {chosen}"
        name = "tool_use" if sample.tools and "tool_use" in chat.texts else next(iter(chat.texts))
        return f"the tokenizer's chat template {name!r}"

    def _cut(self, one: EncodedSample | None, whole: EncodedSample) -> list[str]:
        if one is None:
            return []
        notes = []
        asked = max(0, _asked(whole) - _asked(one))
        if (rest := len(whole) - len(one) - asked) > 0:
            notes.append(f"--max-length {self._options.max_length} cuts {_tokens(rest)} off the end")
        if asked:
            notes.append(f"--long-prompts {self._options.long_prompts} took away {_tokens(asked)} of the prompt")
        return notes

    def _untold(self, sample: Sample, report: LengthReport) -> list[str]:
        """What the record says and no model is told."""
        notes = [unused_fields.describe(report.unused)] if report.unused else []
        notes += [f"the template does not write the {what}" for what, _ in report.unwritten]
        if (more := len(sample.references) - 1) > 0:
            notes.append(f"of {more + 1} accepted answers the first is trained on")
        if self._options.data_source == "teacher":
            notes.append("--data-source teacher: a run trains on the teacher's answer in place of this one")
        return notes


def _asked(one: EncodedSample) -> int:
    """How many tokens are before the first one that is trained on."""
    return one.spans[0][0]


def _turns(one: EncodedSample, whole: EncodedSample, sample: Sample) -> str:
    """Which of a conversation's turns are trained on, from 1."""
    turns = len(sample.messages) + 1
    if len(whole.spans) == 1:
        return f"the last of {turns} turns" if turns > 2 else "the answer"
    places = (*sample.earlier, len(sample.messages))
    if len(places) == len(one.spans):
        return f"turns {', '.join(str(place + 1) for place in places)} of {turns}"
    return f"{len(one.spans)} of the {len(whole.spans)} parts that the answers of {turns} turns have"


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count:,} tokens"
