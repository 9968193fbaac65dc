"""Which runs are one method, and what methods are called by.

A method is the runs that differ in the training seed alone, or those that are given one name. Knows options of runs.
Does not know their scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_fast.reports.compared_runs import ComparedRun
from pocl_fast.system.errors import InputError

_SEED = "seed"
_KIND = "kind of run"  # no option, but what sets fine-tuning and distillation apart
_SAYS_ITSELF = (_KIND, "divergence")  # whose values need no name beside them: "forward_kl", not "divergence forward_kl"
_LONGEST = 80  # characters of a name that is made of options
_MODELS = ("teacher", "student")
_SET = "--set "  # before the name of an argument of transformers
_DATA = " data"  # what the names of fingerprints of data end with, such as "train data" for --train


@dataclass(frozen=True)
class Method:
    """A method and its runs, one a training seed."""

    label: str  # A, B, ..., Z, AA, ...: a short name
    name: str
    runs: tuple[ComparedRun, ...]
    differing: Mapping[str, tuple[str, ...]]  # options besides the seed in which its runs differ, with their values

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)


def grouped(runs: Sequence[ComparedRun], names: Sequence[str] = ()) -> list[Method]:
    """The methods of runs, in the order in which their first runs are given.

    `names` are either one a run, where runs of one name are a method; or one a method, in that order. Raises
    `InputError` for another number of names, and where two runs are one.
    """
    _check_distinct(runs)
    if any(not name.strip() for name in names):
        raise InputError("--names: a name is empty")
    options = compared_options(runs)
    if names and len(names) == len(runs):
        return named(_by_name(runs, names))
    groups: dict[str, list[int]] = {}
    for place, one in enumerate(options):
        groups.setdefault(_identity(one), []).append(place)
    places = list(groups.values())
    if names and len(names) != len(places):
        found = "; ".join(", ".join(runs[place].path.name for place in group) for group in places)
        raise InputError(
            f"--names: {_some(len(names), 'name')} for {_some(len(places), 'method')} of {len(runs)} runs; give one for"
            f" each method, or one for each run. The runs by method, which differ in the seed alone: {found}"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise InputError(f"--names: {twice!r} names two methods; give one name for each run to make them one")
    said = list(names) or _names(runs, options, places)
    of = zip(said, places, strict=True)
    return [Method(_label(n), name, tuple(runs[place] for place in group), {}) for n, (name, group) in enumerate(of)]


def named(methods: Mapping[str, Sequence[ComparedRun]]) -> list[Method]:
    """Methods whose runs and names are given. Raises `InputError` where one has no runs, and where two runs are one."""
    runs = [run for group in methods.values() for run in group]
    _check_distinct(runs)
    of = {id(run): options for run, options in zip(runs, compared_options(runs), strict=True)}
    made = []
    for place, (name, group) in enumerate(methods.items()):
        if not group:
            raise InputError(f"the method {name!r} has no runs")
        made.append(Method(_label(place), name, tuple(group), _differing([of[id(run)] for run in group])))
    return made


@dataclass(frozen=True)
class _Value:
    """An option of a run: what it is compared by, what is shown of it, and whether a step of the run has read it."""

    compared: Any
    shown: Any
    read: bool

    @property
    def key(self) -> str:
        return json.dumps(self.compared, sort_keys=True, default=str)


Options = Mapping[str, _Value]


def compared_options(runs: Sequence[ComparedRun]) -> list[Options]:
    """Of each run the options that decide its result, without the seed.

    Which ones decide is what the run directories record that their steps were made from: options, and fingerprints of
    data and models, which are compared in place of paths. What a run has made itself follows from them. Where nothing
    is recorded all options decide.
    """
    recorded = {name for run in runs for name in run.made_from if _is_given(name, run.config)}
    deciding = sorted((recorded or {name for run in runs for name in run.config}) - {_SEED}, key=_place)
    return [{_KIND: _Value(run.kind, run.kind, True)} | {name: _value(run, name) for name in deciding} for run in runs]


def _value(run: ComparedRun, name: str) -> _Value:
    compared = run.made_from.get(name, run.config.get(name))
    shown = run.config.get(name.removesuffix(_DATA)) if _is_source(name) else compared
    read = not run.made_from or name in run.made_from or name.startswith(_SET)
    return _Value(compared, compared if shown is None else shown, read)


def _by_name(runs: Sequence[ComparedRun], names: Sequence[str]) -> dict[str, list[ComparedRun]]:
    groups: dict[str, list[ComparedRun]] = {}
    for name, run in zip(names, runs, strict=True):
        groups.setdefault(name, []).append(run)
    return groups


def _check_distinct(runs: Sequence[ComparedRun]) -> None:
    """Raises `InputError` where a folder is given twice, or two folders hold one run: a copy is no second seed."""
    places: dict[Path, Path] = {}
    for run in runs:
        place = run.path.resolve()
        if place in places:
            also = "" if places[place] == run.path else f" (as {places[place]} too)"
            raise InputError(f"{run.path} is given twice{also}; give each run once")
        places[place] = run.path
    seen: dict[tuple[str, int], Path] = {}
    for run, options in zip(runs, compared_options(runs), strict=True):
        if (other := seen.setdefault((_identity(options), run.seed), run.path)) != run.path:
            raise InputError(
                f"{other} and {run.path} are the same run twice: the same options and the training seed {run.seed};"
                " leave one of them out, or train one with another --seed"
            )


def _identity(options: Options) -> str:
    return json.dumps([(name, value.key) for name, value in options.items()])


def _differing(options: Sequence[Options]) -> dict[str, tuple[str, ...]]:
    """The options that differ among the runs that have read them, and each value once, as it is shown."""
    differing = {}
    for name in options[0]:
        values = {one[name].key: one[name] for one in options if one[name].read}
        if len(values) > 1:
            differing[name] = tuple(_word(name, value, values.values()) for value in values.values())
    return differing


def _names(runs: Sequence[ComparedRun], options: Sequence[Options], places: Sequence[Sequence[int]]) -> list[str]:
    """A name for each group of runs: what differs between the groups, or the folder of its first run where that is too
    long to be a name. One method alone is called by its folder."""
    firsts = [options[group[0]] for group in places]
    made = []
    for one in firsts:
        words = []
        for name in _differing(firsts):
            if one[name].read:
                word = _word(name, one[name], [other[name] for other in firsts])
                words.append(word if name in _SAYS_ITSELF else f"{name.removeprefix(_SET).replace('_', ' ')} {word}")
        made.append(", ".join(words))
    folders = [runs[group[0]].path.resolve().name for group in places]
    if all(made) and len(set(made)) == len(made) and max(map(len, made)) <= _LONGEST:
        return made
    paths = [str(runs[group[0]].path) for group in places]
    return folders if len(set(folders)) == len(folders) else paths


def _word(name: str, value: _Value, others: Iterable[_Value]) -> str:
    """An option's value as a word. A path is its last part, and with the beginning of its fingerprint where others of
    this name are other files."""
    compared = value.compared
    if _is_source(name) and compared is not None:
        word = Path(str(value.shown)).name or str(value.shown)
        alike = [other for other in others if Path(str(other.shown)).name == word and other.key != value.key]
        return f"{word} ({str(compared).rpartition('(')[2][:8]})" if alike else word
    if isinstance(compared, bool) or compared is None:
        return {True: "on", False: "off", None: "not given"}[compared]
    if isinstance(compared, (list, tuple)):
        return " ".join(map(_number, compared))
    return _number(compared)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_source(name: str) -> bool:
    return name.endswith(_DATA) or name in _MODELS


def _is_given(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a name in what a step was made from is that of something a user gave, and not of what a step made."""
    return name in config or name.startswith(_SET) or name.endswith(_DATA)


def _place(name: str) -> tuple[bool, bool, str]:
    """The order in which options make a name: the divergence, then the curriculum, then all others by name."""
    return name not in _SAYS_ITSELF, name != "curriculum", name


def _label(place: int) -> str:
    letters = ""
    place += 1
    while place:
        place, letter = divmod(place - 1, 26)
        letters = chr(ord("A") + letter) + letters
    return letters


def _some(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
