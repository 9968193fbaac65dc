"""The C++ kernel against the float64 reference, in every build that this processor can run."""

import math

import pytest
import torch
from compare import GRADIENT_TOLERANCE, assert_matches, both, logits, relative_error, some_labels

from pocl_fast import _C
from pocl_fast.losses import distillation_loss
from pocl_fast.objectives import DIVERGENCES, Objective

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=_C.supported_isas(), autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("POCL_FAST_ISA", request.param)
    assert _C.isa() == request.param
    return request.param


# 1 and 2: less than a vector of any build; 31: vectors and a rest; 4097: past the blocks that are summed in fp32;
# 50257: a real vocabulary, odd. 0, 1 and 7 tokens: none, fewer than threads, and not a multiple of them.
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "V"), [(7, 1), (7, 2), (7, 31), (7, 4097), (1, 4097), (0, 31), (3, 50257)])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.3), (1.33, 0.3), (2.0, 0.0), (0.5, 1.0)])
def test_loss_metrics_and_gradient_match(divergence, dtype, N, V, temperature, alpha):
    assert_matches(
        logits(N, V, dtype=dtype),
        logits(N, V, dtype=dtype),
        some_labels(N, V),
        Objective(divergence, temperature=temperature, alpha=alpha),
        backend="cpp",
    )


# the largest vocabulary in wide use, and gradients large enough to be streamed past the caches
@pytest.mark.parametrize(("dtype", "N", "V"), [(torch.float32, 40, 151936), (torch.bfloat16, 3, 151936)])
def test_a_large_vocabulary_matches(isa, dtype, N, V):
    if isa == "plain":
        N = 2
    assert_matches(
        logits(N, V, dtype=dtype), logits(N, V, dtype=dtype), some_labels(N, V), Objective(alpha=0.3), backend="cpp"
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scaling", ["auto", "none", "tau", "tau2"])
def test_every_temperature_scaling_matches(divergence, scaling):
    objective = Objective(divergence, temperature=1.7, alpha=0.3, temperature_scaling=scaling)
    assert_matches(logits(5, 257), logits(5, 257), some_labels(5, 257), objective, backend="cpp")


# of the teacher in the mixture; nearer to 0 or 1 its complement loses digits in fp32
@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9, 0.95])
def test_every_share_of_a_mixture_matches(divergence, share):
    objective = Objective(divergence, temperature=1.3, alpha=0.3, beta=share, skew=share)
    assert_matches(logits(5, 700), logits(5, 700), some_labels(5, 700), objective, backend="cpp")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("V_s", "V_t"), [(300, 300), (330, 300)])
@pytest.mark.parametrize("transforms", [(0.25, 3.0, 1.0, None), (1.0, 30.0, 0.5, 30.0), (2.0, None, 0.1, None)])
def test_scales_and_softcaps_match(divergence, dtype, V_s, V_t, transforms):
    names = ("logit_scale", "logit_softcap", "teacher_logit_scale", "teacher_logit_softcap")
    student, teacher, labels = logits(6, V_s, dtype=dtype), logits(6, V_t, dtype=dtype), some_labels(6, V_s, False)
    student[0, 4], teacher[1, 3] = -math.inf, -math.inf  # masks stay masks
    if transforms[1]:
        student[3, 7] = 1e4  # far past the cap
    labels[0] = 5
    options = dict(zip(names, transforms, strict=True))
    assert_matches(
        student, teacher, labels, Objective(divergence, temperature=1.3, alpha=0.3), backend="cpp", **options
    )


# as the masks of attention code make them: not −inf, but the dtype's lowest number
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_the_lowest_numbers_as_masks_match(divergence, temperature):
    student, teacher = logits(4, 200), logits(4, 200)
    for matrix in (student, teacher):
        matrix[:, 100:150] = torch.finfo(torch.float32).min
    labels = torch.zeros(4, dtype=torch.int64)
    assert_matches(student, teacher, labels, Objective(divergence, temperature=temperature, alpha=0.3), backend="cpp")


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_student_and_teacher_may_differ_in_dtype(student_dtype, teacher_dtype):
    student, teacher = logits(5, 517, dtype=student_dtype), logits(5, 517, dtype=teacher_dtype)
    assert_matches(student, teacher, some_labels(5, 517), Objective(alpha=0.3), backend="cpp")


