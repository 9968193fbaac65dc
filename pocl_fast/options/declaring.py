"""How an option is declared: ranges that several have, names on the command line, docstrings that are help."""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import Field, fields, is_dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Annotated, Any

from pocl_fast.system.typed_values import Range

Count = Annotated[int, Range(at_least=1)]
Seed = Annotated[int, Range(at_least=0, below=1 << 31)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]


def option_name(option: Field[Any]) -> str:
    """The field's name on the command line and in YAML: `batch_size` for `per_device_train_batch_size`, which
    transformers names so."""
    aliases = option.metadata.get("aliases")
    return aliases[0].removeprefix("--") if aliases else option.name


def flag(option: Field[Any]) -> str:
    """The field's name as a word of the command line."""
    return "--" + option_name(option).replace("_", "-")


def document(module_name: str) -> None:
    """Makes each docstring of a field its `metadata["help"]`, in all option groups of a module."""
    module = sys.modules[module_name]
    for statement in ast.parse(inspect.getsource(module)).body:
        known = vars(module).get(statement.name) if isinstance(statement, ast.ClassDef) else None
        if known is None or not is_dataclass(known):
            continue
        texts: dict[str, str] = {}
        body = statement.body  # type: ignore[attr-defined]  # a ClassDef
        for declared, text in pairwise(body):
            if isinstance(declared, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[ast.unparse(declared.target)] = " ".join(ast.literal_eval(text.value).split())
        for option in fields(known):
            if option.name in texts:  # an inherited field has its text from the group that declares it
                option.metadata = MappingProxyType({**option.metadata, "help": texts[option.name]})
