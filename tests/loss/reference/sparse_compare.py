"""What the tests of the sparse teacher share: random entries, a backend's run, and the reference's in float64."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from compare import GRADIENT_TOLERANCE, relative_error
from torch import Tensor

from pocl_fast.loss import reference
from pocl_fast.loss.arguments import Settings, Tokens

IDENTITY = (1.0, 0.0)


class Case(NamedTuple):
    """The tensors of a call."""

    student: Tensor
    log_probs: Tensor
    indices: Tensor
    labels: Tensor
    temperature: Tensor
    alpha: Tensor
    row_scale: Tensor


def case(
    N: int, V: int, K: int, dtype: torch.dtype = torch.float32, temperature: float = 1.0, alpha: float = 0.3
) -> Case:
    """A student and the K best of a teacher in random order. The last label is ignored, the first is a listed entry."""
    student, teacher = (torch.randn(N, V) * 3).to(dtype), torch.randn(N, V) * 3
    log_probs, indices = torch.log_softmax(teacher, -1).topk(K)
    order = torch.randperm(K)
    labels = torch.randint(0, V, (N,))
    if N > 1:
        labels[0], labels[-1] = indices[0, 0], -100
    return Case(
        student,
        log_probs[:, order].contiguous(),
        indices[:, order].contiguous(),
        labels,
        torch.tensor([temperature]),
        torch.tensor([alpha]),
        torch.rand(N) + 0.5,
    )


def settings_of(divergence: str, tail: str, transform: tuple[float, float] = IDENTITY, **changes: Any) -> Settings:
    return Settings(divergence, 0.3, 2, -100, [*transform, *IDENTITY], tail)._replace(**changes)


def rows_of(backend: str) -> Any:
    """The function of a backend that `row_operator.py` calls."""
    name = "pocl_fast.loss.cpp" if backend == "cpp" else "pocl_fast.kernels.sparse"
    return importlib.import_module(name).sparse_distillation_rows


def run(
    backend: str,
    arguments: Case,
    divergence: str,
    tail: str,
    *,
    needs_grad: bool = True,
    grad: Tensor | None = None,
    **changes: Any,
) -> tuple[Tensor, Tensor]:
    """Stats and gradient of a backend, whose scaled losses must be those of the stats."""
    student, log_probs, indices, *tokens = arguments
    settings = settings_of(divergence, tail, **changes)
    loss, stats, gradient = rows_of(backend)(
        student, log_probs, indices, Tokens(*tokens), settings, needs_grad=needs_grad, reduced=False, grad=grad
    )
    scaled = torch.where(arguments.labels == -100, 0.0, arguments.row_scale * stats[0])
    torch.testing.assert_close(loss, scaled, rtol=1e-6, atol=0.0, equal_nan=True)
    return stats, gradient


def exact(arguments: Case, divergence: str, tail: str, **changes: Any) -> tuple[Tensor, Tensor]:
    """Stats and gradient of the reference in float64."""
    student, log_probs, indices, labels, *values = arguments
    tokens = Tokens(labels, *(value.double() for value in values))
    s = student.detach().double().requires_grad_(True)
    settings = settings_of(divergence, tail, **changes)
    rows = reference.sparse_distillation_rows(s, log_probs.double(), indices, tokens, settings)
    (rows.loss * torch.where(labels == -100, 0.0, tokens.row_scale)).sum().backward()
    assert s.grad is not None
    return torch.stack([value.detach() for value in rows]), s.grad


def assert_matches(backend: str, arguments: Case, divergence: str, tail: str, **options: Any) -> None:
    """Every number of every token, and the gradient, agree to the dtype's rounding."""
    stats, gradient = run(backend, arguments, divergence, tail, **options)
    want, exact_gradient = exact(arguments, divergence, tail, **options)
    assert gradient.dtype == arguments.student.dtype
    assert gradient.shape == arguments.student.shape
    for name, got_row, want_row in zip(reference.Rows._fields, stats.double(), want, strict=True):
        # a term is a sum of numbers as large as the logits: where it is near 0 it keeps their absolute rounding
        torch.testing.assert_close(got_row, want_row, rtol=2e-6, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")
    unit = 2**-24 if arguments.student.dtype == torch.float16 else 0.0
    assert relative_error(gradient, exact_gradient, unit) <= GRADIENT_TOLERANCE[arguments.student.dtype]
