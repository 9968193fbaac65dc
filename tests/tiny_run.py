"""Whole runs on tiny models, through the command line in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import PAPERS_STAGES, arithmetic, save_tiny, write_jsonl

from pocl_fast.cli import main

OUTPUTS = ("difficulty.parquet", "curriculum.json", "metrics.jsonl", "evaluation.json", "student/model.safetensors")


def make_inputs(folder: Path, *, train: int = 24, dev: int = 8, **model: int) -> Path:
    """A teacher's folder `teacher`, `train.jsonl` and `dev.jsonl`."""
    save_tiny(folder / "teacher", **({"layers": 4} | model))
    write_jsonl(folder / "train.jsonl", arithmetic(train))
    write_jsonl(folder / "dev.jsonl", arithmetic(dev, start=100))
    return folder


def options(inputs: Path, **changed: Any) -> list[str]:
    """The options of a run of seconds on `make_inputs`; None leaves one out."""
    given = {
        "teacher": inputs / "teacher",
        "student_layers": 2,
        "train": inputs / "train.jsonl",
        "dev": inputs / "dev.jsonl",
        "max_length": 96,
        "max_prompt_length": 80,
        "max_new_tokens": 4,
        "generation_batch_size": 8,
        "epochs_per_stage": 1,
        "batch_size": 4,
        "eval_seeds": (10, 20),
        "device": "cpu",
        "precision": "fp32",
    }
    if "preset" not in changed:
        given |= PAPERS_STAGES
    words: list[str] = []
    for name, value in (given | changed).items():
        said = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{said}" if value else f"--no-{said}")
        elif value is not None:
            values = value if isinstance(value, (tuple, list)) else (value,)
            words += [f"--{said}", *map(str, values)]
    return words


def select(words: list[str], command: str) -> list[str]:
    """Those of the options that a command has."""
    from dataclasses import fields

    from pocl_fast.cli import COMMANDS
    from pocl_fast.options.declaring import flag
    from pocl_fast.options.run import RunConfig

    groups, unread = [getattr(RunConfig(), group) for group in COMMANDS[command].groups], COMMANDS[command].unread
    known = {flag(option) for group in groups for option in fields(group) if option.name not in unread}
    kept: list[str] = []
    keep = False
    for word in words:
        keep = word.replace("--no-", "--") in known if word.startswith("--") else keep
        kept += [word] if keep else []
    return kept


def run(command: str, output: Path, *words: str) -> int:
    """The exit status of a command."""
    try:
        return main([command, "--output", str(output), *words])
    except SystemExit as stop:  # tyro's, for options it cannot read
        return int(stop.code or 0)


def refusal(capsys: Any, command: str, output: Path, *words: str) -> str:
    """What a command says on stderr when it refuses its input."""
    capsys.readouterr()
    assert run(command, output, *words) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def scores_of(output: Path, name: str = "dev") -> Any:
    """The scores of a set in evaluation.json: before, after, teacher."""
    return read_json(output / "evaluation.json")["sets"][name]["scores"]


def score_rows(output: Path, when: str, name: str = "dev") -> list[dict[str, Any]]:
    """The scores on each sample of a set."""
    import pyarrow.parquet as pq

    return pq.read_table(output / "scores" / f"{name}-{when}.parquet").to_pylist()  # type: ignore[no-any-return]


def weights(output: Path) -> bytes:
    return (output / "student" / "model.safetensors").read_bytes()
