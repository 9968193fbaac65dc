"""From a sample to tokens: the chat template or the Alpaca template, length limits, and what these did to a data set.

Knows tokenizers. Does not know files (records/sources.py), batches or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from pocl_fast.data.answer_choice import (
    ENDS_EARLIER,
    AnswerChoice,
    ChoiceOptions,
    TrainOn,
    Turns,
    texts_of,
)
from pocl_fast.data.answer_text import PLAIN, AnswerReader
from pocl_fast.data.control_text import ControlText, KeptAsText
from pocl_fast.data.encoded import EncodedSample, Fitted, SharedIds
from pocl_fast.data.token_border import TokenBorder
from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.samples import Sample
from pocl_fast.system.errors import InputError
from pocl_fast.templates import alpaca
from pocl_fast.templates.answer_span import AnswerFinder, Split
from pocl_fast.templates.chat_template import (
    ChatTemplate,
    TemplateOptions,
    TemplateRefusal,
    chosen_template,
    make_default,
)
from pocl_fast.templates.conversation_text import ConversationText
from pocl_fast.templates.reasoning import FIELDS, Reasoning
from pocl_fast.templates.rendering import renders_as_transformers
from pocl_fast.templates.turn_spans import TurnFinder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "chat", "alpaca"]
BATCH = 256  # texts tokenised at once; 64 take a tenth longer on two cores, 1000 as long


class SampleEncoder:
    """Turns samples into tokens: the tokenizer's chat template where it has one, else the Alpaca template of the
    paper's code.

    The last answer of a conversation is the response, the turns before it are the prompt. Both are tokenised as one
    text, as a model reads them, and cut as `TokenBorder` says: every answer to a question has the same prompt. Every
    response ends with the template's end of turn, and with the end-of-sequence token where the template has none or
    writes one that is no single token, unless it is cut; generation stops at any of `end_ids`. Answers within the
    prompt are supervised too where `train_on` is "all", each as far as it is what a model says (see `TurnFinder`). A
    control token in a sample's text stays text, as `ControlText` says, unless `special_tokens` is "parse". Raises
    `InputError` for a tokenizer without an end-of-sequence token, and for `template` "chat" where it has no chat
    template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template = "auto",
        *,
        chat: ChatTemplate | None = None,
        train_on: TrainOn = "all",
        reasoning: Reasoning = "keep",
        special_tokens: Literal["text", "parse"] = "text",
    ) -> None:
        """`chat` is the chat template where it is not the tokenizer's own without further variables. `train_on` and
        `reasoning` say which answers of a conversation are trained on, and what of them."""
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
        self._can_end = self._special - {tokenizer.unk_token_id}
        self._border = TokenBorder(tokenizer, self._special)
        self.end_id, self._ends = self._eos, {self._eos}
        self._end_is_known = template == "alpaca"
        self._unwritten: dict[str, set[int]] = {}  # what the template does not write -> of which lines
        self._begin: list[int] = []
        self.longest_prompt = 0  # tokens before the last answer, of all samples so far
        self._shared = SharedIds()
        self.chat: ChatTemplate | None = None
        self._writer: ConversationText | None = None
        self._control: ControlText | None = None
        self._marks_all, self._writes_without_tokenizer = False, renders_as_transformers(tokenizer)
        shape, added = PLAIN, tokenizer.get_added_vocab()
        if template == "chat":
            self.chat = chat or ChatTemplate.chosen(tokenizer)
            finder = AnswerFinder(self.chat, added)
            shape = finder.shape
            self._learn_end(finder)
        else:
            self._begin = self._tokens_before_a_text()
        if special_tokens == "text":
            self._control = ControlText(tokenizer, self.chat, shape, alpaca.WITH_INPUT)
            self._border = TokenBorder(tokenizer, self._special, self._control.tokenizer)
            self._writes_without_tokenizer &= not self._control.tokenizer.finds_normalized
        if self.chat is not None:
            if self._control is not None and (marked := self._control.chat(self.chat)) is not self.chat:
                self.chat, finder = marked, AnswerFinder(marked, added)
                self._marks_all = True  # in the system prompt
            turns = TurnFinder(finder) if train_on == "all" else None
            self._writer = ConversationText(finder, turns, self._unmarked)
        self._reader = AnswerReader(tokenizer, shape, ends_with_token=shape.end.strip() in added)
        self.choice = AnswerChoice(tokenizer, shape.reasoning, train_on, reasoning)

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the end-of-sequence token and the template's ends of turn."""
        return frozenset(self._ends)

    def stop_also_at(self, ids: Iterable[int]) -> None:
        """Adds stop tokens of a model whose answers are trained on."""
        self._ends.update(ids)

    def has_seen(self, ends: Iterable[int], longest_prompt: int) -> None:
        """Takes over what another encoder learnt of samples: its `end_ids` and its longest prompt."""
        self.stop_also_at(ends)
        self.longest_prompt = max(self.longest_prompt, longest_prompt)

    def encode(
        self, sample: Sample, *, max_length: int, max_prompt_length: int, name: str = ""
    ) -> EncodedSample | None:
        """The tokens that `fit` gives, or None where it gives none."""
        return self.fit(sample, max_length=max_length, max_prompt_length=max_prompt_length, name=name).encoded

    def fit(self, sample: Sample, *, max_length: int, max_prompt_length: int, name: str = "") -> Fitted:
        """A sample with its tokens. It has none where more than `max_prompt_length` tokens are before the first answer
        that is trained on, or where none is.

        A response that passes `max_length` in all is cut and marked `truncated`. Of a conversation that passes it the
        answers that begin behind are left out, with their questions; at least one token of an answer always stays.
        Raises `BadRecord` with the sample's line, and the `name` of its file, where the template cannot render it.
        """
        text = self._text_of(sample, name)
        return self._fitted(text, self._tokens_alone(text), max_length, max_prompt_length)

    def fit_each(
        self,
        samples: Iterable[Sample],
        refused: Callable[[BadRecord, int], object],
        *,
        max_length: int,
        max_prompt_length: int,
        name: str = "",
        batch: int = BATCH,
    ) -> Iterator[tuple[Sample, Fitted]]:
        """Each sample with what `fit` gives of it, but for those that it refuses: `refused` is told of these, with
        their lines. Samples are taken and tokenised `batch` at a time: another thread tokenises while the next ones are
        read and written."""
        each = iter(samples)
        taken = self._taken(each, batch, name)
        while taken is not None:
            with ThreadPoolExecutor(1, "tokens") as other:  # anew: none may live where a reader stops, or forks
                tokens = other.submit(self._tokens_of, [text.split for text in taken.texts if not text.has_marks])
                if not self._writes_without_tokenizer:
                    wait([tokens])  # one thread at a time may use it
                following = None if taken.failed else self._taken(each, batch, name)
            for error, line in taken.refused:
                refused(error, line)
            together = iter(tokens.result())
            for text in taken.texts:
                try:
                    own = self._tokens_alone(text) if text.has_marks else next(together)
                    made = self._fitted(text, own, max_length, max_prompt_length)
                except BadRecord as error:
                    self.forget(text.given.line)
                    refused(error, text.given.line)
                else:
                    yield text.given, made
            if taken.failed:
                raise taken.failed
            taken = following

    def asked(self, sample: Sample, name: str = "") -> int:
        """How many tokens are before the first answer that is trained on, 0 where none is. Nothing is noted of it."""
        try:
            trained = self._turns(text := self._text_of(sample, name), self._tokens_alone(text)).trained
        finally:
            self.forget(sample.line)
        return trained[0][1][0] if trained else 0

    def forget(self, line: int) -> None:
        """Drops what was noted of a record's sample."""
        for lines in self._unwritten.values():
            lines.discard(line)
        self.choice.forget(line)
        if self._control is not None:
            self._control.forget(line)

    def encode_all_of(self, sample: Sample, name: str = "") -> list[int]:
        """All tokens of a sample, before any limit, whatever of them is trained on."""
        return [id_ for part in self._tokens_of([self._text_of(sample, name).split])[0] for id_ in part]

    def encode_prompt(self, sample: Sample) -> list[int]:
        """The prompt's tokens, up to where the answer starts."""
        return self._turns(text := self._text_of(sample, ""), self._tokens_alone(text)).prompt

    def answer_texts(
        self, answers: Sequence[Sequence[int]], references: Sequence[Sequence[str]] | None = None
    ) -> list[str]:
        """The text of each answer (token ids without the end token) that is compared with its references: without what
        the template writes around it, and without reasoning where no reference has any."""
        return self._reader.texts(answers, references)

    def take_unwritten(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What the chat template did not write of the samples encoded since the last call, each with line numbers."""
        taken = ((what, tuple(sorted(lines))) for what, lines in self._unwritten.items() if lines)
        ordered = tuple(sorted(taken, key=lambda one: (one[1][0], one[0])))  # however they came together
        self._unwritten.clear()
        return ordered

    def take_control(self) -> KeptAsText:
        """The lines of the samples encoded since the last call that have control tokens in their text."""
        return KeptAsText() if self._control is None else self._control.take_kept()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _text_of(self, sample: Sample, name: str) -> _Text:
        """A sample's text. Raises `BadRecord`."""
        return self._text(sample, f"{name}, {sample.place}" if name else sample.place)

    def _text(self, given: Sample, where: str) -> _Text:
        used = self.choice.prepared(given, where)
        marked = used if self._control is None else self._control.marked(used, where)
        split = self._alpaca(marked, where) if self.template == "alpaca" else self._chat(marked, where)
        return _Text(given, used, marked, split, where, self._marks_all or marked is not used)

    def _taken(self, samples: Iterator[Sample], count: int, name: str) -> _Taken | None:
        """The texts of the next samples; None where there are none."""
        taken = _Taken([], [])
        try:
            for sample in islice(samples, count):
                try:
                    taken.texts.append(self._text_of(sample, name))
                except BadRecord as error:
                    self.forget(sample.line)
                    taken.refused.append((error, sample.line))
        except Exception as error:  # of the samples' source: raised when those before it are through
            return taken._replace(failed=error)
        return taken if taken.texts or taken.refused else None

    def _turns(self, text: _Text, tokens: list[list[int]]) -> Turns:
        return self.choice.turns(text.marked, text.split, tokens, self._unmarked)

    def _unmarked(self, text: str) -> str:
        """A text without marks in its control tokens."""
        return text if self._control is None else self._control.unmarked(text)

    def _fitted(self, text: _Text, tokens: list[list[int]], max_length: int, max_prompt_length: int) -> Fitted:
        lost, length, line = 0, sum(map(len, tokens)), text.given.line
        while True:
            turns = self._turns(text, tokens)
            asked = turns.trained[0][1][0] if turns.trained else 0
            places = tuple(place for place, _ in turns.trained)
            if not turns.trained or asked > max_prompt_length:
                return Fitted(text.used, None, asked, length, places)
            if len(turns.prompt) < max_length:
                break
            kept = [place for place, (start, _) in turns.trained if start < max_length]
            lost += len(turns.trained) - len(kept)
            self.forget(line)  # what was noted of the turns that go
            text = self._text(text.given.up_to(kept[-1]), text.where)
            tokens = self._tokens_alone(text)
        if lost:
            self.choice.note(ENDS_EARLIER, line, lost)
        self.longest_prompt = max(self.longest_prompt, len(turns.prompt))
        room = max_length - len(turns.prompt)
        prompt, response = (self._shared.of(ids) for ids in (turns.prompt, turns.response[:room]))
        cut = len(response) < len(turns.response)
        made = EncodedSample(text.used.index, prompt, response, cut, turns.spans(max_length))
        places = tuple(place for place, (start, _) in turns.trained if start < max_length)
        return Fitted(text.used, made, asked, length, places)

    def _chat(self, sample: Sample, where: str) -> Split:
        assert self._writer is not None
        made = self._writer.written(sample, where)
        for what in made.unwritten:
            self._unwritten.setdefault(what, set()).add(sample.line)
        for decision, count in made.left:
            self.choice.note(decision, sample.line, count)
        return made.split

    def _alpaca(self, sample: Sample, where: str) -> Split:
        split = alpaca.split(sample, where)
        if any(sample.answer_turn.get(field) for field in FIELDS):
            self._unwritten.setdefault("reasoning", set()).add(sample.line)
        return split

    def _tokens_of(self, splits: Sequence[Split]) -> list[list[list[int]]]:
        """The tokens of each conversation's parts (`texts_of`), the template's beginning before them, an end behind."""
        tokens = self._border.turns_of([texts_of(one) for one in splits])
        for split, made in zip(splits, tokens, strict=True):
            for turn, said in zip(split.earlier, made[1::2], strict=False):
                if turn.ended:
                    self._ends_with(said)
            response = made[-1]
            if not (split.ended and self._ends_with(response)) and (not response or response[-1] != self._eos):
                response.append(self._eos)
            made[0][:0] = self._begin
            if not self._end_is_known:
                self.end_id, self._end_is_known = response[-1], True
        return tokens

    def _tokens_alone(self, text: _Text) -> list[list[int]]:
        """The tokens of one conversation. Raises `BadRecord` where control tokens in its text cannot stay text."""
        if self._control is not None:
            self._control.tokenizer.where = text.where
        return self._tokens_of([text.split])[0]

    def _ends_with(self, said: Sequence[int]) -> bool:
        """Whether an answer's last token, which the template writes, can end answers; it is one of `end_ids` then."""
        ends = bool(said) and said[-1] in self._can_end
        if ends:
            self._ends.add(said[-1])
        return ends

    def _tokens_before_a_text(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text; what it puts behind one would end the prompt."""
        bare = list(self.tokenizer("a", add_special_tokens=False).input_ids)
        full = list(self.tokenizer("a").input_ids)
        found = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
        return full[:found]

    def _learn_end(self, finder: AnswerFinder) -> None:
        """The end of turn of a plain answer; of a template that refuses plain questions it is that of the first
        sample."""
        system, question = {"role": "system", "content": "s"}, {"role": "user", "content": "a"}
        for messages in ((question,), (system, question)):
            try:
                split = finder.split(messages, (), {"role": "assistant", "content": "b"})
            except TemplateRefusal:
                continue
            self._tokens_of([split])
            return


class _Text(NamedTuple):
    """A sample, what of it is used, this with marks in its control tokens, and the text of that."""

    given: Sample
    used: Sample
    marked: Sample
    split: Split
    where: str
    has_marks: bool


class _Taken(NamedTuple):
    """Some samples' texts, those that are refused with their lines, and what failed behind them."""

    texts: list[_Text]
    refused: list[tuple[BadRecord, int]]
    failed: Exception | None = None


class EncoderOptions(TemplateOptions, ChoiceOptions, Protocol):
    """What samples become: a run's options, a trainer's arguments."""

    @property
    def special_tokens(self) -> Any: ...


def encoder_of(
    tokenizer: PreTrainedTokenizerBase, options: EncoderOptions, folder: Path, say: Callable[[str], object]
) -> SampleEncoder:
    """The encoder that a run's options or a trainer's arguments ask for.

    The date of a template that writes it is kept in `folder`; a template that the options choose becomes the
    tokenizer's own. Where the teacher's answers are trained on, these are the last ones alone. Every rank must call.
    Raises `InputError` as `chosen_template` and `SampleEncoder` do, and for reasoning that the teacher writes.
    """
    by_teacher = options.data_source == "teacher"
    if by_teacher and options.reasoning != "keep":
        raise InputError(
            f"--reasoning {options.reasoning}: with --data-source teacher the teacher's own answers are trained on, as"
            " it writes them; leave one of the two out, or tell its template not to reason (--chat-template-kwargs"
            " enable_thinking=false, where it reads that)"
        )
    chat = chosen_template(tokenizer, options, folder, say)
    if options.chat_template is not None:
        make_default(tokenizer, options.chat_template)  # whoever loads the student asks it as it was trained
    chosen: dict[str, Any] = {"train_on": "last" if by_teacher else options.train_on, "reasoning": options.reasoning}
    return SampleEncoder(
        tokenizer, "chat" if chat else "alpaca", chat=chat, special_tokens=options.special_tokens, **chosen
    )
