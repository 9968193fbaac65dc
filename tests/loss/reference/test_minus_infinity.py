"""A logit of −inf is probability 0, on its own side alone: the reference against sums by hand, the kernels against it.

The sums by hand are of probabilities, term by term, and their gradient by the rule (q/τ)(u − Σ q u), u = ∂D/∂q.
"""

import math
from dataclasses import replace

import pytest
import torch
from compare import GRADIENT_TOLERANCE, assert_matches, both, logits, relative_error
from sparse_compare import Case, case, exact
from sparse_compare import assert_matches as assert_sparse_matches

from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective
from pocl_fast.loss.teacher_output import TAILS, DenseTeacher, LinearTeacher, TopKTeacher

INF = math.inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def top_p(x, mass=0.8):
    """−inf outside the most likely entries that hold `mass`."""
    p, order = torch.softmax(x.float(), -1).sort(-1, descending=True)
    keep = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p < mass)
    return x.masked_fill(~keep, -INF)


def top_k(x, k):
    return x.masked_fill(x < x.topk(k, -1).values[..., -1:], -INF)


def alternate(x, first):
    return x.masked_fill(torch.arange(x.shape[-1]) % 2 != first, -INF)


def only(x, v):
    return x.masked_fill(torch.arange(x.shape[-1]) != v, -INF)


