"""A model out of a GGUF file, with plain weights: what transformers reads more than once of it is read once.

Knows transformers' and gguf's ways with such files. Does not know where they come from.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

from pocl_fast.system.console import in_place_of_tqdm
from pocl_fast.system.errors import InputError

_PATCHING = threading.RLock()


def load_gguf(folder: str, name: str, dtype: torch.dtype) -> Any:
    """The model in the file `name` of a folder, dequantised to `dtype`. Raises `InputError` where transformers leaves
    its weights quantised."""
    from transformers import AutoModelForCausalLM, GgufConfig, modeling_gguf_pytorch_utils
    from transformers import __version__ as version

    with in_place_of_tqdm(modeling_gguf_pytorch_utils, "converting the GGUF file", "tensors"), _read_once():
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    model.hf_quantizer = None  # type: ignore[assignment]  # plain weights now, saved and trained as such
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if getattr(model, "is_quantized", False):
        raise InputError(f"transformers {version} did not dequantise {name}")
    return model


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Has transformers take a file's fields apart once, not for the configuration and again for the weights, and list
    the names of an architecture's tensors once, not once a module of the model. One thread at a time."""
    import gguf  # which no other model needs

    with _PATCHING:
        theirs = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        for name, function in theirs.items():
            setattr(gguf, name, functools.cache(function))
        try:
            yield
        finally:
            for name, function in theirs.items():
                setattr(gguf, name, function)
