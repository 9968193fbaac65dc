"""Products with an lm_head whose results are fp32, as they come out of the accumulators and not rounded to the inputs'
dtype: rounding logits to bf16 costs 5 % of a distillation gradient, and all of it once student and teacher are close.

On CUDA such products are one call (`out_dtype`). On a CPU that multiplies bf16 faster than fp32, csrc/products has
them. Elsewhere oneDNN offers them for fp32 tensors alone, whose values it may round to bf16, which changes nothing
where they were bf16 before: slices of the weight are converted on the way.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from pocl_fast.loss import row_operator
from pocl_fast.system.fp32_products import faster, least_seconds, matmul_inputs

Bf16Way = Literal["bf16", "fp32"]  # how a CPU multiplies with a bf16 lm_head: as it is, or slices of it in fp32
SLICE = 4096  # rows of the weight that are fp32 at a time: 2 to 30 MB, which stay in the caches


class HeadProducts:
    """An lm_head [V, H], its bias [V] or None, and the dtype to which the inputs of products are rounded."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight if on_cpu(weight) else weight.to(dtype)  # a copy under autocast, once
        self.bias, self.dtype = bias, dtype
        self._buffer: Tensor | None = None  # kept, for fresh pages cost more than the conversion into them

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out [n, V] fp32 = hidden [n, H] · weightᵀ + bias."""
        if not on_cpu(self.weight):
            _gpu_mm(hidden.to(self.dtype), self.weight.t(), out)
        elif cpp := cpp_products(self.dtype, self.weight):
            cpp.logits_product(hidden, self.weight, self.bias, out)
            return
        else:
            x = hidden.to(self.dtype).float()
            with matmul_inputs(self.dtype):
                for part, weight in self._slices():
                    torch.mm(x, weight.t(), out=out[:, part])
        if self.bias is not None:
            out += self.bias.float()

    def hidden_grad(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, H] in `dtype` = grad [n, V] · weight."""
        if not on_cpu(self.weight):
            if dtype == self.dtype:
                return grad.to(dtype) @ self.weight
            out = grad.new_empty((len(grad), self.weight.shape[1]), dtype=torch.float32)
            _gpu_mm(grad.to(self.dtype), self.weight, out)
            return out.to(dtype)
        if cpp := cpp_products(self.dtype, self.weight):
            return cpp.hidden_grad_product(grad, self.weight).to(dtype)
        total = grad.new_zeros((len(grad), self.weight.shape[1]), dtype=torch.float32)
        with matmul_inputs(self.dtype):
            for part, weight in self._slices():
                total.addmm_(grad[:, part], weight)
        return total.to(dtype)

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in fp32, slice by slice; a slice is overwritten by the next."""
        V, H = self.weight.shape
        if self.weight.dtype == torch.float32:  # oneDNN rounds while it reads
            yield slice(0, V), self.weight
            return
        if self._buffer is None:
            self._buffer = torch.empty((min(SLICE, V), H), dtype=torch.float32)
        for first in range(0, V, SLICE):
            part = slice(first, min(first + SLICE, V))
            rows = self._buffer[: part.stop - first]
            rows.copy_(self.weight[part])
            yield part, rows


def on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


_way: Bf16Way | None = None  # None: whichever is faster here, found out when it is first needed


def set_bf16_way(way: Bf16Way | None) -> Bf16Way | None:
    """Sets for the process how a CPU multiplies with a bf16 lm_head; None: whichever is faster. What was set before."""
    global _way
    before, _way = _way, way
    return before


@contextlib.contextmanager
def bf16_way(way: Bf16Way | None) -> Iterator[None]:
    """Within it a CPU multiplies with a bf16 lm_head this way: see `set_bf16_way`."""
    before = set_bf16_way(way)
    try:
        yield
    finally:
        set_bf16_way(before)


def bf16_ways(n: int, V: int, H: int) -> dict[Bf16Way, Callable[[], None]]:
    """The products of a chunk of n rows in each way that this CPU has, to be timed; fp32 is the first."""
    products = _products(torch.linspace(-1, 1, V * H).view(V, H).bfloat16(), n, torch.bfloat16)

    def multiply(way: Bf16Way) -> None:
        with bf16_way(way):
            products()

    ways: tuple[Bf16Way, ...] = ("fp32", "bf16") if row_operator.backend_module("cpp").has_products() else ("fp32",)
    return {way: functools.partial(multiply, way) for way in ways}


def trained_head(n: int, V: int, H: int) -> Callable[[], None]:
    """The products of a chunk of n rows with an fp32 lm_head where layers that train are rounded, to be timed."""
    has_products = row_operator.backend_module("cpp").has_products()
    products = _products(torch.linspace(-1, 1, V * H).view(V, H), n, torch.bfloat16 if has_products else torch.float32)

    def multiply() -> None:
        with bf16_way("bf16"):
            products()

    return multiply


def _products(weight: Tensor, n: int, dtype: torch.dtype) -> Callable[[], None]:
    """Forward, by the data and by the weight, of n rows."""
    V, H = weight.shape
    hidden, grad = torch.linspace(-1, 1, n * H).view(n, H).to(weight.dtype), torch.linspace(-1, 1, n * V).view(n, V)
    out, total, head = torch.empty(n, V), torch.empty(V, H), HeadProducts(weight, None, dtype)

    def multiply() -> None:
        head.logits(hidden, out)
        head.hidden_grad(grad, torch.float32)
        weight_grad_(total, grad, hidden, dtype, add=False)

    return multiply


@functools.cache
def _faster_way() -> Bf16Way:
    return faster(least_seconds(bf16_ways(64, 2048, 576), 0.1), "fp32")


def cpp_products(dtype: torch.dtype, weight: Tensor) -> Any:
    """The C++ backend, where it has the products of inputs rounded to `dtype` and these are faster; else None."""
    if dtype != torch.bfloat16 or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    cpp = row_operator.backend_module("cpp")
    return cpp if cpp.has_products() and (_way or _faster_way()) == "bf16" else None


def weight_grad_(total: Tensor, grad: Tensor, hidden: Tensor, dtype: torch.dtype, *, add: bool) -> None:
    """total [V, H] fp32 = gradᵀ [V, n] · hidden [n, H], or += where `add`; the factors rounded to `dtype`."""
    beta = int(add)
    if not on_cpu(total):
        if dtype == torch.float32:
            total.addmm_(grad.float().t(), hidden.float(), beta=beta)
        else:
            torch.addmm(total, grad.to(dtype).t(), hidden.to(dtype), beta=beta, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]
    elif cpp := cpp_products(dtype, total):
        cpp.weight_grad_product(grad, hidden, total, add)
    else:
        with matmul_inputs(dtype):
            total.addmm_(grad.t(), hidden.to(dtype).float(), beta=beta)


def _gpu_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == torch.float32:
        torch.mm(a.float(), b.float(), out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]