# a few more on either side, and a whole vector more
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V_s", "V_t"), [(130, 128), (128, 131), (200, 101), (64, 4097), (4097, 64), (1, 5), (5, 1)])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_unequal_vocabularies_match(divergence, dtype, V_s, V_t, temperature):
    objective = Objective(divergence, temperature=temperature, alpha=0.3)
    assert_matches(
        logits(6, V_s, dtype=dtype), logits(6, V_t, dtype=dtype), some_labels(6, V_s), objective, backend="cpp"
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_entries_of_minus_infinity_are_left_out_of_the_divergence(divergence, temperature, alpha):
    student, teacher = logits(7, 301), logits(7, 301)
    labels = some_labels(7, 301, ignored=False)
    student[0, 5], student[1, :200], student[2, -9:] = -math.inf, -math.inf, -math.inf
    teacher[0, 7], teacher[2, 3], teacher[3, 100:], teacher[4, :-1] = -math.inf, -math.inf, -math.inf, -math.inf
    student[5, :150], teacher[5, 150:] = -math.inf, -math.inf  # nothing in common
    teacher[6] = -math.inf
    labels[1], labels[0], labels[2] = 250, 6, 7  # CE stays finite
    labels[5] = 200
    assert_matches(student, teacher, labels, Objective(divergence, temperature=temperature, alpha=alpha), backend="cpp")


def test_a_row_with_nothing_to_compare_has_no_divergence_and_no_gradient_of_it():
    student, teacher = logits(2, 40), logits(2, 40)
    student[0, :20], teacher[0, 20:] = -math.inf, -math.inf
    teacher[1] = -math.inf
    out, gradient, _, _ = both(student, teacher, torch.tensor([30, 0]), Objective(), backend="cpp")
    assert out.per_token["divergence"].tolist() == [0, 0]
    assert gradient.count_nonzero() == 0


def test_a_label_of_minus_infinity_costs_infinitely_much_but_nothing_at_alpha_0():
    student, teacher = logits(3, 40), logits(3, 40)
    student[0, 4] = -math.inf
    student[1] = -math.inf
    labels = torch.tensor([4, 4, 4])
    for backend in ("cpp", "reference"):
        for alpha, finite in ((0.0, [True, True, True]), (0.3, [False, False, True])):
            s = student.clone().requires_grad_(True)
            out = distillation_loss(s, teacher, labels, Objective(alpha=alpha), reduction="none", backend=backend)
            assert out.loss.isfinite().tolist() == finite
            assert not out.loss.isnan().any()
            out.loss.sum().backward()
            assert s.grad.isfinite().all()
            assert s.grad[1].count_nonzero() == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("place", [0, 40, 66])  # in a vector, and in the rest that does not fill one
def test_a_nan_or_infinity_makes_its_row_nan_and_no_other(divergence, bad, side, place):
    sides = {"student": logits(4, 67), "teacher": logits(4, 67)}
    labels = some_labels(4, 67, ignored=False)
    objective = Objective(divergence, temperature=1.3, alpha=0.3)
    _, clean, _, _ = both(*sides.values(), labels, objective, backend="cpp", reduction="sum")
    sides[side][1, place] = bad
    got, gradient, _, _ = both(*sides.values(), labels, objective, backend="cpp", reduction="none")
    assert got.loss.isnan().tolist() == [False, True, False, False]
    assert torch.equal(gradient[[0, 2, 3]], clean[[0, 2, 3]])
    assert got.metrics["student_entropy"].isnan() == (side == "student")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_huge_and_tiny_logits_match(divergence, size):
    """At ±1e4 most entries underflow on one side or both. A difference of such logits is known to about 1e-3 nats in
    fp32, and the gradient of reverse KL is such a difference."""
    student, teacher = (torch.rand(6, 333) * 2 - 1) * size, (torch.rand(6, 333) * 2 - 1) * size
    got, gradient, want, exact = both(
        student, teacher, some_labels(6, 333), Objective(divergence, alpha=0.3), backend="cpp"
    )
    assert relative_error(got.loss, want.loss) <= 2e-6
    assert relative_error(got.ce, want.ce) <= 2e-6
    # tvd between near distributions turns on signs, a few of which rounding decides
    loose = (divergence != "forward_kl") if size > 1 else (divergence == "tvd")
    assert relative_error(gradient, exact) <= (1e-2 if loose else 2e-6)


# the student a fine-tuned step away from the teacher, down to a divergence of 1e-9 nats; about 0.01 is where it
# begins to come from moments, exact to 1e-7 nats
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("distance", "tolerance"), [(1e-1, 5e-5), (1e-2, 5e-6), (1e-3, 1e-5), (1e-4, 1e-4)])
def test_a_small_divergence_keeps_its_digits(divergence, distance, tolerance):
    teacher = logits(5, 5003)
    student = teacher + distance * torch.randn(5, 5003)
    got, _, want, _ = both(student, teacher, some_labels(5, 5003), Objective(divergence), backend="cpp")
    if divergence == "tvd":  # linear, not quadratic, in the distance: so is its error in that of log p - log q
        tolerance = max(tolerance, 1e-6 / distance)
    assert relative_error(got.per_token["divergence"], want.per_token["divergence"]) <= tolerance


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_is_never_negative_and_0_between_equals(divergence):
    student = logits(64, 1003)
    labels = torch.zeros(64, dtype=torch.int64)
    nearly = student * (1 + 1e-7 * torch.randn(64, 1003))
    # of log p - log q, of which `nearly` itself has 1e-6; the others are quadratic in it
    rounding = 1e-5 if divergence == "tvd" else 1e-10
    for teacher, limit in ((student, 0.0), (student + 8.0, rounding), (nearly, rounding)):
        out = distillation_loss(
            student, teacher, labels, Objective(divergence, temperature=1.3), reduction="none", backend="cpp"
        )
        assert (out.loss >= 0).all()
        assert (out.loss <= limit).all()


