"""The C++ backend of the fused losses: it gives the addresses of tensors to `pocl_fast._C`.

The row functions are those of `kernels/dense.py` and `kernels/sparse.py`. Here are also the bf16 products of a linear
loss, and the memory of large gradients.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pocl_fast import _C  # type: ignore[attr-defined]  # built from csrc/
from pocl_fast.loss.arguments import Settings, Tokens
from pocl_fast.loss.reference import Rows

DTYPES = {torch.float32: _C.DType.float32, torch.bfloat16: _C.DType.bfloat16, torch.float16: _C.DType.float16}


def distillation_rows(
    student: Tensor,  # [N, V_s] fp32, bf16 or fp16
    teacher: Tensor,  # [N, V_t], its own dtype
    tokens: Tokens,
    settings: Settings,
    *,
    needs_grad: bool,
    reduced: bool,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the scaled losses, [] fp32, or where not `reduced` each row's, [N]; stats [7, N] fp32; and the
    gradient [N, V_s] in the student's dtype, or [0]. The gradient is written to `grad` where that is given: of the
    student's shape and dtype, rows may be strided; it may be `student` itself."""
    call = _Call(student, tokens, settings, needs_grad, reduced, grad)
    _C.distillation_rows(teacher=_matrix(teacher), transforms=settings.transforms, **call.arguments())
    return call.loss, call.stats, call.grad


def has_products() -> bool:
    """Whether the bf16 products below can be computed here: see csrc/products/products.h."""
    return bool(_C.has_products())


def logits_product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [n, V] fp32 = hidden [n, H] · weightᵀ [H, V] + bias [V], the factors rounded to bf16."""
    hidden, weight = _packable(hidden), _packable(weight)
    bias = None if bias is None else bias.float().contiguous()
    _C.logits_product(
        _matrix(hidden), _matrix(weight), 0 if bias is None else bias.data_ptr(), _matrix(out), torch.get_num_threads()
    )


def hidden_grad_product(grad: Tensor, weight: Tensor) -> Tensor:
    """[n, H] fp32 = grad [n, V] · weight [V, H], the factors rounded to bf16."""
    grad, weight = _packable(grad), _packable(weight)
    out = torch.empty((len(grad), weight.shape[1]), dtype=torch.float32)
    _C.hidden_grad_product(_matrix(grad), _matrix(weight), _matrix(out), torch.get_num_threads())
    return out


def weight_grad_product(grad: Tensor, hidden: Tensor, total: Tensor, add: bool) -> None:
    """total [V, H] fp32 = gradᵀ [V, n] · hidden [n, H], or += where `add`; the factors rounded to bf16."""
    grad, hidden = _packable(grad), _packable(hidden)
    _C.weight_grad_product(_matrix(grad), _matrix(hidden), _matrix(total), add, torch.get_num_threads())


def _packable(x: Tensor) -> Tensor:
    """fp32 or bf16 with rows that lie together; the products round fp32 themselves."""
    x = x.float() if x.dtype == torch.float16 else x
    return x if x.stride(-1) == 1 else x.contiguous()


def sparse_distillation_rows(
    student: Tensor,  # [N, V] fp32, bf16 or fp16
    log_probs: Tensor,  # [N, K], its own dtype; −inf: no entry
    indices: Tensor,  # [N, K] int32 or int64, distinct in a row
    tokens: Tokens,
    settings: Settings,
    *,
    needs_grad: bool,
    reduced: bool,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `distillation_rows`, the teacher being K entries a row; `settings.tail` says what becomes of the others."""
    call = _Call(student, tokens, settings, needs_grad, reduced, grad)
    log_probs, indices = log_probs.float().contiguous(), indices.to(torch.int64).contiguous()  # exact, and small
    _C.sparse_distillation_rows(
        log_probs=log_probs.data_ptr(),
        indices=indices.data_ptr(),
        K=indices.shape[1],
        tail=settings.tail,
        transform=settings.transforms[:2],
        **call.arguments(),
    )
    return call.loss, call.stats, call.grad


class _Call:
    """What both row kernels are given and give; keeps alive the tensors whose addresses they see."""

    def __init__(
        self,
        student: Tensor,
        tokens: Tokens,
        settings: Settings,
        needs_grad: bool,
        reduced: bool,
        grad: Tensor | None,
    ) -> None:
        N, V = student.shape
        self.student, self.settings, self.needs_grad, self.reduced = student, settings, needs_grad, reduced
        self.loss = torch.empty(() if reduced else (N,), dtype=torch.float32)
        self.stats = torch.empty((len(Rows._fields), N), dtype=torch.float32)
        if grad is None:
            grad = empty_rows(N, V, student.dtype) if needs_grad else torch.empty(0, dtype=student.dtype)
        self.grad = grad
        self.labels = tokens.labels.to(torch.int64).contiguous()
        self.temperature, self.alpha = tokens.temperature.contiguous(), tokens.alpha.contiguous()
        self.row_scale = tokens.row_scale.contiguous()

    def arguments(self) -> dict[str, Any]:
        return {
            "student": _matrix(self.student),
            "gradient": _matrix(self.grad) if self.needs_grad else None,
            "labels": self.labels.data_ptr(),
            "temperature": self.temperature.data_ptr(),
            "temperatures": self.temperature.numel(),
            "alpha": self.alpha.data_ptr(),
            "alphas": self.alpha.numel(),
            "row_scale": self.row_scale.data_ptr(),
            "row_scales": self.row_scale.numel(),
            "stats": self.stats.data_ptr(),
            "loss": self.loss.data_ptr(),
            "reduced": self.reduced,
            "divergence": self.settings.divergence,
            "teacher_share": self.settings.teacher_share,
            "temperature_power": self.settings.temperature_power,
            "ignore_index": self.settings.ignore_index,
            "threads": torch.get_num_threads(),
        }


LARGE = 1 << 22  # bytes from which malloc maps fresh pages every time


def empty_rows(N: int, V: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised [N, V]. Large ones come from memory that is kept when the tensor is freed, at most four buffers:
    taking in fresh pages costs more than the loss itself. `release_buffers` gives them back to the system."""
    count = N * V
    if count * dtype.itemsize < LARGE:
        return torch.empty((N, V), dtype=dtype)
    return torch.frombuffer(_C.buffer(count * dtype.itemsize), dtype=dtype, count=count).view(N, V)


def release_buffers() -> int:
    """Frees the buffers that are kept for the next loss; how many bytes they had."""
    return int(_C.release_buffers())


def scale_rows_(grad: Tensor, upstream: Tensor) -> None:
    """Multiplies `grad` [N, V] in place by `upstream` [1] or [N]; touches no row whose factor is 1."""
    if upstream.numel() == 1:
        if (factor := upstream.item()) != 1:
            grad.mul_(factor)
        return
    if grad.dtype == torch.float32:
        if bool((upstream != 1).any()):
            grad.mul_(upstream[:, None])
        return
    start = 0
    for factor, run in groupby(upstream.tolist()):  # numbers: by a tensor of factors torch would copy halves to fp32
        end = start + len(list(run))
        if factor != 1:
            grad[start:end].mul_(factor)
        start = end


def _matrix(tensor: Tensor) -> _C.Matrix:
    return _C.Matrix(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.shape[0], tensor.shape[1], tensor.stride(0))
