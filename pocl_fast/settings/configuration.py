"""A run's options from a mapping or a YAML file, and back to YAML.

Knows which options there are and how their values are checked. Does not know what they do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from pocl_fast.curriculum.pacing import settled_pacing
from pocl_fast.options.declaring import flag, option_name
from pocl_fast.options.run import RunConfig
from pocl_fast.records.forms import check_names
from pocl_fast.settings.evaluation_sets import SETS, check_set_names, sets_from
from pocl_fast.system.errors import InputError
from pocl_fast.system.typed_values import did_you_mean, hints_of, typed

PAIRS = ("set", "chat_template_kwargs", "fields")  # options that are dicts: NAME=VALUE words on the command line


def from_options(options: Mapping[str, Any], base: RunConfig | None = None, *, where: str = "") -> RunConfig:
    """A configuration from flat options over `base`. Names may have dashes or underscores; `where` the options are from
    begins every message.

    Raises `InputError` naming every unknown option, and every value of the wrong type or out of range.
    """
    base = base or RunConfig()
    where = where and f"{where}: "
    given = _by_field(options, base, where)
    groups, problems = {}, []
    for group in fields(base):
        current = getattr(base, group.name)
        values = vars(current).copy()
        for option in fields(current):
            if option.name not in given:
                continue
            try:
                values[option.name] = _value(option.name, given[option.name], current)
            except ValueError as error:
                problems.append(flag(option) + _after_name(flag(option), error))
        groups[group.name] = type(current)(**values)
    if problems:
        raise InputError(where + "; ".join(problems))
    made = RunConfig(**groups)
    try:
        check_set_names(made)
    except ValueError as error:
        raise InputError(f"{where}--dev and --test: {error}") from error
    return made


def settled(config: RunConfig) -> RunConfig:
    """The configuration of a run, with what "auto" is for its pacing."""
    pacing = settled_pacing(config.schedule.pacing, remeasure=config.stages.remeasure)
    return replace(config, schedule=replace(config.schedule, pacing=pacing))


def _by_field(options: Mapping[str, Any], base: RunConfig, where: str) -> dict[str, Any]:
    """The given values by the names of their fields. Raises `InputError` naming every unknown option, or one that is
    given in two spellings."""
    every = [option for group in fields(base) for option in fields(getattr(base, group.name))]
    known = [option_name(option) for option in every]
    field_of = {name: option.name for option in every for name in (option.name, option_name(option))}
    spelt = {given: str(given).replace("-", "_") for given in options}
    if unknown := sorted(set(spelt.values()) - field_of.keys()):
        what = "unknown options" if len(unknown) > 1 else "unknown option"
        named = ", ".join(name + did_you_mean(name, known) for name in unknown)
        raise InputError(f"{where}{what} {named}; known are {', '.join(known)}")
    given_as: dict[str, str] = {}
    for given, name in spelt.items():
        if (before := given_as.setdefault(field_of[name], given)) != given:
            raise InputError(f"{where}{before} and {given} are the same option: give one of them")
    return {field: options[given] for field, given in given_as.items()}


def _value(name: str, given: Any, group: Any) -> Any:
    if name in SETS:  # words take the place of what was given before; no words leave it
        return dict(getattr(group, name)) if isinstance(given, list) and not given else sets_from(given or {}, name)
    if name not in PAIRS:
        return typed(given, hints_of(type(group))[name])
    if given and not isinstance(given, (dict, list)):
        raise ValueError(f"must be a dict, or NAME=VALUE words, got {given!r}")
    before = getattr(group, name)
    if not given:
        return dict(before) if isinstance(given, list) else {}
    if name == "chat_template_kwargs":
        return before | variables(given) if isinstance(given, list) else dict(given)
    if name == "fields":
        return _fields(given, before)
    from pocl_fast.settings.other_arguments import other_arguments  # loads transformers

    if isinstance(given, list):  # words add to what was given before, a file's dict takes its place
        return before | other_arguments(dict(_pair(word) for word in given))
    return other_arguments(given)


def variables(words: Sequence[str]) -> dict[str, Any]:
    """Variables of a template out of NAME=VALUE words: a value is JSON where it reads as JSON, else text."""
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = str(word).partition("=")
        if not equals:
            raise ValueError(f"must be NAME=VALUE, got {word!r}")
        try:
            values[name.strip()] = json.loads(text)
        except ValueError:
            values[name.strip()] = text
    return values


def _pair(word: Any) -> tuple[str, str]:
    name, equals, value = str(word).partition("=")
    if not equals:
        raise ValueError(f"must be NAME=VALUE, got {word!r}")
    return name.strip().replace("-", "_"), value


def _fields(given: dict[str, str] | list[str], before: dict[str, str]) -> dict[str, str]:
    """What the records' fields are called, out of words, which add to what was given before, or a dict."""
    if isinstance(given, list):
        pairs = [_pair(word) for word in given]
        if twice := [name for name, _ in pairs if sum(other == name for other, _ in pairs) > 1]:
            raise ValueError(f"{twice[0]} is given twice")
        given = before | dict(pairs)
    check_names(given)
    return dict(given)


def _after_name(option: str, error: ValueError) -> str:
    """What is wrong with an option's value: "--stages must be ...", "--eval-seeds, value 2, must be ...", "--set:
    optim must be ..."."""
    text = str(error)
    if option in ("--set", "--fields", "--dev", "--test"):
        return f": {text}"
    return f", {text}" if text.startswith("value ") else f" {text}"


def read_yaml(path: str | Path, base: RunConfig | None = None) -> RunConfig:
    """The configuration in a YAML file of flat options, over `base`."""
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if options is not None and not isinstance(options, dict):
        raise InputError(f"{path}: expected options as `name: value` lines, got a {type(options).__name__}")
    return from_options(options or {}, base, where=str(path))


def recorded_config(run: Path) -> RunConfig:
    """The configuration recorded in a run directory, or the defaults where there is none."""
    known = run / "config.yaml"
    return read_yaml(known) if known.is_file() else RunConfig()


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, every option with its value, grouped and headed as in the help."""
    lines = ["# Every option of this run. `pocl-fast distill --config THIS_FILE --output NEW_FOLDER` runs it again."]
    options = config.flat()
    for group in fields(config):
        value = getattr(config, group.name)
        lines.append(f"\n# {(type(value).__doc__ or '').splitlines()[0]}")
        for option in map(option_name, fields(value)):
            given = options[option]
            in_one_line = None if isinstance(given, list) else False  # PyYAML's None: [lists] in one line
            layout: dict[str, Any] = {"default_flow_style": in_one_line, "width": 1000}
            layout |= {"sort_keys": False}  # of the sets of --dev the first chooses
            text = yaml.safe_dump({option: given}, allow_unicode=True, **layout)
            lines.append(text.rstrip())
    return "\n".join(lines) + "\n"
