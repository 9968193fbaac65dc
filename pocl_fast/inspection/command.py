"""`pocl-fast inspect`: which records, with whose tokenizer, shown where.

Knows options and where tokenizers are loaded from. Loads no weights; writes nothing but the page that is asked for.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Protocol

from pocl_fast.data.encoding import SampleEncoder, encoder_of
from pocl_fast.inspection.inspected import Inspector
from pocl_fast.inspection.page import page
from pocl_fast.inspection.picked import picked
from pocl_fast.inspection.terminal import as_text, has_colours, width
from pocl_fast.models.loading import load_tokenizer
from pocl_fast.options.run import RunConfig
from pocl_fast.records.sources import source_of
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_text
from pocl_fast.templates.template_date import DATE_FILE


class Asked(Protocol):
    """What to show, and where."""

    @property
    def output(self) -> Path | None: ...
    @property
    def model(self) -> str | None: ...
    @property
    def line(self) -> int | None: ...
    @property
    def count(self) -> int: ...
    @property
    def ids(self) -> bool: ...
    @property
    def html(self) -> Path | None: ...


def inspect(asked: Asked, config: RunConfig) -> None:
    """Prints the records that are asked for as the model sees them, and writes their page.

    Raises `InputError` where a run would, and for a record that is not there.
    """
    if asked.output is not None and not (asked.output / "config.yaml").is_file():
        raise InputError(f"--output {asked.output} holds no run whose options could be taken")
    if config.data.train is None:
        raise InputError("--train is missing: give a file, or --output RUN to take that of a run")
    if asked.html is not None and not asked.html.parent.is_dir():
        raise InputError(f"--html {asked.html}: there is no folder {asked.html.parent}")
    source = source_of(config.data.train)
    records = picked(source, asked.line, asked.count)
    inspector = Inspector(source, encoder_for(config, asked.model, asked.output), config.data)
    samples = [inspector.look(record) for record in records]
    _print([as_text(one, colours=has_colours(sys.stdout), wide=width(), ids=asked.ids) for one in samples])
    if asked.html is not None:
        try:
            write_text(asked.html, page(samples, f"{source.name} as the model sees it"))
        except OSError as error:
            raise InputError(f"cannot write --html {asked.html}: {error.strerror}") from error
        print(f"page: {asked.html}")


def encoder_for(config: RunConfig, model: str | None, run: Path | None) -> SampleEncoder:
    """The encoder of a run's options, with the tokenizer of `model`, else of the student. A template that writes the
    date writes the one that the `run` has kept, else today's; nothing is kept.

    Raises `InputError` where no model is named, and for what `encoder_of` refuses.
    """
    source = model or config.models.student or config.models.teacher
    if source is None:
        raise InputError("give --model, whose tokenizer is taken, or --student, or --teacher, or --output RUN")
    tokenizer = load_tokenizer(source, trust_remote_code=config.models.trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="pocl-fast-") as folder:
        if run is not None and (run / DATE_FILE).is_file():
            shutil.copy(run / DATE_FILE, folder)
        return encoder_of(tokenizer, config.data, Path(folder), lambda _: None)


def _print(texts: list[str]) -> None:
    stream: Any = sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")  # of a terminal without Unicode
    print("\n".join(texts), end="")
