"""`pocl-fast evaluate --predictions`: scores answers that are there already, by the paper's evaluation.

Knows files of answers and of references, and the scores of texts. Knows no model, and loads no torch.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocl_fast.answers.exact_match import exact_matches, published_exact_matches
from pocl_fast.answers.intervals import Interval, bootstrap_interval, mean_interval
from pocl_fast.answers.rouge import rouge_l
from pocl_fast.answers.rouge_words import Tokenizer, unseen_line
from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.file_kinds import opened
from pocl_fast.records.forms import ANSWERS
from pocl_fast.records.json_lines import decoded, in_words
from pocl_fast.records.samples import iter_samples
from pocl_fast.records.sources import Source, source_of
from pocl_fast.records.texts import is_list, kind_of, listed
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_json

HELP = (
    "Score answers that are there already, without a model: ROUGE-L and exact match, the best over a sample's"
    " references, the mean over samples. The first line of --predictions answers the first of --references."
)
RESULT = "prediction-scores.json"  # where --output is a folder

_PREDICTIONS = ("text", "prediction", "answer", "response", "output", "generated_text", "predict")
_REFERENCES = ("references", *ANSWERS)
_LEVEL = 0.95
_METRICS = {
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    "exact_match_sni": "exact match (S-NI)",
}


@dataclass(frozen=True)
class Scoring:
    """Which answers are scored, and how."""

    predictions: tuple[str, ...]
    """Files of answers, one a training seed: {"text": ...} a line, or "prediction", "answer", "response" and the like
    in its place, or a string a line; JSON arrays, Parquet and Arrow too."""
    references: str | None = None
    """What the answers are compared with: {"output": a text or a list of texts} a line, "references", or any record
    that --train reads; as many as there are answers, in their order."""
    prediction_field: str | None = None
    """The field that has the answer, where it is none of the usual ones or where two of them are there."""
    reference_field: str | None = None
    """The field that has the reference or the list of them, where it is none of the usual ones."""
    rouge_tokenizer: Tokenizer = "rouge_score"
    """The words that ROUGE-L compares: those of rouge-score, which the paper took and which sees a-z and 0-9 alone;
    words of any script; or every character."""
    output: Path | None = None
    """Write the scores to this file, FILE.json, or into this folder, as prediction-scores.json."""


@dataclass(frozen=True)
class FileScores:
    """The scores of one file of answers, from 0 to 1, of each sample: metric -> [samples] float64."""

    name: str
    samples: dict[str, np.ndarray]

    def means(self) -> dict[str, float]:
        """Metric -> the mean over samples in percent, summed in their order as the published code does: equal to its
        figures to the last bit."""
        return {metric: 100.0 * float(np.cumsum(scores)[-1]) / len(scores) for metric, scores in self.samples.items()}


def checked(arguments: list[str]) -> list[str]:
    """The words of the command line. Raises `InputError` where files would be lost, or where they are of a run."""
    given = [word.partition("=")[0] for word in arguments]
    if "--predictions" not in given and "--help" not in given:
        raise InputError("--references needs --predictions FILE, the answers that are compared with them")
    if given.count("--predictions") > 1:
        raise InputError("--predictions is given twice: name all files behind one")
    return arguments


def score(given: Scoring) -> None:
    """Prints the scores of files of answers, and writes them where asked.

    Raises `InputError` for files that cannot be read, answers or references that are none, unequal numbers of them,
    and a place that cannot be written to.
    """
    if not given.predictions:
        raise InputError("--predictions needs a file of answers")
    if given.references is None:
        raise InputError(
            "--predictions needs --references FILE, what the answers are compared with: the data that they answer"
        )
    names = [name for one in given.predictions for name in _matching(one)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--predictions {twice[0]} is given twice: each file is a run of its own")
    target = _target(given.output)
    references, ids = read_references(given.references, given.reference_field)
    files = []
    for name in names:
        answers, their_ids = read_predictions(name, given.prediction_field)
        _check_pairs(name, answers, their_ids, given.references, references, ids)
        if empty := sum(not answer.strip() for answer in answers):
            print(f"{name}: {empty:,} of {len(answers):,} answers are empty: they score 0")
        files.append(score_answers(name, answers, references, given.rouge_tokenizer))
    texts = (text for accepted in references for text in accepted)
    if line := unseen_line(texts, given.rouge_tokenizer, given.references):
        print(line)
    intervals = {metric: _intervals(files, metric) for metric in _METRICS}
    print(_table(files, intervals, given.references, references))
    if target is not None:
        _write(target, _as_json(files, intervals, given))
        print(f"scores: {target}")


def _matching(name: str) -> list[str]:
    """The files of a pattern, each a run of its own; anything else as it is named."""
    if not glob.has_magic(name) or Path(name).expanduser().exists():
        return [name]
    return sorted(glob.glob(str(Path(name).expanduser()))) or [name]


def score_answers(
    name: str, answers: Sequence[str], references: Sequence[Sequence[str]], tokenizer: Tokenizer = "rouge_score"
) -> FileScores:
    """ROUGE-L (F, of stemmed words) and both exact matches of each answer, the best over its references."""
    return FileScores(
        name,
        {
            "rouge_l": rouge_l(answers, references, tokenizer=tokenizer).fmeasure,
            "exact_match": np.array(exact_matches(answers, references), dtype=np.float64),
            "exact_match_sni": np.array(published_exact_matches(answers, references), dtype=np.float64),
        },
    )


def read_predictions(name: str, field: str | None = None) -> tuple[list[str], list[Any]]:
    """The answers of a file, and its records' "id"s, or none. Raises `InputError` for a record without one answer."""
    answers: list[str] = []
    ids: list[Any] = []
    for where, record in _records(name, '{"text": ...}, an answer a line'):
        if isinstance(record, Mapping):
            chosen = _field(record, _PREDICTIONS, field, where, "--prediction-field")
            ids.append(listed(record.get("id")))
            value = listed(record[chosen])
        else:
            chosen, value = "", record
        if is_list(value) and len(value) == 1:  # as lm-eval writes the one answer of a prompt
            value = value[0]
        if not isinstance(value, str):
            found = f'field "{chosen}"' if chosen else "the record"
            raise InputError(f"{where}: {found} must be the answer's text, got {kind_of(value)}")
        answers.append(value)
    if not answers:
        raise InputError(f'{name} holds no answer; expected {{"text": ...}} a line')
    return answers, ids


