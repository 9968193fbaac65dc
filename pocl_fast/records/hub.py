"""Data sets of the hub as sources, and `datasets.Dataset` objects: by the `datasets` library.

Knows that library. Does not know what a record says (samples.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_fast.records import tables
from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.files import File, is_large
from pocl_fast.records.saved import no_split
from pocl_fast.system import hub_reach
from pocl_fast.system.errors import InputError, first_line
from pocl_fast.system.typed_values import did_you_mean

PREFIX = "hf:"
FORM = "hf:ORG/NAME:SPLIT or hf:ORG/NAME:CONFIG:SPLIT"
INSTALL = "pip install 'pocl-fast[data]'"
_READ_HERE = tuple(f"datasets.packaged_modules.{kind}." for kind in ("json", "parquet", "arrow"))
_PATIENCE = 10  # seconds that the hub has for its first answer; `datasets` alone would try again for 20 s and more


@dataclass(frozen=True)
class HubDataset:
    """A split of a data set of the hub, or a part of one."""

    name: str  # as it was given
    repository: str
    revision: str | None
    config: str | None
    split: str
    unit: str = "row"

    def place(self, number: int) -> str:
        return f"{self.name}, row {number}"

    def records(self, expected: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Raises `InputError` for a data set, config or split that is not there, and for a hub that is out of reach and
        a data set that is not in the cache."""
        return dataset_rows(self._dataset(), self.name)

    def fingerprint(self) -> str:
        """Of the files on the hub, and which part of them is taken: `datasets` names its cache by both."""
        known = f"{self._dataset()._fingerprint} {len(self._dataset())}"
        return hashlib.sha256(known.encode()).hexdigest()

    def is_large(self) -> bool:
        return is_large(self._dataset().data.nbytes)

    def _dataset(self) -> Any:
        return _loaded(self)


def named(given: str) -> HubDataset:
    """The source of a name that begins with `hf:`. Raises `InputError` for one without a name, and for one with an
    empty part where a split should be."""
    repository, _, part = given.removeprefix(PREFIX).partition(":")
    repository, _, revision = repository.partition("@")
    before = part.partition("[")[0]  # a colon in brackets is a slice's: train[:1000]
    config, _, split = part.partition(":") if ":" in before else ("", "", part)
    if not repository or repository.count("/") > 1 or (":" in before and not config):
        raise InputError(f"{given} names no data set of the hub: give {FORM}")
    if part and not split.partition("[")[0].strip():
        what = f'nothing behind "{config}:"' if config else "nothing before its brackets"
        raise InputError(f"{given} names no split, for it has {what}: give {FORM}")
    return HubDataset(given, repository, revision or None, config or None, split)


def is_plain(dataset: Any) -> bool:
    """Whether a `datasets` object is a table whose rows are as they lie in it: nothing transforms them when read."""
    return hasattr(dataset, "with_format") and getattr(dataset, "format", {}).get("type", "") is None


