"""One record as the model sees it: its tokens, how many are of which kind, and what is not told to any model.

Knows encoders and the options of data. Does not know how it is shown (terminal.py, page.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pocl_fast.data.answer_choice import ENDS_EARLIER
from pocl_fast.data.encoded import EncodedSample, Fitted
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import Fitting
from pocl_fast.data.length_report import LengthReport
from pocl_fast.data.sample_set import SetOptions
from pocl_fast.data.token_view import TokenView, token_view
from pocl_fast.inspection.picked import OneRecord, Record
from pocl_fast.records.bad_records import BadRecord, some_lines
from pocl_fast.records.samples import Sample, iter_samples
from pocl_fast.records.sources import Source
from pocl_fast.templates import unused_fields
from pocl_fast.templates.chat_template import TemplateOptions


class Options(SetOptions, TemplateOptions, Protocol):
    """How records become samples and samples tokens."""

    @property
    def data_source(self) -> Any: ...
    @property
    def reasoning(self) -> Any: ...


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

        Raises `InputError` as a run does, but for a sample that is left out or too long, which is shown.
        """
        try:
            # not read to its end, where the fields that no record had are missed: another record may have them
            return self.look_at(next(iter_samples(OneRecord(self._source, record), fields=self._options.fields)))
        except BadRecord as error:
            if self._options.bad_records == "error":
                raise
            number, said = record
            shown = "" if isinstance(said, BadRecord) else json.dumps(said, ensure_ascii=False, default=str)
            return Inspected(self._where(number), TokenView(()), left_out=f"{error} (--bad-records skip)", record=shown)

    def look_at(self, sample: Sample) -> Inspected:
        """The same for a record that is read already."""
        options, encoder = self._options, self._encoder
        whole = EncodedSample(sample.index, (), tuple(encoder.encode_all_of(sample, self._source.name)), False)
        fitting = Fitting(
            encoder,
            max_length=options.max_length,
            max_prompt_length=options.max_prompt_length,
            long_prompts=options.long_prompts,
            name=self._source.name,
        )
        [fitted] = fitting.fitted([sample])
        report = fitting.taken()
        view = token_view(fitted.encoded, encoder.tokenizer, whole)
        trains = [] if fitted.encoded is None else self._trains(fitted, fitted.encoded, sample)
        return Inspected(
            self._where(sample.line),
            view,
            (*self._counts(view), ("template", self._template(sample)), *trains),
            (*self._cut(fitted, view, sample, report), *self._decided(sample, report)),
            self._left_out(fitted),
        )

    def _where(self, number: int) -> str:
        return f"{self._source.name}, {self._source.unit} {number}"

    def _left_out(self, fitted: Fitted) -> str:
        """Why a sample is not trained on."""
        if fitted.encoded is not None:
            return ""
        if not fitted.asked:
            return "no answer has reasoning in the prompt's format: it is left out (--reasoning only)"
        most, policy = self._options.max_prompt_length, self._options.long_prompts
        does = "it is left out" if policy == "skip" else "a run stops before it begins"
        over = f"its prompt has {fitted.asked:,} tokens, over --max-prompt-length {most}"
        if policy == "truncate-left":
            over += ", and would be over it even with one sign left of its question"
        return f"{over}: {does} (--long-prompts {policy})"

    # -- what there is to say -----------------------------------------------------------------------------------------

    def _counts(self, view: TokenView) -> list[tuple[str, str]]:
        counts: dict[str, int] = {kind: view.count(kind) for kind in ("prompt", "supervised", "context", "cut")}
        kept = sum(counts.values()) - counts["cut"]
        limits = f"--max-length {self._options.max_length}, --max-prompt-length {self._options.max_prompt_length}"
        if not counts["context"]:
            del counts["context"]
        return [*((kind, _tokens(count)) for kind, count in counts.items()), ("kept", f"{_tokens(kept)} ({limits})")]

    def _trains(self, fitted: Fitted, one: EncodedSample, sample: Sample) -> list[tuple[str, str]]:
        last = one.ids[one.spans[-1][1] - 1]
        if last in self._encoder.end_ids:
            end = f"{self._encoder.tokenizer.convert_ids_to_tokens(last)} (id {last})"
        elif self._options.reasoning == "only" and one.spans[-1][1] < len(one):
            end = "none: --reasoning only trains on what is before it"
        else:
            end = "none: the answer is cut before its end"
        turns = len(sample.messages) + 1
        there = _kept(fitted, turns)
        trained = [there[place] + 1 for place in fitted.trained]
        if turns == 2:
            which = "the answer"
        elif trained == [turns]:
            which = f"the last of {turns} turns"
        else:
            which = f"{_turns(trained)} of {turns}"
        return [("end of answer", end), ("trained on", which)]

    def _template(self, sample: Sample) -> str:
        chat = self._encoder.chat
        if chat is None:
            return "the Alpaca template of the paper's code"
        if (chosen := self._options.chat_template) is not None:
            return f"--chat-template {chosen}"
        name = "tool_use" if sample.tools and "tool_use" in chat.texts else next(iter(chat.texts))
        return f"the tokenizer's chat template {name!r}"

    def _cut(self, fitted: Fitted, view: TokenView, sample: Sample, report: LengthReport) -> list[str]:
        """What the limits took away: tokens, and turns."""
        if fitted.encoded is None:
            return []
        notes, before = [], 0
        if report.shortened.lines:
            last = max(i for i, token in enumerate(view.tokens) if token.kind != "cut")
            before = sum(len(token.ids) for token in view.tokens[:last] if token.kind == "cut")
            lost = [_turns([place + 1 for place in fitted.lost])] if fitted.lost else []
            lost += ["the beginning of what is asked"] if report.shortened.cut else []
            notes.append(
                f"--long-prompts {self._options.long_prompts} takes {_tokens(before)} out of the prompt:"
                f" {' and '.join(lost)}"
            )
        if (behind := view.count("cut") - before) > 0:
            turns = len(sample.messages) + 1
            ended = _kept(fitted, turns)[len(fitted.sample.messages) + 1 :]
            lost = [f": {_turns([place + 1 for place in ended])}"] if ended else []
            notes.append(f"--max-length {self._options.max_length} cuts {_tokens(behind)} off the end{''.join(lost)}")
        return notes

    def _decided(self, sample: Sample, report: LengthReport) -> list[str]:
        """What the record says and no model is told, and what else was decided about it."""

        def some(lines: Sequence[int]) -> str:
            return some_lines(lines, sample.unit)

        told = (note for note in report.notes if note.decision != ENDS_EARLIER)  # `_cut` says that
        notes = [note.describe(some(note.lines)) for note in told]
        notes += [unused_fields.describe(report.unused)] if report.unused else []
        notes += [f"the template does not write the {what}" for what, _ in report.unwritten]
        notes += [report.control.describe(some(report.control.lines))] if report.control.lines else []
        if (more := len(sample.references) - 1) > 0:
            notes.append(f"of {more + 1} accepted answers the first is trained on")
        if self._options.data_source == "teacher":
            notes.append("--data-source teacher: a run trains on the teacher's answer in place of this one")
        return notes


def _kept(fitted: Fitted, turns: int) -> list[int]:
    """The places of the turns that are left where some are lost at the beginning."""
    return [place for place in range(turns) if place not in fitted.lost]


def _turns(numbers: Sequence[int]) -> str:
    """Turns, from 1, in words: "turn 4", "turns 2, 4, 6"; "turns 5 to 9" for more than three in a row."""
    if len(numbers) == 1:
        return f"turn {numbers[0]}"
    if len(numbers) > 3 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"turns {numbers[0]} to {numbers[-1]}"
    return f"turns {', '.join(map(str, numbers))}"


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count:,} tokens"