def read_references(name: str, field: str | None = None) -> tuple[list[list[str]], list[Any]]:
    """The accepted answers of each record of a file, and the records' "id"s, or none. A text may be empty. Raises
    `InputError` for a record that has none."""
    found: list[list[str]] = []
    ids: list[Any] = []
    for where, record in _records(name, '{"output": a text or a list of texts} a line'):
        if isinstance(record, str):
            found.append([record])
            continue
        if not found and field is None and _is_conversation(record):
            return [list(sample.references) for sample in iter_samples(source_of(name))], []
        chosen = _field(record, _REFERENCES, field, where, "--reference-field")
        found.append(_texts(record[chosen], where, chosen))
        ids.append(listed(record.get("id")))
    if not found:
        raise InputError(f'{name} holds no reference; expected {{"output": a text or a list of texts}} a line')
    return found, ids


def _is_conversation(record: Mapping[str, Any]) -> bool:
    """Whether the answer is a turn among others: which one it is, the room of records knows."""
    answers = (listed(record[name]) for name in _REFERENCES if name in record)
    if any(is_list(value) and value and isinstance(value[0], Mapping) for value in answers):
        return True
    return not any(name in record for name in _REFERENCES) and ("messages" in record or "conversations" in record)


def _texts(value: Any, where: str, field: str) -> list[str]:
    value = listed(value)
    texts = list(value) if is_list(value) else [value]
    if not texts:
        raise InputError(f'{where}: field "{field}" is an empty list: an answer is compared with at least one text')
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise InputError(f'{where}: field "{field}" must be a text or a list of texts, got {kind_of(wrong[0])}')
    return texts


def _field(record: Mapping[str, Any], known: Sequence[str], named: str | None, where: str, option: str) -> str:
    """The field of a record that is read: the one that is `named`, or the one of those `known` that is there."""
    there = ", ".join(f'"{field}"' for field in record) or "none"
    if named is not None:
        if named not in record:
            raise InputError(f'{where}: {option} {named}: there is no field "{named}"; the fields are {there}')
        return named
    found = [field for field in known if field in record]
    if known is _REFERENCES and "references" in found:  # a file of ours: beside them is what a model has answered
        return "references"
    if not found:
        raise InputError(
            f"{where}: none of the fields {', '.join(known)} is there; the fields are {there}: {option} NAME says which"
            " one is meant"
        )
    if len(found) > 1:
        both = f'"{found[0]}" and "{found[1]}"'
        raise InputError(f"{where}: both {both} are there: {option} NAME says which one is meant")
    return found[0]


def _records(name: str, expected: str) -> Iterator[tuple[str, Any]]:
    """Each record, an object or a string, with where it is."""
    if (texts := _strings(name)) is not None:
        yield from texts
        return
    source: Source = source_of(name)
    for number, record in source.records(expected):
        if isinstance(record, BadRecord):
            raise record
        yield source.place(number), record