def test_ignored_rows_cost_nothing_and_are_not_read():
    student, teacher = logits(6, 100), logits(6, 100)
    labels = some_labels(6, 100)
    student[2], teacher[2], teacher[5] = math.nan, math.nan, math.inf
    weights = torch.ones(6)
    weights[2] = math.nan
    got, gradient, want, exact = both(
        student, teacher, labels, Objective(alpha=0.3), backend="cpp", reduction="none", token_weights=weights
    )
    assert gradient[[2, 5]].count_nonzero() == 0
    assert got.loss[[2, 5]].tolist() == [0, 0]
    assert relative_error(got.loss, want.loss) <= 2e-6
    assert relative_error(gradient, exact) <= GRADIENT_TOLERANCE[torch.float32]


def test_values_for_each_token_match():
    N, V = 9, 211
    objective = Objective("reverse_kl", temperature=torch.rand(N) + 0.5, alpha=torch.rand(N))
    assert_matches(
        logits(N, V),
        logits(N, V),
        some_labels(N, V),
        objective,
        backend="cpp",
        token_weights=torch.rand(N),
        reduction="none",
        upstream=torch.rand(N),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_items", [None, 17, torch.tensor(17)])
@pytest.mark.parametrize("upstream", [1.0, 0.0, -2.5])
def test_reductions_and_upstream_gradients_match(reduction, num_items, upstream):
    options = {"reduction": reduction, "num_items": num_items, "upstream": upstream, "backend": "cpp"}
    assert_matches(logits(5, 97), logits(5, 97), some_labels(5, 97), Objective(alpha=0.3), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_strided_rows_match(dtype, divergence):
    """Slices of wider matrices, every second row, one row for all, and columns that must be made contiguous."""
    wide = logits(12, 2 * 77 + 3, dtype=dtype)
    labels = some_labels(6, 77)
    for student in (wide[::2, 5:82], wide[:6, ::2][:, :77], wide[:1, :77].expand(6, 77)):
        assert_matches(student, wide[1::2, 1:78], labels, Objective(divergence, alpha=0.3), backend="cpp")


def test_rows_may_lie_beyond_32_bits():
    """A bf16 matrix whose last row starts at element 2**31 and more; the pages between are never touched."""
    stride = 2**31 + 64
    storage = torch.empty(stride + 128, dtype=torch.bfloat16)
    far = storage.as_strided((2, 100), (stride, 1))
    far.copy_(logits(2, 100, dtype=torch.bfloat16))
    assert_matches(far, far.flip(0), some_labels(2, 100), Objective(alpha=0.3), backend="cpp")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(divergence, dtype):
    student, teacher, labels = logits(33, 3001, dtype=dtype), logits(33, 3001, dtype=dtype), some_labels(33, 3001)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            s = student.clone().requires_grad_(True)
            out = distillation_loss(
                s, teacher, labels, Objective(divergence, temperature=1.3, alpha=0.3), reduction="none"
            )
            out.loss.sum().backward()
            results.append((out.loss.detach(), s.grad))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# every bit pattern: subnormals, infinities, NaN; and halfway cases of the way back
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_rounded_as_torch_does(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite() & (values.abs() < 60)]
    student = torch.stack([values, torch.zeros_like(values)], 1)  # two entries: CE is softplus of the difference
    labels = torch.zeros(len(values), dtype=torch.int64)
    got, gradient, want, exact = both(
        student, torch.zeros_like(student), labels, Objective(alpha=1.0), backend="cpp", reduction="none"
    )
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=6e-8)
