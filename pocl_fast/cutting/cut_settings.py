"""The settings of a model that is cut to some of its layers: configurations in which each kept layer could be what it
was.

A configuration says what each layer is in many ways: a list with an entry a layer, a list of layers' numbers, a pattern
that repeats, every n-th layer, the first n. Rules make candidates out of these, the likeliest first. Knows
configurations alone; which candidate is right, the layers themselves say (cut_check.py).
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

MOST_OF_LISTS = 64  # candidates that differ in how lists are read
PERIODIC = (
    "step",
    "period",
    "offset",
    "interval",
    "pattern",
    "freq",
    "replace",
    "start",
    "end",
    "shared_layers",
    "dense",
)
NUMBERS_OF_LAYERS = ("layers", "ids", "indices", "idxs")  # a list of this name may be empty, and hold layers' numbers
OF_DEPTH = ("depth", "residual")
OF_SHARING = "num_kv_shared_layers"  # so many last layers have no keys and values of their own


def owners_of_keys(config: Any) -> dict[int, int]:
    """Of each layer that reads the keys and values of an earlier one, that layer: the last one with keys of its own and
    the same kind of attention. Empty where every layer has its own."""
    text = config.get_text_config(decoder=True)
    shared = getattr(text, OF_SHARING, None) or 0
    kinds = list(getattr(text, "layer_types", None) or ())
    if not shared or not kinds:
        return {}
    own = len(kinds) - shared
    last = {kind: layer for layer, kind in enumerate(kinds[:own])}
    return {layer: last[kinds[layer]] for layer in range(own, len(kinds)) if kinds[layer] in last}


class Settings:
    """The configuration of a model whose text part has `count` layers, of which `chosen` stay."""

    def __init__(self, config: Any, count: int, chosen: Sequence[int]) -> None:
        self.config, self.count, self.chosen = config, count, list(chosen)
        self.sharing = owners_of_keys(config)
        self.path = _path_of_text(config)
        whole = config.to_dict()
        whole.pop("quantization_config", None)  # of weights that are no longer quantised
        self.text = _part(whole, self.path)
        self.whole = whole
        text = config.get_text_config(decoder=True)
        self.name_of_count = (getattr(text, "attribute_map", None) or {}).get("num_hidden_layers", "num_hidden_layers")

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Changes to the text part's settings, the likeliest first."""
        options = {name: found for name, value in self.text.items() if (found := self._readings(name, value))}
        lists = list(itertools.islice(_fewest_first(options), MOST_OF_LISTS))
        yield from lists
        for changes in lists[:4]:
            for name, value in self._depths():
                yield {**changes, name: value}

    def periods(self) -> list[list[dict[str, int]]]:
        """Other values of the settings of every n-th or of the first n layers: for each setting, and for each two of
        one name (period and offset)."""
        settings = dict(self._periodic())
        values = range(len(self.chosen) + 1)
        found = [[{name: value} for value in values if value != now] for name, now in settings.items()]
        for name in settings:
            if name.endswith("period") and (other := name.replace("period", "offset")) in settings:
                found.append([{name: n, other: m} for n in values[1:] for m in range(n)])
        return found

    def lists_of_numbers(self) -> list[str]:
        """The settings that may list layers by their numbers."""
        return [
            name
            for name, value in self.text.items()
            if name.endswith(NUMBERS_OF_LAYERS)
            if value is None or value == [] or (isinstance(value, list) and _numbers_of(value, self.count))
        ]

    def single_steps(self) -> dict[str, Any]:
        """The settings of every n-th layer, as every layer."""
        return {name: 1 for name, value in self._periodic() if "step" in name or "period" in name}

    def build(self, changes: dict[str, Any]) -> Any:
        """The configuration with these changes, as it comes back from a file."""
        whole = _copied(self.whole)
        text = _part(whole, self.path)
        if self.name_of_count in text:
            text[self.name_of_count] = len(self.chosen)
        text.update(changes)
        config = type(self.config).from_dict(whole)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            return type(self.config).from_pretrained(folder)

    # -- how a setting may be read ----------------------------------------------------------------------------------

    def _readings(self, name: str, value: Any) -> list[Any]:
        """What a setting may become, the likeliest first; empty where it has nothing to do with layers."""
        if isinstance(value, dict):
            keys = [str(key) for key in value]
            if not keys or not all(key.isdigit() and int(key) < self.count for key in keys) or name.startswith("id2"):
                return []
            entries = {int(key): entry for key, entry in value.items()}
            return [{str(new): entries[old] for new, old in enumerate(self.chosen) if old in entries}]
        if name == OF_SHARING and self.sharing:
            return [sum(layer in self.sharing for layer in self.chosen)]
        if type(value) is int and value == self.count and name != self.name_of_count:
            return [value, len(self.chosen)] if "layers" in name or "blocks" in name else []
        if isinstance(value, str):
            a_layer_each = len(value) == self.count and "pattern" in name
            return ["".join(value[i] for i in self.chosen)] if a_layer_each else []
        if not isinstance(value, (list, tuple)) or not value or "token" in name or name == "architectures":
            return []
        return self._readings_of_list(name, list(value))

    def _readings_of_list(self, name: str, value: list[Any]) -> list[Any]:
        found: list[Any] = []
        numbers = _numbers_of(value, self.count)
        renumbered = [new for new, old in enumerate(self.chosen) if old in value] if numbers else []
        if numbers and name.endswith(NUMBERS_OF_LAYERS):
            found.append(renumbered)
        if len(value) == self.count:
            found.append([value[i] for i in self.chosen])
        if numbers and len(value) != self.count and value[-1] < self.count:
            found.append(renumbered)
        if (runs := _runs(value)) is not None and len(runs) == self.count:
            found.append([[[runs[i]], 1] for i in self.chosen])
        if len(value) < self.count and all(isinstance(entry, str) for entry in value) and len(value) > 1:
            found.append([value[i % len(value)] for i in self.chosen])  # a pattern that repeats
        distinct: list[Any] = []
        for reading in [*found, value] if found else []:
            if reading not in distinct:
                distinct.append(reading)
        return distinct if distinct != [value] else []

    def _periodic(self) -> list[tuple[str, int]]:
        return [
            (name, value)
            for name, value in self.text.items()
            if type(value) is int and any(word in name for word in PERIODIC) and ("token" not in name)
            if "layer" in name or "dense" in name or "step" in name or "pattern" in name
        ]

    def _depths(self) -> Iterator[tuple[str, float]]:
        """Scales of the layers' outputs that a family divides by its number of layers, or by that number's root."""
        ratio = len(self.chosen) / self.count
        for name, value in self.text.items():
            if type(value) is float and any(word in name for word in OF_DEPTH) and "drop" not in name:
                yield from ((name, value * factor) for factor in (math.sqrt(ratio), ratio))