def _strings(name: str) -> Iterator[tuple[str, Any]] | None:
    """The records of a file of strings, one a line or in an array; None for any other file."""
    path = Path(name).expanduser()
    if not path.is_file():
        return None
    try:
        with opened(path) as found:
            if found.form not in ("lines", "array"):
                return None
            head = found.content.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")
            if not (head.startswith(b'"') or (head.startswith(b"[") and head[1:].lstrip().startswith(b'"'))):
                return None
            text = found.content.read().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text ({error.reason})") from error
    if head.startswith(b"["):
        return ((f"{name}, record {n}", one) for n, one in enumerate(_decoded(text, name), start=1))
    lines = ((f"{name}, line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())
    return ((where, _decoded(line, where)) for where, line in lines)


def _decoded(text: str, where: str) -> Any:
    try:
        return decoded(text)
    except (ValueError, RecursionError) as error:
        reason = in_words(error)
        raise InputError(f"{where}: {reason}; expected a string of JSON, as the file begins with one") from error


def _check_pairs(
    name: str,
    answers: Sequence[str],
    ids: Sequence[Any],
    theirs: str,
    references: Sequence[Sequence[str]],
    their_ids: Sequence[Any],
) -> None:
    """Raises `InputError` where answers and references cannot be those of the same samples."""
    if len(answers) != len(references):
        raise InputError(
            f"{name} has {len(answers):,} answers, and {theirs} has {len(references):,} references: the same line of"
            " both is one sample. (The published code cuts both to the shorter one: `head -n"
            f" {min(len(answers), len(references))}` does so)"
        )
    for number, (ours, other) in enumerate(zip(ids, their_ids, strict=False), start=1):
        if ours is not None and other is not None and ours != other:
            raise InputError(
                f'{name}, answer {number}, has "id" {ours!r:.60}, and {theirs} has {other!r:.60} there: bring both into'
                " the same order"
            )


def _intervals(files: Sequence[FileScores], metric: str) -> tuple[Interval, Interval]:
    """The mean over files in percent, with its interval over files, and over samples."""
    over_files = mean_interval([file.means()[metric] for file in files], _LEVEL)
    by_sample = np.mean([file.samples[metric] for file in files], axis=0)
    return over_files, bootstrap_interval(100 * by_sample, _LEVEL)


def _spread(files: Sequence[FileScores], metric: str) -> float:
    return float(np.std([file.means()[metric] for file in files]))


def _table(
    files: Sequence[FileScores],
    intervals: Mapping[str, tuple[Interval, Interval]],
    name: str,
    references: Sequence[Sequence[str]],
) -> str:
    most = max(map(len, references))
    best = f", the best over up to {most} references" if most > 1 else ""
    rows = [(f"{len(references):,} samples", *_METRICS.values())]
    rows += [(file.name, *(f"{mean:.4f}" for mean in file.means().values())) for file in files]
    if len(files) > 1:
        means = (f"{intervals[metric][0].mean:.2f} ± {_spread(files, metric):.2f}" for metric in _METRICS)
        rows += [("mean ± spread", *means)]
        rows += [(f"95 % over {len(files)} files", *(_range(intervals[metric][0]) for metric in _METRICS))]
    rows += [("95 % over samples", *(_range(intervals[metric][1]) for metric in _METRICS))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{name}: in percent{best}"]
    for first, *others in rows:
        cells = (other.rjust(width) for other, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join((first.ljust(widths[0]), *cells)))
    if len(files) == 1:
        lines.append("one file of answers: no interval over training seeds")
    return "\n".join(lines)


def _range(interval: Interval) -> str:
    return "none" if interval.low is None else f"{interval.low:.2f} to {interval.high:.2f}"


def _as_json(
    files: Sequence[FileScores], intervals: Mapping[str, tuple[Interval, Interval]], given: Scoring
) -> dict[str, Any]:
    scores = {}
    for metric, (over_files, over_samples) in intervals.items():
        scores[metric] = {
            "mean": over_files.mean,
            "spread": _spread(files, metric),
            "over_files": None if over_files.low is None else over_files[1:],
            "over_samples": None if over_samples.low is None else over_samples[1:],
        }
    return {
        "references": given.references,
        "samples": len(files[0].samples["rouge_l"]),
        "rouge_tokenizer": given.rouge_tokenizer,
        "level": _LEVEL,
        "scores": scores,
        "files": [
            {"predictions": file.name} | {metric: round(mean, 4) for metric, mean in file.means().items()}
            for file in files
        ],
    }


def _target(output: Path | None) -> Path | None:
    """The file to write. Raises `InputError` where none can be, before anything is read."""
    if output is None or output.suffix != ".json":
        return None if output is None else output / RESULT
    if output.is_dir():
        raise InputError(f"--output {output} is a folder with the name of a file: give the file in it")
    return output


def _write(path: Path, value: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
    except OSError as error:
        raise InputError(f"cannot write --output {path}: {error.strerror or error}") from error