# of [V] student and teacher logits: what decoding's filters and masks make of them
PAIRS = {
    "no -inf": lambda s, t: (s, t),
    "top-p teacher": lambda s, t: (s, top_p(t)),
    "top-p teacher of nearly all": lambda s, t: (s, top_p(t, 0.9999)),
    "top-k teacher": lambda s, t: (s, top_k(t, 3)),
    "top-k student": lambda s, t: (top_k(s, 3), t),
    "top-p student": lambda s, t: (top_p(s, 0.95), t),
    "both filtered": lambda s, t: (top_k(s, len(s) // 2), top_p(t, 0.9)),
    "both alike": lambda s, t: (alternate(s, 0), alternate(t, 0)),
    "nothing in common": lambda s, t: (alternate(s, 0), alternate(t, 1)),
    "student -inf": lambda s, t: (torch.full_like(s, -INF), top_p(t)),
    "teacher -inf": lambda s, t: (top_k(s, 5), torch.full_like(t, -INF)),
    "both -inf": lambda s, t: (torch.full_like(s, -INF), torch.full_like(t, -INF)),
    "one entry of the teacher": lambda s, t: (s, only(t, len(t) // 2)),
    "one entry of the student": lambda s, t: (only(s, len(s) // 2), t),
    "the same entry": lambda s, t: (only(s, 1), only(t, 1)),
    "close, one gone": lambda s, t: (s, (s + 1e-3 * t).masked_fill(torch.arange(len(s)) == 7, -INF)),
    "close, one of the student gone": lambda s, t: (s.masked_fill(torch.arange(len(s)) == 7, -INF), s + 1e-3 * t),
    "the teacher's best gone": lambda s, t: (s.masked_fill(t == t.max(), -INF), t + 20 * (t == t.max())),
    "the student's best gone": lambda s, t: (s + 20 * (s == s.max()), t.masked_fill(s == s.max(), -INF)),
    "underflow and -inf": lambda s, t: (alternate(40 * s, 0), 40 * t),
}


def pairs(names, V, dtype=torch.float32):
    """A row of each pair, and labels of entries that the student has, where it has any."""
    student, teacher = logits(len(names), V).to(dtype), logits(len(names), V).to(dtype)
    for n, name in enumerate(names):
        s, t = PAIRS[name](student[n], teacher[n])
        student[n], teacher[n] = s, t
    return student, teacher, (torch.rand(student.shape) + student.isfinite()).argmax(-1)


def some(backend, of, every):
    """All of them; for Triton's interpreter, to which a row is half a second, one of so many."""
    interpreted = backend == "triton" and not torch.cuda.is_available()
    return of[int(torch.randint(every, ())) :: every] if interpreted else of


def by_hand(student, teacher, objective):
    """D [N], and its gradient by the student's logits, in float64."""
    tau, share = torch.as_tensor(objective.temperature).double().reshape(-1, 1), objective.teacher_share
    q, p = (torch.softmax(x.double() / tau, -1).nan_to_num(0.0) for x in (student, teacher))  # NaN: all of it is −inf
    m = share * p + (1 - share) * q
    both = (p > 0) & (q > 0)
    p_over_q = torch.where(both, p / q, 1.0)
    p_over_m, q_over_m = (torch.where(x > 0, x / m, 1.0) for x in (p, q))
    rest = torch.where(m > 0, p / m, 0.0)
    terms, u = {
        "forward_kl": lambda: (p * p_over_q.log(), torch.where(both, -p_over_q, 0.0)),
        "reverse_kl": lambda: (-q * p_over_q.log(), torch.where(both, 1 - p_over_q.log(), 0.0)),
        "jsd": lambda: (
            share * p * p_over_m.log() + (1 - share) * q * q_over_m.log(),
            (1 - share) * q_over_m.log(),
        ),
        "skew_forward_kl": lambda: (p * p_over_m.log(), -(1 - share) * rest),
        "skew_reverse_kl": lambda: (q * q_over_m.log(), q_over_m.log() + share * rest),
        "tvd": lambda: ((p - q).abs() / 2, -(p - q).sign() / 2),
    }[objective.divergence]()
    compared = ((p > 0).any(-1) & (q > 0).any(-1)).double()
    gradient = q / tau * (u - (q * u).sum(-1, keepdim=True))
    return terms.sum(-1) * compared, gradient * compared[:, None]


# ---- the specification ----


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tau", [1.0, 1.75])
def test_the_reference_is_the_sum_by_hand(divergence, tau):
    objective = Objective(divergence, temperature=tau, beta=0.3, skew=0.2, temperature_scaling="none")
    student, teacher, labels = pairs(list(PAIRS), 40)
    student, teacher = student.double() / 4, teacher.double() / 4  # where nothing underflows by hand
    student.requires_grad_(True)
    out = distillation_loss(student, teacher, labels, objective, reduction="none", backend="reference")
    out.loss.sum().backward()
    want, gradient = by_hand(student.detach(), teacher, objective)
    torch.testing.assert_close(out.per_token["divergence"], want, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-10, atol=1e-13)
    for side, logits_of in (("student", student), ("teacher", teacher)):
        p = torch.softmax(logits_of.detach() / tau, -1).nan_to_num(0.0)
        torch.testing.assert_close(
            out.per_token[f"{side}_entropy"], torch.special.entr(p).sum(-1), rtol=1e-12, atol=1e-14
        )


def test_the_reference_keeps_a_mask_of_the_lowest_number_a_number():
    """Over a temperature below 1 or times a scale it overflows fp32; it neither becomes −inf nor makes a NaN."""
    student, teacher = logits(2, 2, 20)
    low = torch.finfo(torch.float32).min
    student[0, 3:5], teacher[1, 3:5] = low, low
    for divergence in DIVERGENCES:
        for options in ({}, {"logit_scale": 2.0, "teacher_logit_scale": 3.0}, {"logit_softcap": 20.0}):
            for tau in (0.5, 3.0):
                s = student.clone().requires_grad_(True)
                out = distillation_loss(
                    s, teacher, torch.tensor([1, 1]), Objective(divergence, temperature=tau, alpha=0.3),
                    reduction="none", backend="reference", **options,
                )  # fmt: skip
                out.loss.sum().backward()
                assert not torch.stack([out.loss, *out.per_token.values()]).isnan().any()
                assert not s.grad.isnan().any()
    costs = [distillation_loss(student, teacher, torch.tensor([1, 1]), Objective(name), reduction="none",
                               backend="reference").loss > 1e30 for name in ("forward_kl", "reverse_kl")]  # fmt: skip
    assert torch.stack(costs).tolist() == [[True, False], [False, True]]


# ---- the kernels ----


def assert_each_row_matches(names, student, teacher, labels, objective, backend):
    """Each row for itself, so that a row of small gradients is not measured by others."""
    dtype, divergence = student.dtype, objective.divergence
    got, gradient, want, exact_gradient = both(student, teacher, labels, objective, backend=backend, reduction="none")
    steep = torch.tensor(["underflow" in pair for pair in names])  # logits of 100 have differences known to 1e-5
    for name, value in want.per_token.items():
        for rows, atol in ((~steep, 6e-6), (steep, 6e-5)):
            torch.testing.assert_close(
                got.per_token[name].double()[rows], value[rows], rtol=2e-6, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert not gradient.isnan().any()
    unit = 2**-24 if dtype == torch.float16 else 0.0
    for n, pair in enumerate(names):
        if divergence == "tvd" and "close" in pair:  # whose sign is known where p and q are further apart than rounding
            continue
        tolerance = (20 if "underflow" in pair else 2) * GRADIENT_TOLERANCE[dtype]
        error = relative_error(gradient[n], exact_gradient[n], unit)
        # u and its mean are as large as D and known to fp32's rounding; where q is nearly 1 their difference is small
        least = 2e-6 * max(1.0, float(want.per_token["divergence"][n].abs()))
        assert error <= tolerance or (gradient[n] - exact_gradient[n]).abs().max() < least, (pair, error)


def test_what_a_filtered_teacher_leaves_out_counts(backend):
    """Half of the student's mass is where the teacher has none, and the other way round."""
    teacher = torch.tensor([[0.5, 0.3, 0.2, 0.0, 0.0]]).log()
    student = torch.tensor([[0.05, 0.03, 0.02, 0.6, 0.3]]).log()
    for s, t, want in (
        (student, teacher, {"tvd": 0.9, "forward_kl": math.log(10), "reverse_kl": -0.1 * math.log(10)}),
        (teacher, student, {"tvd": 0.9, "forward_kl": -0.1 * math.log(10), "reverse_kl": math.log(10)}),
    ):
        for divergence, value in want.items():
            out = distillation_loss(s, t, torch.tensor([0]), Objective(divergence), backend=backend)
            assert out.divergence.item() == pytest.approx(value, rel=1e-6)


# 40: less than a tile of any kernel; 150: tiles, vectors and a rest; test_fuzz.py goes on to several blocks
@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("V", "tau", "alpha", "dtype"),
    [
        (150, 1.0, 0.0, torch.float32),
        (40, 1.7, 0.0, torch.float32),
        (150, 2.0, 0.3, torch.bfloat16),
        (40, 0.5, 0.3, torch.float16),
    ],
)
def test_filtered_sides_match(backend, divergence, V, tau, alpha, dtype):
    names = some(backend, list(PAIRS), 7)
    student, teacher, labels = pairs(names, V, dtype)
    objective = Objective(divergence, temperature=tau, alpha=alpha, beta=0.3, skew=0.2)
    assert_each_row_matches(names, student, teacher, labels, objective, backend)


@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_label_that_one_side_alone_thinks_impossible_matches(backend, divergence):
    names = some(backend, list(PAIRS), 7)
    student, teacher, _ = pairs(names, 40)
    labels = torch.stack(
        [torch.where(s.isfinite() & ~t.isfinite(), 1.0, 0.0).argmax() for s, t in zip(student, teacher, strict=True)]
    )
    sound = student.gather(1, labels[:, None])[:, 0].isfinite()  # else CE is infinite
    objective = Objective(divergence, temperature=torch.rand(len(names))[sound] + 0.5, alpha=0.4)
    names = [name for name, is_sound in zip(names, sound.tolist(), strict=True) if is_sound]
    assert_each_row_matches(names, student[sound], teacher[sound], labels[sound], objective, backend)


@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_beyond_the_shared_vocabulary_changes_nothing_of_d(backend, divergence):
    """A padded lm_head's tail, where only one side has entries; of one dtype, and of two."""
    student, teacher = logits(2, 60), logits(2, 50)
    padded = student.clone()
    padded[:, 50:] = -INF
    wide = torch.cat([teacher, torch.full((2, 10), -INF)], 1)
    labels, objective = torch.tensor([3, 49]), Objective(divergence, temperature=1.3)
    for t in some(backend, [teacher, teacher.bfloat16()], 2):
        plain, masked = (
            distillation_loss(s, t, labels, objective, reduction="none", backend=backend).per_token
            for s in (student, padded)
        )
        assert torch.equal(plain["divergence"], masked["divergence"])
        assert torch.equal(plain["student_entropy"], masked["student_entropy"])
    assert_matches(student[:, :50].contiguous(), wide, labels, objective, backend=backend)
    assert_matches(padded, teacher, labels, replace(objective, alpha=0.3), backend=backend)


@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_nan_is_never_hidden_by_the_other_sides_minus_infinity(backend, divergence, bad):
    sides = logits(2, 5, 67)
    for side in (0, 1):
        sides[side, side, 5] = bad
        sides[1 - side, side, 5] = -INF  # at its own place
        sides[side, 2 + side, 5] = bad
        sides[1 - side, 2 + side] = -INF  # everywhere
    out = distillation_loss(*sides, torch.full((5,), 6), Objective(divergence), reduction="none", backend=backend)
    assert out.loss.isnan().tolist() == [True, True, True, True, False]


# ---- the k best ----


@pytest.mark.pairwise
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (1.6, 0.3)])
def test_k_best_of_a_filtered_student_match(backend, divergence, tail, temperature, alpha):
    V = 140
    arguments = case(8, V, 6, temperature=temperature, alpha=alpha)
    student, log_probs, indices, labels = arguments[:4]
    labels[:] = torch.arange(V)[~torch.isin(torch.arange(V), indices)][:8]
    keep = student.gather(1, labels[:, None])
    student[0] = top_k(student[0], 20)
    student[1, indices[1, :3]] = -INF
    student[2, indices[2]] = -INF  # only the rest
    student[3] = student[3].masked_fill(~torch.isin(torch.arange(V), indices[3]), -INF)  # no rest
    log_probs[4, 2:] = -INF
    log_probs[5] -= log_probs[5].logsumexp(0) - 0.01  # more than 1 in all: the rest has no mass
    log_probs[6], student[6, indices[6, 0]] = log_probs[6] - 3, -INF
    log_probs[7] = -INF
    student.scatter_(1, labels[:, None], torch.where(torch.arange(8) == 3, -INF, keep[:, 0])[:, None])
    labels[3] = indices[3, 0]
    rows = torch.tensor(some(backend, list(range(8)), 3))
    tokens = arguments.temperature, arguments.alpha, arguments.row_scale[rows]
    arguments = Case(student[rows], log_probs[rows], indices[rows], labels[rows], *tokens)
    assert_sparse_matches(backend, arguments, divergence, tail)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_reference_of_k_best_is_the_sum_by_hand(divergence):
    """Over the K entries alone, and over these and the rest as one more outcome."""
    arguments = case(3, 30, 5)
    arguments.labels[2] = 0
    student, log_probs, indices = arguments[:3]
    student[0, indices[0, 1]], log_probs[0, 3], student[1, indices[1]] = -INF, -INF, -INF
    log_probs[2] -= log_probs[2].double().logsumexp(0) - 0.01  # no mass is left for the rest
    t = log_probs.double()
    listed = torch.zeros(3, 30, dtype=torch.bool).scatter(1, indices, t.isfinite())
    s = student.double().gather(1, indices).masked_fill(t == -INF, -INF)
    s_rest = student.double().masked_fill(listed, -INF).logsumexp(1, keepdim=True)
    t_rest = (1 - t.exp().sum(1, keepdim=True)).clamp_min(0).log()
    objective = Objective(divergence, beta=0.3, skew=0.3 if divergence == "skew_forward_kl" else 0.7)
    for tail, sides in (("renormalise", (s, t)), ("bucket", (torch.cat([s, s_rest], 1), torch.cat([t, t_rest], 1)))):
        stats, _ = exact(arguments, divergence, tail)
        torch.testing.assert_close(stats[2], by_hand(*sides, objective)[0], rtol=1e-10, atol=1e-12)
        p = torch.softmax(sides[1], -1)
        torch.testing.assert_close(stats[4], torch.special.entr(p).sum(-1), rtol=1e-10, atol=1e-14)


# ---- the linear loss ----


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["dense", "linear", "topk"])
def test_the_linear_loss_knows_minus_infinity_too(divergence, kind):
    """By biases of −inf, and by a teacher's logits; in chunks of 3 tokens."""
    hidden, weight, bias = torch.randn(8, 12), torch.randn(101, 12), torch.randn(101)
    bias[60:80] = -INF
    teacher_bias = torch.randn(101)
    teacher_bias[::3] = -INF
    log_probs, indices = torch.log_softmax(torch.randn(8, 101) * 3, -1).topk(9)
    log_probs[1, 4:] = -INF
    teachers = {
        "dense": lambda d: DenseTeacher(top_p(4 * torch.linspace(-1, 1, 808).sin().view(8, 101)).to(d)),
        "linear": lambda d: LinearTeacher(*(x.to(d) for x in (hidden * 2, weight.flip(0), teacher_bias))),
        "topk": lambda d: TopKTeacher(log_probs.to(d), indices),
    }
    labels, results = torch.arange(8), []
    labels[5] = -100
    for dtype, options in ((torch.float32, {"backend": "cpp", "chunk_tokens": 3}), (torch.float64, {})):
        leaves = [x.to(dtype).detach().requires_grad_(True) for x in (hidden, weight, bias)]
        objective = Objective(divergence, temperature=1.3, alpha=0.3)
        out = linear_distillation_loss(
            leaves[0], leaves[1], teachers[kind](dtype), labels, objective, student_bias=leaves[2], **options
        )
        out.loss.backward()
        results.append([out.loss, *out.per_token.values(), *(leaf.grad for leaf in leaves)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) <= 1e-5


@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_rest_that_is_the_rounding_of_its_log_probabilities_is_none(backend, divergence):
    """A teacher filtered by top-p whose k best are all that it has: as if it were given whole. Of 4,096 rows some
    miss 1 by more than 2^-23 by rounding alone."""
    rows = 4 if backend == "triton" else 4096
    student, teacher = logits(rows, 97), torch.full((rows, 97), -INF)
    teacher[:, :6] = logits(rows, 6)
    log_probs, indices = torch.log_softmax(teacher, -1).topk(12)
    assert rows == 4 or (1 - log_probs.double().exp().sum(-1)).max() > 2**-23
    listed = TopKTeacher(log_probs, indices)
    objective, labels = Objective(divergence), torch.arange(rows) % 97
    options = {"reduction": "none", "backend": backend}
    got = distillation_loss(student, listed, labels, objective, **options).per_token["divergence"]
    want = distillation_loss(student, teacher, labels, objective, **(options | {"backend": "reference"}))
    torch.testing.assert_close(got, want.per_token["divergence"].to(got.dtype), rtol=2e-5, atol=6e-6)


@pytest.mark.parametrize(("absent", "rest", "counts"), [(0, 2.0**-21, True), (3, 2.0**-21, False), (3, 2.0**-18, True)])
def test_a_small_rest_of_a_list_without_minus_infinity_is_real(backend, absent, rest, counts):
    """At temperature 2 a rest of 2^-21, spread over 1,000 entries, has two percent of the teacher."""
    student = logits(1, 1005)
    log_probs = torch.full((1, 5 + absent), -INF)
    log_probs[0, :5] = torch.tensor([1 - rest - 2.0**-6, 2.0**-7, 2.0**-8, 2.0**-9, 2.0**-9]).double().log().float()
    teacher = TopKTeacher(log_probs, torch.arange(5 + absent)[None])
    exact = 1 - float(log_probs.double().exp().sum())
    assert exact == pytest.approx(rest, rel=0.2)
    objective, labels = Objective("forward_kl", temperature=2.0), torch.tensor([0])
    got = distillation_loss(student, teacher, labels, objective, reduction="none", backend=backend)
    q = torch.log_softmax(student.double() / 2, -1)[0]
    weights = log_probs[0, :5].double().exp().sqrt()
    rest_weight, q_rest = 1000 * (exact / 1000) ** 0.5, q[5:].exp().sum()
    p = torch.cat([weights, torch.tensor([rest_weight if counts else 0.0])])
    p = p / p.sum()
    outcomes = torch.cat([q[:5], q_rest.log()[None]])
    want = torch.special.xlogy(p, p).sum() - (p * outcomes).sum()
    assert got.per_token["divergence"].item() == pytest.approx(want.item(), rel=1e-4)
