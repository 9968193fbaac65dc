"""Whether student and teacher go together: their tokenizers, the rows of their vocabularies, and their sizes.

Knows tokenizers, samples and a teacher's cache. Does not know how models compute, nor options.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.sample_set import SampleSet
from pocl_fast.inputs.vocabulary import check_special_tokens, known_ids, named, rows_of
from pocl_fast.models.parameters import num_parameters
from pocl_fast.records.samples import Sample
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.shards import TopKEntries
from pocl_fast.teacher.teacher import Teacher

PROBES = 4096  # most texts of the vocabulary, and most of the merges, that both tokenizers cut: a second of work
# what tokenizers differ in: spaces, line ends, digits, contractions, accents in two forms, scripts without spaces, code
TEXTS = (
    "Hello, world! It's 1234567 o'clock; we'll see.",
    " two  spaces\n\nand\ttabs \r\n",
    "cafe\u0301 caf\u00e9 \ufb01 \u2460 \u212b",
    "\u4f60\u597d\u4e16\u754c\u3001\u3053\u3093\u306b\u3061\u306f \uc548\ub155 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "for (int i = 0; i < n; ++i) { x[i] += 0.5e-3; }  # UPPER lower CamelCase",
    "\U0001f600\u200d\U0001f468 \u0418\u0432\u0430\u043d \u0645\u0631\u062d\u0628\u0627",
)

Place = Callable[[Sample], str]  # where a sample stands, for messages: "train.jsonl, line 3"


def places(data: Any, name: str) -> Place:
    """Where each sample of what is given as data stands, for messages."""
    if isinstance(data, (str, Path)):
        name = str(data)
    return lambda sample: f"{name}, {sample.place}"


# -- tokenizers --------------------------------------------------------------------------------------------------------


def check_same_vocabulary(
    student: Any,
    teacher: Any,
    data: SampleSet | None = None,
    place: Place = str,
    say: Callable[[str], object] = print,
) -> None:
    """Raises `InputError` unless two tokenizers have the same tokens under the ids that both have, and cut texts of the
    vocabulary and of the samples alike.

    Tokens that one of them alone has are fine while no sample has them. `say` is told where the two are made
    differently and yet cut all these texts alike. `place` says where a sample stands.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        _check_tokens_of(ours, theirs)
    differing = _differing_parts(student, teacher)
    count = 0
    for texts in _pieces(_probes(student, teacher, ours.items() & theirs.items()) if differing else ()):
        count += len(texts)
        for text, a, b in _cut_apart(student, teacher, texts):
            raise InputError(_cuts(student, teacher, text, a, b))
    if data is not None and (differing or ours != theirs):
        check_tokens(data, Vocabulary("teacher", ids=known_ids(teacher)), student, place)
        used = (data.samples[one.index] for one in data.encoded)
        for some in _pieces((text, sample) for sample in used for text in _texts_of(sample)):
            count += len(some)
            # control tokens in a text stay text; where they are parsed, `check_tokens` has looked at their ids
            for text, a, b in _cut_apart(student, teacher, [text for text, _ in some], split_special_tokens=True):
                where = place(next(sample for known, sample in some if known is text))
                raise InputError(f"{where}: {_cuts(student, teacher, text, a, b)}")
    if differing:
        say(
            f"the tokenizers of student and teacher are made differently ({', '.join(differing)}), but cut all of"
            f" {count} texts alike"
        )


def _check_tokens_of(ours: dict[str, int], theirs: dict[str, int]) -> None:
    """Raises `InputError` where two vocabularies have different tokens under one id, or one token under two ids."""
    of_student = {i: token for token, i in ours.items()}
    sizes = f"({len(ours)} and {len(theirs)} tokens)"
    one_tokenizer = (
        " White-box distillation compares the two token by token, so both must use one tokenizer (tokens that one of"
        " them alone has, at the end, are fine)"
    )
    for token, i in sorted(theirs.items() - ours.items(), key=lambda item: item[1]):
        if i in of_student and theirs.get(of_student[i]) != i:
            raise InputError(
                f"student and teacher have different vocabularies {sizes}: token {i} is {of_student[i]!r} for the"
                f" student and {token!r} for the teacher.{one_tokenizer}"
            )
        if token in ours:
            raise InputError(
                f"student and teacher have different vocabularies {sizes}: {token!r} is token {ours[token]} for the"
                f" student and token {i} for the teacher.{one_tokenizer}"
            )


