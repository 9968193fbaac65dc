"""Which ids a tokenizer has tokens for, and for which of them a model has rows in its embedding and its lm_head.

Knows tokenizers and the sizes of models. Does not know teacher from student, nor where samples come from.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pocl_fast.models.lm_head import causal_lm
from pocl_fast.models.loading import readable_errors, resolve
from pocl_fast.models.parameters import num_parameters
from pocl_fast.models.product_speed import Shapes
from pocl_fast.system.errors import InputError

SPECIAL_TOKENS = ("eos_token", "pad_token", "bos_token", "unk_token")
_known: WeakKeyDictionary[Any, tuple[int, frozenset[int]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Rows:
    """How many ids a model has rows for."""

    embedding: int
    lm_head: int

    @property
    def both(self) -> int:
        """How many ids the model can both read and predict."""
        return min(self.embedding, self.lm_head)


def rows_of(model: Any) -> Rows:
    """The rows of a causal language model, which may have adapters or be wrapped."""
    inner = causal_lm(model)
    weights = (inner.get_input_embeddings().weight, inner.get_output_embeddings().weight)
    return Rows(*(int(getattr(w, "ds_shape", w.shape)[0]) for w in weights))  # ZeRO-3's own parts have no rows


def configured_rows(source: str, *, trust_remote_code: bool = False) -> int | None:
    """How many rows the model behind `source` will have by its configuration, before its weights are read; None where
    that does not tell. Raises `InputError` for a source that cannot be read."""
    return _configured(source, "vocab_size", trust_remote_code)


def configured_layers(source: str, *, trust_remote_code: bool = False) -> int | None:
    """The same for how many layers it will have."""
    return _configured(source, "num_hidden_layers", trust_remote_code)


def shapes_of(model: Any, *, trust_remote_code: bool = False) -> Shapes:
    """The sizes of the matrices of a model, or of one that is given by name; None has those of `Shapes`."""
    if isinstance(model, (str, os.PathLike)):
        config = _configuration(os.fspath(model), trust_remote_code)
    else:
        config = getattr(model, "config", None)
    return Shapes() if config is None else Shapes.of(config)


def configured_parameters(source: str, *, trust_remote_code: bool = False) -> int | None:
    """The same for how many parameters it will have: it is made without memory for its weights."""
    from transformers import AutoModelForCausalLM

    if (config := _configuration(source, trust_remote_code)) is None:
        return None
    try:
        with torch.device("meta"):
            return num_parameters(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    except Exception:  # a model's own code may need memory for its weights: it is counted once it is loaded
        return None


def _configured(source: str, name: str, trust_remote_code: bool) -> int | None:
    if (config := _configuration(source, trust_remote_code)) is None:
        return None
    value = getattr(config.get_text_config(), name, None)
    return value if isinstance(value, int) else None


def _configuration(source: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    where = resolve(source)
    if where.gguf_file is not None:  # its configuration is read with its weights
        return None
    with readable_errors(source, "model"):
        return AutoConfig.from_pretrained(where.path, trust_remote_code=trust_remote_code)


def known_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that a tokenizer has tokens for: there may be holes."""
    size, ids = _known.get(tokenizer, (-1, frozenset()))
    if size != len(tokenizer):
        ids = frozenset(tokenizer.get_vocab().values())
        _known[tokenizer] = (len(tokenizer), ids)
    return ids


def tokenless_ids(tokenizer: Any, rows: int) -> list[int]:
    """The ids below `rows` that a tokenizer has no token for, as the rows that pad a vocabulary to a round number."""
    known = known_ids(tokenizer)
    return [i for i in range(rows) if i not in known]


def unsayable_ids(tokenizer: Any, model: Any, rows: int | None = None) -> list[int]:
    """The ids that no answer of a model has: those without a token, those that it cannot read, and those at or above
    `rows`, which another model that is to read its answers has."""
    own = rows_of(model)
    most = own.both if rows is None else min(own.both, rows)
    return [*tokenless_ids(tokenizer, most), *range(most, own.lm_head)]


def rowless_line(tokenizer: Any, rows: int, whose: str) -> str | None:
    """A line about tokens that the model that `whose` names has no row for; None where it has one for each."""
    missing = sorted(token for token in known_ids(tokenizer) if token >= rows)
    if not missing:
        return None
    return (
        f"{len(missing)} of the tokenizer's {len(known_ids(tokenizer))} tokens, the first of them"
        f" {tokenizer.convert_ids_to_tokens(missing[0])!r} ({missing[0]}), have no row in the {whose}'s embedding of"
        f" {rows} rows; no sample has one of these"
    )


def named(tokenizer: Any, token: int) -> str:
    """A token for a message: its text and its id."""
    text = None
    if token in known_ids(tokenizer):
        text = tokenizer.convert_ids_to_tokens(token)
    return f"id {token}, which the tokenizer has no token for," if text is None else f"the token {text!r} ({token})"


def check_special_tokens(tokenizer: Any, rows: int, whose: str) -> None:
    """Raises `InputError` where a tokenizer's end-of-sequence, padding, beginning or unknown token has no row in the
    model that `whose` names."""
    for name in SPECIAL_TOKENS:
        token = getattr(tokenizer, f"{name}_id", None)
        if token is None or token < rows:
            continue
        instead = "take another: tokenizer.pad_token = tokenizer.eos_token" if name == "pad_token" else "give its own"
        raise InputError(
            f"the tokenizer's {name} {getattr(tokenizer, name)!r} has id {token}, and the {whose}'s embedding has"
            f" {rows} rows: add rows to the model, resize_token_embeddings({token + 1}), or {instead}"
        )
