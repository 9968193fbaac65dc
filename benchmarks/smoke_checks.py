"""What smoke_gpu.py checks of losses, products and kernels: each result against float64, on fresh random numbers.

A check is a function that gives `Figure`s: how far a result is from what it must be, and how far it may be. The float64
side is `reference.py` in plain torch, or a formula here. Knows nothing of processes (smoke_gpu.py) and of models
(smoke_models.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pocl_fast.loss import lm_head_products, row_operator
from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective
from pocl_fast.loss.output import LossOutput
from pocl_fast.loss.teacher_output import LinearTeacher, TopKTeacher

TEMPERATURE, ALPHA = 1.33, 0.3
IGNORED = -100
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# of a number of a token: some 20 roundings of fp32, of sums of V terms and of logarithms taken by 2^-22
FP32_SUMS = 3e-6
# the same where each logit is itself a sum of H products
FP32_LOGITS = 1e-5


class Absent(Exception):
    """Why a check cannot run here, which is no failure."""


@dataclass(frozen=True)
class Figure:
    """A result's distance from what it must be, relative in norm, and the most that it may be."""

    what: str
    error: float
    tolerance: float


@dataclass(frozen=True)
class Setting:
    """Where the checks run, and how large they are."""

    kind: str  # "cuda" or "cpu"
    N: int
    V: int  # a multiple of 16
    odd_V: int
    H: int

    @property
    def backend(self) -> Any:
        return "triton" if self.kind == "cuda" else "cpp"

    def needs_gpu(self, why: str) -> None:
        if self.kind != "cuda":
            raise Absent(why)


SETTINGS = {
    "cuda": Setting("cuda", N=64, V=151936, odd_V=50257, H=256),
    "cpu": Setting("cpu", N=12, V=1008, odd_V=517, H=64),
}
Check: TypeAlias = tuple[str, Callable[[], list[Figure]]]