def _path_of_text(config: Any) -> list[str]:
    """The names that lead from a configuration to that of its text part."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return []
    for name, part in vars(config).items():
        if part is text:
            return [name]
        if hasattr(part, "get_text_config") and part.get_text_config(decoder=True) is text:
            return [name, *_path_of_text(part)]
    return []


def _part(whole: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for name in path:
        whole = whole[name]
    return whole


def _copied(whole: Any) -> Any:
    """A copy of nested dictionaries and lists; other values are shared."""
    if isinstance(whole, dict):
        return {name: _copied(value) for name, value in whole.items()}
    return [_copied(value) for value in whole] if isinstance(whole, list) else whole


def _numbers_of(value: Any, count: int) -> bool:
    """Whether a list can hold numbers of layers: whole ones, ascending; those of a larger model's layers too."""
    if not isinstance(value, (list, tuple)) or not all(type(entry) is int and entry >= 0 for entry in value):
        return False
    return bool(value) and value[0] < count and all(a < b for a, b in itertools.pairwise(value))


def _runs(value: list[Any]) -> list[Any] | None:
    """A list of [entries, times] written out; None where it is no such list."""
    written: list[Any] = []
    for entry in value:
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], (list, tuple))):
            return None
        if type(entry[1]) is not int:
            return None
        written += list(entry[0]) * entry[1]
    return written


def _fewest_first(options: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every choice of one reading a setting: first the first of each, then those with one other reading, and so on."""
    names = list(options)
    for others in range(len(names) + 1):
        for changed in itertools.combinations(names, others):
            for readings in itertools.product(*(options[name][1:] for name in changed)):
                yield {name: options[name][0] for name in names} | dict(zip(changed, readings, strict=True))
