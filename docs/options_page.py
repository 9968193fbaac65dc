"""Writes docs/options.md from the declarations in pocl_fast.options; --check compares the file with them."""

from __future__ import annotations

import argparse
import sys
import textwrap
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from pocl_fast.cli import COMMANDS
from pocl_fast.options.declaring import flag
from pocl_fast.options.run import RunConfig
from pocl_fast.system.typed_values import describe, hints_of
from pocl_fast.training.arguments import TRAINER_GROUPS

PAGE = Path(__file__).with_name("options.md")
HEAD = """\
An option has one name: `--learning-rate` on the command line is `learning_rate` in a YAML file for
`--config`, and `PoclConfig(learning_rate=...)` for the trainer. Names that PoclConfig does not have
are marked "run": a trainer is given these as arguments.

Any other argument of transformers' `TrainingArguments` is given to `PoclConfig` as it is, and to a
run by `--set NAME=VALUE ...`, in YAML as `set: {NAME: VALUE}`. An argument that one of the options
below decides is refused there, and the message names the option.

Values on the command line win over the YAML file, which wins over what the run directory has
recorded, which wins over the default. An unknown name or a wrong value is an error before anything
is computed.
"""


def page() -> str:
    """The page as text."""
    lines = ["# Options", "", "<!-- written by docs/options_page.py from pocl_fast/options -->", "", HEAD]
    for group in fields(RunConfig):
        lines += _section(group.name)
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str) -> list[str]:
    group = getattr(RunConfig(), name)
    commands = ", ".join(f"`{command}`" for command, made in COMMANDS.items() if name in made.groups)
    about = textwrap.fill(f"{(type(group).__doc__ or '').strip()} Commands: {commands}.", 100)
    lines = [f"## {name}", "", about, "", "| option | in YAML and `PoclConfig` | value | default | meaning |"]
    lines.append("|---|---|---|---|---|")
    hints = hints_of(type(group))
    return [*lines, *(_row(option, hints[option.name]) for option in fields(group)), ""]


def _row(option: Field[Any], kind: Any) -> str:
    given = option.default_factory() if option.default_factory is not MISSING else option.default
    own = any(option.name in hints_of(group) for group in TRAINER_GROUPS)
    yaml_name = flag(option).removeprefix("--").replace("-", "_")
    named = f"`{yaml_name}`" if own and yaml_name == option.name else f"`{yaml_name}`; `{option.name}`"
    cells = [
        f"`{flag(option)}`",
        named if own else f"`{yaml_name}` (run)",
        describe(kind),
        f"`{_default(given)}`",
        option.metadata["help"],
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace("'", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the file is not what would be written")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE} is not what pocl_fast/options declares: run `python {Path(__file__).name}`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
