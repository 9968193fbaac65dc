"""What kind of thing an argument of a loss is: each wrong one has one line that names it and says what to give.

Knows nothing of shapes, nor of what a loss does with its arguments: see `checks.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def check_tensor(name: str, x: Any) -> None:
    """Raises TypeError for what is not a tensor of torch, and ValueError for one whose numbers do not lie in memory."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {described(x)}{_instead(name, x)}")
    if (x.layout is torch.strided and not x.is_nested and not x.is_quantized) or torch.compiler.is_compiling():
        return
    if x.layout is not torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        instead = "pad it, or concatenate its rows" if x.is_nested else "call its to_dense()"
        raise ValueError(f"{name} must be a dense tensor, got a {layout} one; {instead}")
    raise ValueError(f"{name} must not be quantised, got {x.dtype}; call its dequantize()")


def check_floating(name: str, x: Tensor) -> None:
    """Raises ValueError for integers, booleans and complex numbers."""
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating-point (fp32, bf16, fp16 or float64), got {x.dtype}")


def check_number(name: str, x: Any) -> None:
    """Raises TypeError for what is not a number; a tensor of one value is one."""
    if type(x) in (int, float) or isinstance(x, Tensor):
        return
    try:
        if isinstance(x, str):
            raise TypeError
        float(x)  # numpy's and symbolic numbers are numbers
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {described(x)}") from None


def check_integer(name: str, x: Any) -> None:
    """Raises TypeError for what is not a whole number."""
    if type(x) is not int and (isinstance(x, bool) or not hasattr(x, "__index__")):
        raise TypeError(f"{name} must be an integer, got {described(x)}")


def described(x: Any) -> str:
    """A value that is short to write down, and the type of any other."""
    if x is None or isinstance(x, (str, bool, int, float)):
        text = repr(x)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(x, type):
        return f"the class {x.__name__}"
    name, package = type(x).__name__, type(x).__module__.partition(".")[0]
    return f"a {name}" if package in ("builtins", "torch", "pocl_fast") else f"a {package} {name}"


def _instead(name: str, x: Any) -> str:
    """What to give where `x` was given: the tensor that it holds, or that can be made of it."""
    words = name.replace(".", "_").replace(" ", "_").split("_")
    held = {"weight": ["weight"], "bias": ["bias"], "hidden": ["last_hidden_state", "hidden_states"]}
    for attribute in next((held[word] for word in words if word in held), ["logits"]):
        if isinstance(getattr(x, attribute, None), (Tensor, tuple)):
            return f"; give its .{attribute}{'[-1]' if attribute == 'hidden_states' else ''}"
    if isinstance(x, nn.Module):
        return "; give what it computes"
    if type(x).__module__.partition(".")[0] == "numpy":
        return "; give torch.from_numpy of it"
    if isinstance(x, (list, tuple)):
        return "; give torch.stack of them" if any(isinstance(v, Tensor) for v in x) else "; give torch.tensor of it"
    if hasattr(x, "__dlpack__"):
        return "; give torch.from_dlpack of it"
    return ""