def dataset_rows(dataset: Any, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a `datasets.Dataset` with their numbers, from 1."""
    columns = dataset.format["columns"]  # those that its owner shows
    yield from tables.numbered(dataset.with_format("arrow", columns=columns).iter(tables.PIECE_ROWS), name)


@functools.lru_cache(maxsize=4)  # it is read several times, and each time the hub would be asked what is new
def _loaded(source: HubDataset) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{source.name}: data sets of the hub are read by the datasets library: {INSTALL}") from error
    unreached = _asks(source)
    if not source.split:
        known, what = [], "split"
        if not unreached:
            known = _tried(datasets.get_dataset_split_names, source.repository, source.config)
        if not unreached and not known:
            known, what = _tried(datasets.get_dataset_config_names, source.repository), "config"
        raise InputError(f"{source.name} names no {what}{_there_are(known)}: give {FORM}")
    try:
        with _offline(unreached is not None):
            return datasets.load_dataset(source.repository, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # of a dozen types, most of them other libraries'
        raise _unreached(source, unreached) if unreached else _refused(source, error) from error


def _asks(source: HubDataset) -> str | None:
    """Why the hub does not answer; None where it does. Raises `InputError` where it has no such data set."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(source.repository, revision=source.revision, timeout=_PATIENCE)
    except errors.GatedRepoError as error:
        raise InputError(
            f"{source.name}: the hub gives {source.repository} to those alone who accepted its terms: accept them on"
            " its page, then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{source.name}: {source.repository} has no revision {source.revision}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError(
            f"{source.name}: the hub has no data set {source.repository}, or it is private (then `hf auth login`)."
            " Look at its name, or give a file or folder"
        ) from error
    except Exception as error:  # the HTTP library's own, which is another one in each version of huggingface_hub
        return first_line(error, named=True)
    return None


@contextlib.contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Lets `datasets` look into its cache alone, rather than ask a hub again and again that does not answer."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        with hub_reach.cache_alone(wanted):
            yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _unreached(source: HubDataset, why: str) -> InputError:
    from huggingface_hub import constants

    return InputError(
        f"{source.name}: {hub_reach.is_out_of_reach(why)}, and this split of {source.repository}"
        f" is not in the cache ({constants.HF_HOME}). Give a local copy: where there is a network, `hf download"
        f" {source.repository} --repo-type dataset --local-dir FOLDER`, then the path of its files; or set HF_ENDPOINT"
        " to a mirror"
    )


def _refused(source: HubDataset, error: Exception) -> InputError:
    """Why `datasets` gives nothing of a data set that the hub has."""
    import datasets

    configs = _tried(datasets.get_dataset_config_names, source.repository)
    if source.config is not None and configs and source.config not in configs:
        hint = did_you_mean(source.config, configs)
        return InputError(f'{source.name}: there is no config "{source.config}"{hint}{_there_are(configs)}')
    if (
        source.config is None
        and len(configs) > 1
        and (source.split in configs or "Config name is missing" in str(error))
    ):
        return InputError(f"{source.name} names no config{_there_are(configs)}: give {FORM}")
    splits = _tried(datasets.get_dataset_split_names, source.repository, source.config)
    wanted = {one.partition("[")[0].strip() for one in source.split.split("+")}
    if splits and (missing := sorted(wanted.difference(splits, {"all"}))):
        return InputError(no_split(source.name, missing[0], splits))
    why = _damaged_file(source) or f"datasets.load_dataset cannot read it ({_causes(error)})"
    return InputError(
        f"{source.name}: {why}. That is what the hub has: get its files (`hf download {source.repository} --repo-type"
        " dataset --local-dir FOLDER`), put them right, and give their path"
    )


def _damaged_file(source: HubDataset) -> str:
    """What is wrong with the first of a split's files that cannot be read, with its name and line: `datasets` does not
    say. Empty where each can be read alone, and where `datasets` reads files of a kind that is not read here."""
    import datasets
    from huggingface_hub import hf_hub_download

    where = source.repository, source.config
    try:
        builder = datasets.load_dataset_builder(*where, revision=source.revision)
        if not any(kind.__module__.startswith(_READ_HERE) for kind in type(builder).__mro__):
            return ""  # CSV, say, of which no line would be JSON
        every = builder.config.data_files or {}
        splits = {one.partition("[")[0].strip() for one in source.split.split("+")}
        for url in (str(url) for split, urls in every.items() if str(split) in splits for url in urls):
            name = url.partition("@")[2].partition("/")[2]  # hf://datasets/ORG/NAME@COMMIT/FILE
            path = hf_hub_download(source.repository, name, repo_type="dataset", revision=source.revision)
            for _, record in File(Path(path), name).records("with the fields of a record"):
                if isinstance(record, BadRecord):
                    return str(record)
    except InputError as error:
        return str(error)
    except Exception:  # of the libraries: what stopped the reading is said, then
        return ""
    return ""


def _causes(error: BaseException) -> str:
    """What an error says, and what it was raised from, each in a line: `datasets` often says nothing itself."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(said) < 3:
        text = " ".join(str(cause).split())
        said.append(f"{type(cause).__name__}: {text:.200}")
        cause = cause.__cause__
    return "; from ".join(said)


def _tried(names: Callable[..., list[str]], *of: str | None) -> list[str]:
    """What a function of `datasets` finds; nothing where it fails, as it may where loading failed."""
    try:
        return [str(name) for name in names(*of)]
    except Exception:
        return []


def _there_are(names: list[str]) -> str:
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"; there {'is' if len(names) == 1 else 'are'} {shown}" if names else ""
