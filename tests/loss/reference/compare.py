"""One comparison for every kernel test: a backend's loss, metrics and gradient against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from precise import relative_error
from torch import Tensor

from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.output import LossOutput
from pocl_fast.loss.reference import transformed

# of a gradient's norm: the rounding of each element to the student's dtype, in fp16 twice; in fp32 that of the
# log-ratios, about 1e-6, of which reverse KL's gradient keeps only the differences: small ones where one token holds
# nearly all of q
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def both(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    objective: Objective,
    *,
    backend: str,
    upstream: Any = None,
    **options: Any,
) -> tuple[LossOutput, Tensor, LossOutput, Tensor]:
    """The backend's output and gradient, then the float64 reference's."""
    exact = replace(objective, temperature=in_float64(objective.temperature), alpha=in_float64(objective.alpha))
    results: list[Any] = []
    for s, t, o, side in (
        (student, teacher, objective, backend),
        (student.double(), teacher.double(), exact, "reference"),
    ):
        s = s.detach().requires_grad_(True)
        out = distillation_loss(s, t, labels, o, backend=side, **options)  # type: ignore[arg-type]
        (out.loss if upstream is None else out.loss * upstream).sum().backward()
        assert s.grad is not None
        results += [out, s.grad]
    return results[0], results[1], results[2], results[3]


def log_softmaxes(student: Tensor, teacher: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries of the shared vocabulary one side or both give no mass, [N, V]; log q and log p, in float64."""
    V = min(student.shape[-1], teacher.shape[-1])
    s, t = student[:, :V].double(), teacher[:, :V].double()
    out = (s == -torch.inf) | (t == -torch.inf)
    log_q, log_p = (torch.log_softmax(x / tau.double().reshape(-1, 1), -1) for x in (s, t))
    return out, log_q, log_p


def off_the_kink(student: Tensor, teacher: Tensor, objective: Objective, options: dict[str, Any]) -> Tensor:
    """The teacher's logits, moved where p is nearer to q than fp32 knows either: total variation's gradient may take
    either side there. In about every hundredth batch of three rows of 50257 one has the weight to be seen."""
    sides = [
        transformed(x.double(), options.get(f"{side}logit_scale", 1.0), options.get(f"{side}logit_softcap") or 0.0)
        for x, side in ((student, ""), (teacher, "teacher_"))
    ]
    _, log_q, log_p = log_softmaxes(*sides, torch.as_tensor(objective.temperature, dtype=torch.float64))
    near = (log_q - log_p).abs() < 1e-5
    near &= near.double().mean(-1, keepdim=True) < 0.1  # a row of equals stays one
    if not near.any():
        return teacher  # with its strides
    V = near.shape[-1]
    return torch.cat([teacher[:, :V] + 0.1 * near.to(teacher.dtype), teacher[:, V:]], 1)


def assert_matches(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective, **options: Any) -> None:
    """Loss, every metric of every token and the gradient agree to the dtype's rounding."""
    if objective.divergence == "tvd" and student.dtype == torch.float32:
        teacher = off_the_kink(student, teacher, objective, options)
    got, gradient, want, exact_gradient = both(student, teacher, labels, objective, **options)
    assert gradient.dtype == student.dtype
    assert gradient.shape == student.shape
    assert got.num_tokens == want.num_tokens
    # a loss of close rows is small beside the logits it was taken from, whose rounding it keeps
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=2e-6, atol=1e-7)
    for name, exact in want.per_token.items():
        # a term is a sum of numbers as large as the logits: where it is near 0 it keeps their absolute rounding
        torch.testing.assert_close(
            got.per_token[name].double(), exact, rtol=2e-6, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    unit = 2**-24 if student.dtype == torch.float16 else 0.0
    assert relative_error(gradient, exact_gradient, unit) <= GRADIENT_TOLERANCE[student.dtype]


def logits(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> Tensor:
    return (torch.randn(shape) * spread).to(dtype)


def some_labels(N: int, V: int, ignored: bool = True) -> Tensor:
    """Random labels; every third is ignored."""
    labels = torch.randint(0, V, (N,))
    if ignored:
        labels[2::3] = -100
    return labels
