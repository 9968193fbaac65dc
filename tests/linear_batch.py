"""A small batch for tests of the fused linear loss."""

from __future__ import annotations

import torch

from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.teacher_output import LinearTeacher

N, V, H, H_T = 7, 83, 12, 9
OBJECTIVE = Objective(temperature=1.3, alpha=0.3)


class Batch:
    """Hidden states and an lm_head, both leaves, a teacher, and labels of which two are ignored."""

    def __init__(self, dtype=torch.float32, N=N, V=V, H=H):
        self.hidden = torch.randn(N, H).to(dtype).requires_grad_(True)
        self.weight = torch.randn(V, H).to(dtype).requires_grad_(True)
        self.bias = torch.randn(V).to(dtype).requires_grad_(True)
        self.teacher = LinearTeacher(torch.randn(N, H_T).to(dtype), torch.randn(V, H_T).to(dtype))
        self.labels = torch.randint(0, V, (N,))
        self.labels[1] = self.labels[4] = -100

    def loss(self, **changes):
        arguments = {
            "student_hidden": self.hidden,
            "student_weight": self.weight,
            "teacher": self.teacher,
            "labels": self.labels,
            "objective": OBJECTIVE,
            "student_bias": self.bias,
        }
        return linear_distillation_loss(**(arguments | changes))

    def leaves(self):
        return self.hidden, self.weight, self.bias

    def gradients(self, **changes):
        return torch.autograd.grad(self.loss(**changes).loss.sum(), self.leaves())


def assert_close(got, want, **tolerances) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerances)
