"""Random batches for the C++ backend: shapes, layouts, dtypes, objectives, and rows of every awkward kind.

Hypothesis prints the batch that fails, its seed included.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from unittest import mock

import torch
from compare import log_softmaxes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pocl_fast import _C
from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, SCALINGS, Objective

# of a gradient's elements, relative: twice to the dtype, for backward multiplies what forward has rounded
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-24}

# what a row of logits may look like, [V] from a standard normal one
KINDS = {
    "usual": lambda x: 3 * x,
    "near 0": lambda x: 1e-4 * x,
    "large": lambda x: 40 * x,
    "huge": lambda x: 1e4 * x.clamp(-3, 3),
    "far from 0": lambda x: 3 * x - 200,
    "equal": lambda x: torch.full_like(x, 1.5),
    "one-hot": lambda x: torch.where(torch.arange(len(x)) == len(x) // 2, 500.0, 0.0),
    "some -inf": lambda x: torch.where(x < -0.8, -torch.inf, 3 * x),
    "most -inf": lambda x: torch.where(x < 1.5, -torch.inf, 3 * x),
    "all -inf": lambda x: torch.full_like(x, -torch.inf),
    "lowest": lambda x: torch.where(torch.arange(len(x)) % 3 == 1, torch.finfo(torch.float32).min, 3 * x),
    "a NaN": lambda x: torch.where(torch.arange(len(x)) == len(x) // 3, torch.nan, 3 * x),
    "a +inf": lambda x: torch.where(torch.arange(len(x)) == len(x) - 1, torch.inf, 3 * x),
}
LAYOUTS = ("whole", "wider", "every second", "odd address")


@dataclass(frozen=True)
class Batch:
    """What is drawn. A row is ((kind of the student's logits, kind of the teacher's), whether its label is ignored)."""

    seed: int
    rows: list[tuple[tuple[str, str], bool]]
    V: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    layouts: tuple[str, str]
    objective: Objective
    values_per_token: bool
    int32_labels: bool
    inplace: bool
    isa: str

    def side(self, side: int) -> Tensor:
        """[N, V] of one side in its dtype and layout."""
        N, V, dtype = len(self.rows), self.V[side], self.dtypes[side]
        normal = torch.randn(N, V)
        rows = [KINDS[kinds[side]](normal[n]) for n, (kinds, _) in enumerate(self.rows)]
        values = torch.stack(rows) if rows else normal
        largest = torch.finfo(dtype).max
        values = torch.where(values.isinf(), values, values.clamp(-largest, largest)).to(dtype)
        return self.place(side).copy_(values)

    def place(self, side: int) -> Tensor:
        """Memory for one side."""
        N, V, dtype = len(self.rows), self.V[side], self.dtypes[side]
        places = {
            "whole": lambda: torch.empty(N, V, dtype=dtype),
            "wider": lambda: torch.empty(N, V + 37, dtype=dtype)[:, 3 : V + 3],
            "every second": lambda: torch.empty(2 * N, V, dtype=dtype)[::2],
            "odd address": lambda: torch.empty(N * V + 1, dtype=dtype)[1:].view(N, V),
        }
        return places[self.layouts[side]]()

    def labels(self, student: Tensor) -> Tensor:
        """Of the tokens a model may take: none whose logit is a mask, where there is another."""
        likely = torch.where(student.float() > -1e30, torch.rand(student.shape) + 1, torch.rand(student.shape))
        labels = likely.argmax(-1)
        ignored = torch.tensor([row[1] for row in self.rows], dtype=torch.bool)
        return torch.where(ignored, -100, labels).to(torch.int32 if self.int32_labels else torch.int64)


@st.composite
def batches(draw):
    V_s = draw(st.integers(1, 20) | st.integers(1, 300) | st.sampled_from([2047, 2048, 2049, 4097]))
    V_t = draw(st.just(V_s) | st.integers(1, 300) | st.integers(V_s, V_s + 5))
    kinds = st.sampled_from([kind for kind in KINDS if kind != "lowest"]) | st.just("usual")
    # a mask of the lowest number costs its size where the other side has none: 1e38 nats, more or less
    pairs = st.tuples(kinds, kinds) | st.just(("lowest", "lowest"))
    dtypes = st.sampled_from(list(ROUNDING))
    student = draw(dtypes)
    return Batch(
        seed=draw(st.integers(0, 2**31 - 1)),
        rows=draw(st.lists(st.tuples(pairs, st.sampled_from([False, False, True])), max_size=9)),
        V=(V_s, V_t),
        dtypes=(student, draw(st.just(student) | dtypes)),
        layouts=(draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        objective=Objective(
            draw(st.sampled_from(DIVERGENCES)),
            temperature=draw(st.sampled_from([1.0, 2.0]) | st.floats(0.25, 4.0)),
            alpha=draw(st.sampled_from([0.0, 1.0]) | st.floats(0.0, 1.0)),
            beta=draw(st.floats(0.02, 0.98)),
            skew=draw(st.floats(0.02, 0.98)),
            temperature_scaling=draw(st.sampled_from(SCALINGS)),
        ),
        values_per_token=draw(st.booleans()),
        int32_labels=draw(st.booleans()),
        inplace=draw(st.booleans()),
        isa=draw(st.sampled_from(_C.supported_isas())),
    )


@given(batches())
@settings(max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch_matches(batch):
    torch.manual_seed(batch.seed)
    N = len(batch.rows)
    student, teacher = batch.side(0), batch.side(1)
    labels = batch.labels(student)
    tau, alpha = torch.tensor(batch.objective.temperature), torch.tensor(batch.objective.alpha)
    if batch.values_per_token:
        tau, alpha = tau * (1 + torch.rand(N)), alpha * torch.rand(N)
    weights, upstream = torch.rand(N), torch.rand(N) + 0.5

    results = []
    for backend, exact in (("cpp", False), ("reference", True)):
        s, t, temperature, a, w, u = (
            x.double() if exact else x for x in (student, teacher, tau, alpha, weights, upstream)
        )
        objective = replace(batch.objective, temperature=temperature, alpha=a)
        s = s.detach().requires_grad_(True)
        # over a copy in the same layout, for over a leaf none is written
        x = s if exact or not batch.inplace else batch.place(0).copy_(s)
        options = {"token_weights": w, "reduction": "none", "inplace": batch.inplace and not exact}
        with mock.patch.dict(os.environ, POCL_FAST_ISA=batch.isa):
            out = distillation_loss(x, t, labels, objective, backend=backend, **options)
            out.loss.backward(u)
        results += [out, s.grad]
    got, gradient, want, exact = results

    # rows with a NaN or +inf that the loss looks at are NaN, and nothing else is said of them
    bad = want.loss.isnan()
    assert torch.equal(got.loss.isnan(), bad)
    assert torch.equal(gradient[labels == -100], torch.zeros_like(gradient[labels == -100]))

    allowed = allowances(batch, student, teacher, tau)
    scale = torch.maximum(tau.double() ** batch.objective.temperature_power, torch.ones(()))
    assert_within(got.loss, want.loss, allowed * scale, bad)
    for name in ("ce", "divergence", "student_entropy", "teacher_entropy"):
        assert_within(got.per_token[name], want.per_token[name], allowed, bad)
    for name in ("accuracy", "agreement"):
        assert torch.equal(got.per_token[name][~bad].double(), want.per_token[name][~bad])

    weight = (weights * upstream).double() * torch.maximum(scale / tau, torch.ones(()))
    dtype = batch.dtypes[0]
    error = (gradient.double() - exact).norm(dim=-1)
    rounding = ROUNDING[dtype] * exact.norm(dim=-1) + 2 * SMALLEST[dtype] * batch.V[0] ** 0.5
    # reverse KL's gradient keeps of log-ratios only their differences, small ones where one token holds nearly all of q
    within = error <= rounding + weight * (5 * allowed + ties(batch, student, teacher, tau))
    assert within[~bad].all(), (error, rounding, weight, allowed)


def assert_within(got: Tensor, want: Tensor, allowed: Tensor, bad: Tensor) -> None:
    got = got.double()
    within = (got == want) | ((got - want).abs() <= 3e-6 * want.abs() + allowed)
    assert within[~bad].all(), (got, want)


def allowances(batch: Batch, student: Tensor, teacher: Tensor, tau: Tensor) -> Tensor:
    """[N]: what rounding logits over the temperature, and numbers of their size, to fp32 costs their sums; nats."""
    sizes = []
    for x in (student.double(), teacher.double()):
        x = torch.where(x.isfinite() & (x > -1e30), x, 0.0)
        sizes.append(x.abs().amax(-1))
    size = torch.maximum(*sizes) * torch.maximum(1 / tau.double(), torch.ones(()))
    return 3e-6 * torch.maximum(torch.ones(()), size / 10)


def ties(batch: Batch, student: Tensor, teacher: Tensor, tau: Tensor) -> Tensor:
    """[N]: how far TVD's gradient moves when entries where p and q are nearly equal fall on the other side."""
    if batch.objective.divergence != "tvd":
        return torch.zeros(len(student), dtype=torch.float64)
    out, log_q, log_p = log_softmaxes(student, teacher, tau)
    near = ~out & ((log_q - log_p).abs() <= 10 * allowances(batch, student, teacher, tau)[:, None])
    return 2 * torch.where(near, log_q.exp(), 0.0).sum(-1).nan_to_num()
