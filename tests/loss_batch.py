"""A small batch for tests of the losses."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import Objective

N, V, H = 6, 83, 5
# of CPU tensors: Triton's too where it interprets its kernels
INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
FUSED = ["cpp", "triton"] if INTERPRETED else ["cpp"]
BACKENDS = [*FUSED, "reference"]


def some_logits() -> tuple[Tensor, Tensor, Tensor]:
    """The student's logits, the teacher's [N, V], and labels [N], one of them ignored."""
    labels = torch.randint(0, V, (N,))
    labels[1] = -100
    return torch.randn(N, V) * 3, torch.randn(N, V) * 3, labels


def some_step(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [N, H] and a head [V, H], both leaves; the teacher's logits and labels."""
    _, teacher, labels = some_logits()
    hidden = torch.randn(N, H).to(dtype).requires_grad_(True)
    head = torch.randn(V, H).to(dtype).requires_grad_(True)
    return hidden, head, teacher.to(dtype), labels


def gradient(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective | None = None, **options) -> Tensor:
    """Of the loss, summed where it is one a token, by the student's logits."""
    s = student.detach().requires_grad_(True)
    distillation_loss(s, teacher, labels, objective or Objective(alpha=0.3), **options).loss.sum().backward()
    assert s.grad is not None
    return s.grad