def _differing_parts(student: Any, teacher: Any) -> list[str]:
    """Which parts of two tokenizers' descriptions differ, but for the tokens themselves."""
    backends = [getattr(one, "backend_tokenizer", None) for one in (student, teacher)]
    if None in backends:  # a tokenizer in Python
        return ["one has no description to compare"]
    described = [json.loads(one.to_str()) for one in backends]  # type: ignore[union-attr]
    parts = [name for name in ("normalizer", "pre_tokenizer") if described[0][name] != described[1][name]]
    models = [one["model"] for one in described]
    names = sorted(models[0].keys() | models[1].keys())
    parts += [name for name in names if name != "vocab" and models[0].get(name) != models[1].get(name)]
    if isinstance(models[0].get("vocab"), list) and models[0]["vocab"] != models[1].get("vocab"):
        parts.append("scores")  # of Unigram
    flags = [_added_flags(one) for one in described]
    if any(flags[0][token] != flags[1][token] for token in flags[0].keys() & flags[1].keys()):
        parts.append("added tokens")
    return parts


def _added_flags(described: dict[str, Any]) -> dict[str, list[Any]]:
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return {one["content"]: [one.get(name) for name in names] for one in described["added_tokens"]}


def _probes(student: Any, teacher: Any, shared: Iterable[tuple[str, int]]) -> Iterator[str]:
    """Texts that tokenizers with the same tokens may cut differently: fixed ones, tokens' own texts, and the parts of
    merges that differ, with what may follow them."""
    yield from TEXTS
    tokens = sorted(shared, key=lambda item: item[1])
    for token, _ in tokens[:: max(1, len(tokens) // PROBES)]:
        yield student.convert_tokens_to_string([token])
    merges = [_merges(one) for one in (student, teacher)]
    ranks = [{pair: rank for rank, pair in enumerate(list_)} for list_ in merges]
    changed = [pair for pair in merges[0] if ranks[1].get(pair) != ranks[0][pair]]
    changed += [pair for pair in merges[1] if pair not in ranks[0]]
    after: dict[str, list[str]] = {}
    before: dict[str, list[str]] = {}
    for left, right in changed:
        after.setdefault(left, []).append(right)
        before.setdefault(right, []).append(left)
    for left, right in changed[:: max(1, len(changed) // PROBES)]:
        yield student.convert_tokens_to_string([left, right])
        for more in after.get(right, [])[:4]:
            yield student.convert_tokens_to_string([left, right, more])
        for more in before.get(left, [])[:4]:
            yield student.convert_tokens_to_string([more, left, right])


def _merges(tokenizer: Any) -> list[tuple[str, str]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    return [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in model.get("merges") or ()]  # type: ignore[misc]


def _cut_apart(
    student: Any, teacher: Any, texts: Sequence[str], **options: Any
) -> Iterator[tuple[str, Sequence[int], Sequence[int]]]:
    """The texts that the two cut differently, and the tokens of each."""
    cut = [one(list(texts), add_special_tokens=False, **options).input_ids for one in (student, teacher)]
    yield from ((text, a, b) for text, a, b in zip(texts, *cut, strict=True) if list(a) != list(b))


def _cuts(student: Any, teacher: Any, text: str, a: Sequence[int], b: Sequence[int]) -> str:
    """How two tokenizers cut a text, from the first token that differs."""
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    ours, theirs = (
        one.convert_ids_to_tokens(list(ids[first : first + 4])) for one, ids in ((student, a), (teacher, b))
    )
    return (
        f"the text {_beginning(text)!r} is cut differently by the two tokenizers: from its token {first + 1} on the"
        f" student's has {ours}, the teacher's {theirs}. The teacher is given the student's tokens, so both must use"
        " one tokenizer"
    )


def _texts_of(sample: Sample) -> list[str]:
    turns = [message.get("content") for message in sample.messages]
    return [text for text in (*turns, *sample.references) if isinstance(text, str)]


def _beginning(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[:most] + "..."


def _pieces(many: Iterable[Any], size: int = 512) -> Iterator[list[Any]]:
    rest = iter(many)
    while piece := list(islice(rest, size)):
        yield piece


# -- the tokens of samples ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """What one of the two models knows: ids below `rows`, of these the ones in `ids` where its tokenizer is known."""

    whose: str  # "student", "teacher"
    rows: int | None = None
    ids: frozenset[int] | None = None

    def lacks(self, token: int) -> bool:
        """Whether a model has no row for an id, or its tokenizer no token."""
        return (self.rows is not None and token >= self.rows) or (self.ids is not None and token not in self.ids)


def check_tokens(data: SampleSet, vocabulary: Vocabulary, tokenizer: Any, place: Place) -> None:
    """Raises `InputError` where samples have tokens that a model has no row for, or that its tokenizer does not have.
    `tokenizer` is the one that made the samples' tokens."""
    rows, ids = vocabulary.rows, vocabulary.ids
    unknown = frozenset() if ids is None else known_ids(tokenizer) - ids
    found: list[tuple[EncodedSample, int]] = []
    for one in data.encoded:
        for tokens in (one.prompt_ids, one.response_ids):
            if (rows is not None and max(tokens, default=0) >= rows) or not unknown.isdisjoint(tokens):
                found.append((one, next(token for token in tokens if vocabulary.lacks(token))))
                break
    if not found:
        return
    first, token = found[0]
    more = f" (and so it is with {len(found) - 1} more samples)" if len(found) > 1 else ""
    instead = "Take it out of the samples or the chat template"
    if rows is not None and token >= rows:
        why = f"has no row in the {vocabulary.whose}'s embedding of {rows} rows"
        instead += f", or add rows to the model first, resize_token_embeddings({token + 1})"
    else:
        why = f"is not in the {vocabulary.whose}'s tokenizer, so the {vocabulary.whose} has not learnt it"
    raise InputError(f"{place(data.samples[first.index])}: {named(tokenizer, token)} {why}{more}. {instead}")


def check_pair(
    student: Any,
    teacher: Teacher,
    tokenizer: Any,
    data: SampleSet,
    place: Place,
    *,
    answers: bool,
    say: Callable[[str], object] | None = print,
) -> None:
    """Raises `InputError` where a teacher has no rows for the samples' tokens (where it `answers`, for padding), or
    keeps the most likely of other tokens than the student has. `say` is told where the two models' vocabularies or
    sizes are not as they mostly are."""
    check_tokens(data, Vocabulary("teacher", teacher.rows.both), tokenizer, place)
    if answers:
        check_special_tokens(tokenizer, teacher.rows.embedding, "teacher")
    rows = rows_of(student).lm_head
    if isinstance(teacher.cache.entries, TopKEntries):
        check_top_k(teacher.cache.entries.k, rows, teacher.vocab_size)
        if rows < (entries := teacher.cache.entries.entries or teacher.vocab_size):
            raise InputError(
                f"the Teacher's cache keeps the most likely of {entries} tokens, and the student's lm_head has {rows}"
                f" rows: make it with Teacher(..., student_entries={rows})"
            )
    if say is not None:
        for line in pair_lines(rows, teacher.vocab_size, num_parameters(student, adapters=False), teacher.parameters):
            say(line)


def check_top_k(top_k: int, student_rows: int, teacher_rows: int) -> None:
    """Raises `InputError` where a teacher's `top_k` most likely tokens do not stand for the vocabulary that both have,
    and for more than it has."""
    if teacher_rows < student_rows:
        raise InputError(
            f"cache_mode topk: the student's lm_head has {student_rows} rows and the teacher's {teacher_rows}. What a"
            " top-k does not list would count the student's other entries too: take cache_mode hidden"
        )
    if not 1 <= top_k <= student_rows:
        raise InputError(f"a top-k of {top_k}: must be within 1 and the vocabulary's {student_rows} tokens")


def pair_lines(student_rows: int, teacher_rows: int, student_size: int, teacher_size: int) -> list[str]:
    """Lines about lm_heads of different lengths, and about a student that is no smaller than its teacher, by their
    numbers of parameters."""
    smaller = "give another student, or cut one from the teacher (student_layers)"
    both = shared_line(student_rows, teacher_rows), size_line(student_size, teacher_size, smaller)
    return [line for line in both if line]


def shared_line(student_rows: int, teacher_rows: int) -> str | None:
    """A line about lm_heads of different lengths; None where they are equal."""
    if student_rows == teacher_rows:
        return None
    return (
        f"the student's lm_head has {student_rows} rows and the teacher's {teacher_rows}: the divergence is over the"
        f" {min(student_rows, teacher_rows)} entries that both have"
    )


# -- sizes -------------------------------------------------------------------------------------------------------------


def size_line(student: int, teacher: int, instead: str) -> str | None:
    """A line about a student that is no smaller than its teacher, by their numbers of parameters; None where it is.
    `instead` says how to get a smaller one."""
    if student < teacher:
        return None
    than = "as large as" if student == teacher else "larger than"
    return (
        f"the student is {than} its teacher ({student:,} and {teacher:,} parameters): it will be no faster than the"
        f" teacher. For a smaller one {instead}"
    )


# -- weights ---------------------------------------------------------------------------------------------------------


def check_apart(student: Any, teacher: Any) -> None:
    """Raises `InputError` where models given as objects share weights: training the student would change its
    teacher."""
    if isinstance(teacher, Teacher):
        teacher = teacher.model if teacher.has_body else None
    if not isinstance(student, nn.Module) or not isinstance(teacher, nn.Module):
        return
    theirs = {key for p in teacher.parameters() for key in (id(p), p.data_ptr() or None)} - {None}
    ours = list(student.parameters())
    if shared := sum(id(p) in theirs or p.data_ptr() in theirs for p in ours):
        raise InputError(
            f"student and teacher share {shared} of the student's {len(ours)} weights: training the student, with"
            " adapters too, would change or freeze them for the other. Give a copy as one of the two:"
            " copy.deepcopy(model)"
        )