def distance(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64, or the distance itself from a want of 0."""
    got, want = got.detach().to(want.device).double(), want.detach().double()
    off, size = float((got - want).norm()), float(want.norm())
    return off / size if size else off


def different(got: Tensor, want: Tensor) -> float:
    """How many elements differ in a bit that counts."""
    return float((got.detach() != want.detach()).sum())


def short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]


def rounding(dtype: torch.dtype) -> float:
    """The most that rounding to a dtype moves a number, and with it the norm of many."""
    return torch.finfo(dtype).eps / 2


def objective_of(family: str) -> Objective:
    return Objective(family, temperature=TEMPERATURE, alpha=ALPHA)  # type: ignore[arg-type]


def in_float64(x: Tensor) -> Tensor:
    """A leaf of its own."""
    return x.detach().double().requires_grad_(True)


def some_labels(setting: Setting, N: int, V: int) -> Tensor:
    """[N]; every third is ignored."""
    labels = torch.randint(0, V, (N,), device=setting.kind)
    labels[2::3] = IGNORED
    return labels


# ---- losses of logits ----


def some_logits(setting: Setting, dtype: torch.dtype, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher [N, V] and labels [N]. The first row has −inf logits on both sides, the teacher's second row
    is all −inf, and the third, which is ignored, holds a NaN."""
    student, teacher = (torch.randn(2, setting.N, V, device=setting.kind) * 3).to(dtype)
    labels = some_labels(setting, setting.N, V)
    student[0, ::2], teacher[0, ::3], teacher[1] = -torch.inf, -torch.inf, -torch.inf
    student[0, labels[0]] = 1.0
    student[2, 5] = torch.nan
    return student, teacher, labels


def off_the_kink(student: Tensor, teacher: Tensor) -> Tensor:
    """The teacher's logits, moved where p is nearer to q than fp32 knows either: total variation's gradient may take
    either side there."""
    out = student.isinf() | teacher.isinf()
    log_q, log_p = ((x.double() / TEMPERATURE).masked_fill(out, -torch.inf).log_softmax(-1) for x in (student, teacher))
    return torch.where((log_q - log_p).abs() < 1e-5, teacher + 0.1, teacher)


def compared(got: LossOutput, want: LossOutput, tolerance: float) -> list[Figure]:
    """The loss, and each number that is known of a token."""
    pairs = {"loss": (got.loss, want.loss)}
    pairs |= {name: (got.per_token[name], exact) for name, exact in want.per_token.items()}
    return [Figure(name, distance(*pair), tolerance) for name, pair in pairs.items()]


def dense(setting: Setting, family: str, dtype: torch.dtype, V: int) -> list[Figure]:
    student, teacher, labels = some_logits(setting, dtype, V)
    if family == "tvd":
        teacher = off_the_kink(student, teacher)
    return against_float64(setting, student, teacher, labels, objective_of(family))


def against_float64(
    setting: Setting, student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective, **options: Any
) -> list[Figure]:
    ours, exact = student.requires_grad_(True), in_float64(student)
    got = distillation_loss(ours, teacher, labels, objective, backend=setting.backend, **options)
    want = distillation_loss(exact, teacher.double(), labels, objective, backend="reference", **options)
    got.loss.backward()
    want.loss.backward()
    # computed in fp32 and rounded once; in fp32 the log-ratios are known to 1e-6, of which small differences remain
    tolerance = 1e-5 if student.dtype == FP32 else rounding(student.dtype) + 1e-5
    return [*compared(got, want, FP32_SUMS), Figure("gradient", distance(ours.grad, exact.grad), tolerance)]


def near_models(setting: Setting, family: str) -> list[Figure]:
    """A student a small step away from its teacher, in fp32: the divergence is in digits that its terms have lost."""
    step = 1e-2
    teacher = torch.randn(setting.N, setting.V, device=setting.kind) * 3
    student = (teacher + step * torch.randn_like(teacher)).requires_grad_(True)
    labels, objective = some_labels(setting, setting.N, setting.V), Objective(family)  # type: ignore[arg-type]
    exact = in_float64(student)
    got = distillation_loss(student, teacher, labels, objective, backend=setting.backend)
    want = distillation_loss(exact, teacher.double(), labels, objective, backend="reference")
    got.loss.backward()
    want.loss.backward()
    # a log-ratio is known to 1e-6: total variation keeps that over the step, the others its square or its average
    by_token = "divergence"
    figure = distance(got.per_token[by_token], want.per_token[by_token])
    if family == "tvd":  # its gradient changes its sign within rounding somewhere
        return [Figure(by_token, figure, 1e-6 / step)]
    return [Figure(by_token, figure, 1e-5), Figure("gradient", distance(student.grad, exact.grad), 2e-6 / step)]


def in_place(setting: Setting, family: str) -> list[Figure]:
    student, teacher, labels = some_logits(setting, BF16, setting.V)
    results = []
    for inplace in (False, True):
        leaf = student.detach().requires_grad_(True)
        out = distillation_loss(
            leaf.clone(), teacher, labels, objective_of(family), inplace=inplace, backend=setting.backend
        )
        out.loss.backward()
        results.append((out.loss, leaf.grad))
    (loss, gradient), (loss_over, over) = results
    return [
        Figure("loss, elements that differ", different(loss_over, loss), 0.0),
        Figure("gradient, elements that differ", different(over, gradient), 0.0),
    ]


def transformed(setting: Setting, family: str) -> list[Figure]:
    """Scale and softcap on both sides, and a teacher with another vocabulary."""
    student, teacher, labels = some_logits(setting, BF16, setting.V)
    options = {"logit_scale": 0.5, "logit_softcap": 30.0, "teacher_logit_scale": 2.0, "teacher_logit_softcap": 20.0}
    return against_float64(setting, student, teacher[:, : setting.V - 271], labels, objective_of(family), **options)


# ---- losses of hidden states ----


def some_head(setting: Setting, V: int, H: int) -> Tensor:
    """[V, H], bf16; the logits of normal hidden states have a spread of 3."""
    return (torch.randn(V, H, device=setting.kind) * 3 * H**-0.5).to(BF16)


def linear(setting: Setting, family: str) -> list[Figure]:
    """Both sides' hidden states in bf16, so fp32 logits and a bf16 gradient; three chunks, the last one shorter."""
    N, V, H = setting.N, setting.V, setting.H
    hidden, teacher_hidden = (torch.randn(N, size, device=setting.kind).to(BF16) for size in (H, H + 64))
    teacher = LinearTeacher(teacher_hidden, some_head(setting, V, H + 64))
    return linear_against_float64(setting, hidden, some_head(setting, V, H), teacher, objective_of(family))


def linear_against_float64(
    setting: Setting, hidden: Tensor, weight: Tensor, teacher: LinearTeacher | TopKTeacher, objective: Objective
) -> list[Figure]:
    N = len(hidden)
    labels = some_labels(setting, N, len(weight))
    leaves, exact_leaves = [x.requires_grad_(True) for x in (hidden, weight)], [in_float64(x) for x in (hidden, weight)]
    if isinstance(teacher, LinearTeacher):
        exact = replace(teacher, hidden=teacher.hidden.double(), weight=teacher.weight.double())
    else:
        exact = replace(teacher, log_probs=teacher.log_probs.double())  # type: ignore[assignment]
    got = linear_distillation_loss(
        *leaves, teacher, labels, objective, chunk_tokens=N * 2 // 5, backend=setting.backend
    )
    want = linear_distillation_loss(*exact_leaves, exact, labels, objective, backend="reference")
    got.loss.backward()
    want.loss.backward()
    # the gradient by the logits is rounded on its way into the products, and their results once more
    tolerance = 2**0.5 * rounding(BF16)
    names = ("gradient by hidden", "gradient by weight")
    pairs = zip(names, leaves, exact_leaves, strict=True)
    return [
        *compared(got, want, FP32_LOGITS),
        *(Figure(name, distance(x.grad, y.grad), tolerance) for name, x, y in pairs),
    ]


# ---- sparse teachers ----


def some_top_k(setting: Setting, tail: Any) -> TopKTeacher:
    """The 64 best of each row, in random order."""
    log_probs, indices = torch.randn(setting.N, setting.V, device=setting.kind).mul(3).log_softmax(-1).topk(64)
    order = torch.randperm(64, device=setting.kind)
    return TopKTeacher(log_probs[:, order].contiguous(), indices[:, order].contiguous(), tail)


def sparse(setting: Setting, family: str, tail: str) -> list[Figure]:
    teacher = some_top_k(setting, tail)
    student, _, labels = some_logits(setting, BF16, setting.V)
    labels[0] = teacher.indices[0, 0]  # one that is listed
    student[0, labels[0]] = 1.0
    ours, exact = student.requires_grad_(True), in_float64(student)
    got = distillation_loss(ours, teacher, labels, objective_of(family), backend=setting.backend)
    exact_teacher = replace(teacher, log_probs=teacher.log_probs.double())
    want = distillation_loss(exact, exact_teacher, labels, objective_of(family), backend="reference")
    got.loss.backward()
    want.loss.backward()
    return [*compared(got, want, FP32_SUMS), Figure("gradient", distance(ours.grad, exact.grad), rounding(BF16) + 1e-5)]


def linear_sparse(setting: Setting, family: str, tail: str) -> list[Figure]:
    hidden = torch.randn(setting.N, setting.H, device=setting.kind).to(BF16)
    head = some_head(setting, setting.V, setting.H)
    return linear_against_float64(setting, hidden, head, some_top_k(setting, tail), objective_of(family))


# ---- products ----


def product_tolerance(K: int) -> float:
    """Of a sum of K products in fp32: a tensor core cuts off what is below fp32 after each 16 of them."""
    return max(1e-5, K / 16 * 2**-23)


def matrices(setting: Setting, n: int, V: int, H: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [n, H], an lm_head [V, H], and a gradient by logits [n, V]."""
    shapes = ((n, H), (V, H), (n, V))
    return tuple(torch.randn(*shape, device=setting.kind).to(dtype) for shape in shapes)  # type: ignore[return-value]


def sizes(setting: Setting) -> tuple[int, int, int]:
    """Of the products: n, V, H."""
    return (256, 16384, 1024) if setting.kind == "cuda" else (24, 400, 64)


def logits_product(setting: Setting, dtype: torch.dtype) -> list[Figure]:
    """`_gpu_mm`: fp32 results of factors in `dtype`, exact as those of fp32 sums."""
    if dtype != FP32:
        setting.needs_gpu("torch multiplies bf16 and fp16 into fp32 on a GPU alone; Head.logits is checked below")
    hidden, weight, _ = matrices(setting, *sizes(setting), dtype)
    out = torch.full((len(hidden), len(weight)), torch.nan, device=setting.kind)
    lm_head_products._gpu_mm(hidden, weight.t(), out)
    want = hidden.double() @ weight.double().t()
    return [Figure("logits", distance(out, want), product_tolerance(hidden.shape[1]))]


def head_products(setting: Setting, dtype: torch.dtype, given: torch.dtype) -> list[Figure]:
    """`Head` and `weight_grad_`: factors given in another dtype are rounded to `dtype` first, as under autocast."""
    n, V, H = sizes(setting)
    hidden, weight, grad = matrices(setting, n, V, H, given)
    grad, bias = grad.float(), torch.randn(V, device=setting.kind)
    h, w, g = (x.to(dtype).double() for x in (hidden, weight, grad))
    head = lm_head_products.HeadProducts(weight, bias, dtype)
    logits = torch.full((n, V), torch.nan, device=setting.kind)
    head.logits(hidden, logits)
    figures = [Figure("logits", distance(logits, h @ w.t() + bias.double()), product_tolerance(H))]
    for result in dict.fromkeys((dtype, FP32)):
        # to the inputs' own dtype it is rounded once
        tolerance = product_tolerance(V) + (rounding(dtype) if result == dtype != FP32 else 0.0)
        got = head.hidden_grad(grad, result)
        figures.append(Figure(f"hidden_grad in {short(result)}", distance(got, g @ w), tolerance))
    first = torch.randn(V, H, device=setting.kind)
    for add in (False, True):
        total = first.clone() if add else torch.full_like(first, torch.nan)  # unwritten memory may hold anything
        lm_head_products.weight_grad_(total, grad, hidden, dtype, add=add)
        want = g.t() @ h + (first.double() if add else 0.0)
        figures.append(Figure(f"weight_grad_, add={add}", distance(total, want), product_tolerance(n)))
    return figures


def scaled_rows(setting: Setting, dtype: torch.dtype) -> list[Figure]:
    """`scale_rows_` with one factor, with 1, and with one a row; rows that lie apart."""
    scale_rows_ = row_operator.backend_module(setting.backend).scale_rows_
    figures = []
    whole = torch.randn(setting.N, setting.odd_V + 15, device=setting.kind).to(dtype)
    for name, factor in (
        ("1", torch.ones(1, device=setting.kind)),
        ("-2.7", torch.full((1,), -2.7, device=setting.kind)),
        ("0", torch.zeros(1, device=setting.kind)),
        ("one a row", torch.randn(setting.N, device=setting.kind).index_fill(0, torch.tensor(1).to(setting.kind), 1.0)),
    ):
        for V in (setting.odd_V, whole.shape[1]):
            memory = whole.clone()
            scale_rows_(memory[:, :V], factor)
            want = whole[:, :V].double() * factor.double()[:, None]
            figures.append(Figure(f"factor {name}, {V} columns", distance(memory[:, :V], want), rounding(dtype)))
            ones = (factor == 1).expand(setting.N)
            same = different(memory[ones], whole[ones]) + different(memory[:, V:], whole[:, V:])
            figures.append(Figure(f"factor {name}, {V} columns: changed and must not", same, 0.0))
    return figures


# ---- the jobs ----


def divergence_checks(setting: Setting, family: str) -> list[Check]:
    """All that is compiled for one family."""
    checks: list[Check] = [
        (f"dense {short(dtype)}, V {V}", partial(dense, setting, family, dtype, V))
        for dtype in (BF16, FP32)
        for V in (setting.V, setting.odd_V)
    ]
    return [
        *checks,
        ("dense fp32, near models", partial(near_models, setting, family)),
        ("in place", partial(in_place, setting, family)),
        ("linear bf16", partial(linear, setting, family)),
    ]


def sparse_checks(setting: Setting, family: str) -> list[Check]:
    return [
        ("dense bf16, bucket", partial(sparse, setting, family, "bucket")),
        ("dense bf16, renormalise", partial(sparse, setting, family, "renormalise")),
        ("linear bf16, bucket", partial(linear_sparse, setting, family, "bucket")),
    ]


def product_checks(setting: Setting) -> list[Check]:
    dtypes = (BF16, FP16, FP32)
    checks: list[Check] = [(f"_gpu_mm {short(dtype)}", partial(logits_product, setting, dtype)) for dtype in dtypes]
    pairs = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP16, BF16)]
    return checks + [
        (f"Head {short(dtype)}, given {short(given)}", partial(head_products, setting, dtype, given))
        for dtype, given in pairs
    ]


def jobs(setting: Setting) -> dict[str, Callable[[], list[Check]]]:
    """The checks by the process they share, those that take longest to compile first."""
    slow_first = sorted(DIVERGENCES, key=lambda family: (family.endswith("_kl") and "skew" not in family, family))
    made: dict[str, Callable[[], list[Check]]] = {
        family: partial(divergence_checks, setting, family) for family in slow_first
    }
    made |= {f"sparse {family}": partial(sparse_checks, setting, family) for family in ("jsd", "forward_kl")}
    made["transforms"] = lambda: [(f, partial(transformed, setting, f)) for f in ("jsd", "forward_kl")]
    made["products"] = partial(product_checks, setting)
    made["scale_rows"] = lambda: [(short(dtype), partial(scaled_rows, setting, dtype)) for dtype in (BF16, FP16, FP32)]
    return made
