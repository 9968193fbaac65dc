"""A student with adapters on disk: the adapters alone, with the model that they are for, or merged into it.

Knows peft and its files. Does not know how adapters are made (adapters.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from pocl_fast.inputs.adapters import plain_state
from pocl_fast.models.loading import ADAPTER, BASE, merged


def is_adapted(model: Any) -> bool:
    """Whether a model is one of peft's."""
    return hasattr(model, "get_base_model") and hasattr(model, "peft_config")


def saved_bytes(model: Any, *, whole: bool = False) -> int:
    """The bytes of all tensors that `save_adapted` writes of a model, which may be on the meta device."""
    own = {id(tensor): tensor for tensor in plain_state(model.get_base_model()).values()}  # tied ones once
    base = _bytes(own.values())
    if whole:
        return base
    alone = adapter_bytes(model)
    return alone if model.active_peft_config.base_model_name_or_path else alone + base


def adapter_bytes(model: Any) -> int:
    """The bytes of the adapters alone, as peft saves them: what several layers share, once for each."""
    from peft import get_peft_model_state_dict

    return _bytes(get_peft_model_state_dict(model).values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def save_adapted(model: Any, folder: Path, *, whole: bool = False, place: Path | None = None) -> str:
    """Writes a model of peft: its adapters alone, or `whole`, with these merged into its weights (in place).

    adapter_config.json names the model that the adapters are for. One that is nowhere as it is, for it was cut, or made
    from a GGUF file or other adapters, is saved beside them in the folder `base`; `place` is where the folder will be
    in the end. Returns in words what was saved.
    """
    if whole:
        merged(model).save_pretrained(folder)
        return "whole, its adapters merged into its weights"
    model.save_pretrained(folder)
    settings = folder / ADAPTER
    known = json.loads(settings.read_text(encoding="utf-8"))
    if known.get("base_model_name_or_path"):
        return f"as adapters for {known['base_model_name_or_path']}"
    inner = model.get_base_model()
    inner.save_pretrained(folder / BASE, state_dict={n: t.detach() for n, t in plain_state(inner).items()})
    known["base_model_name_or_path"] = os.path.abspath((place or folder) / BASE)
    settings.write_text(json.dumps(known, indent=2, sort_keys=True), encoding="utf-8")
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")  # peft names what the model was made from, or nothing, as base_model
    card.data.base_model, tags = None, card.data.tags or []
    card.data.tags = [tag for tag in tags if not tag.startswith("base_model:")]
    card.save(folder / "README.md")
    return f"as adapters, with the model that they are for beside them in {BASE}"
