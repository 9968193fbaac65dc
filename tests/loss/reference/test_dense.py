"""The fused loss against the float64 reference: the C++ kernel in every build, and the Triton kernel.

Sizes are what Triton's interpreter can do; test_dense_cpu.py and test_dense_triton.py go on to those of real models.
Each backend compiles a kernel a divergence, so that grids marked `pairwise` keep every combination of these two; sizes,
dtypes, temperatures and other values, which test_fuzz.py draws at random, are there in every pair.
"""

import math

import pytest
import torch
from compare import GRADIENT_TOLERANCE, assert_matches, both, logits, relative_error, some_labels

from pocl_fast.loss.arguments import Settings, Tokens
from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective
from pocl_fast.loss.row_operator import backend_module

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF = torch.bfloat16

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


# ---- shapes and dtypes ----


# 1 and 2: less than a vector of any build; 31: vectors and a rest, within a tile; 300: tiles and a rest that ends
# within a vector. 0 tokens: no launch
@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("N", "V", "temperature", "alpha", "dtype"),
    [
        (2, 1, 1.33, 0.3, torch.float32),
        (2, 2, 1.0, 0.3, HALF),
        (3, 31, 2.0, 0.0, torch.float16),
        (0, 31, 1.0, 0.3, HALF),
        (2, 300, 1.0, 0.3, torch.float32),
        (2, 300, 0.5, 1.0, HALF),
        (2, 300, 1.33, 0.3, torch.float16),
    ],
)
def test_loss_metrics_and_gradient_match(backend, divergence, N, V, temperature, alpha, dtype):
    objective = Objective(divergence, temperature=temperature, alpha=alpha)
    student, teacher = logits(N, V, dtype=dtype), logits(N, V, dtype=dtype)
    assert_matches(student, teacher, some_labels(N, V), objective, backend=backend)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_student_and_teacher_may_differ_in_dtype(backend, student_dtype, teacher_dtype):
    student, teacher = logits(2, 517, dtype=student_dtype), logits(2, 517, dtype=teacher_dtype)
    assert_matches(student, teacher, some_labels(2, 517), Objective(alpha=0.3), backend=backend)


# a few more on either side; whole vectors and tiles more
@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("V_s", "V_t", "temperature", "dtype"),
    [
        (130, 128, 1.0, torch.float32),
        (128, 131, 1.5, HALF),
        (300, 101, 1.5, torch.float32),
        (64, 300, 1.0, HALF),
        (1, 5, 1.5, torch.float32),
        (5, 1, 1.0, torch.float32),
    ],
)
def test_unequal_vocabularies_match(backend, divergence, V_s, V_t, temperature, dtype):
    objective = Objective(divergence, temperature=temperature, alpha=0.3)
    student, teacher = logits(2, V_s, dtype=dtype), logits(2, V_t, dtype=dtype)
    assert_matches(student, teacher, some_labels(2, V_s), objective, backend=backend)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_strided_rows_match(backend, divergence):
    """Slices of wider matrices, every second row, one row for all, and columns that must be made contiguous."""
    wide = logits(4, 2 * 77 + 3)
    labels = some_labels(2, 77)
    for student in (wide[::2, 5:82], wide[:1, :77].expand(2, 77), wide[:2, ::2][:, :77]):
        assert_matches(student, wide[1::2, 1:78], labels, Objective(divergence, alpha=0.3), backend=backend)


def test_rows_may_lie_beyond_32_bits(backend, tmp_path):
    """The last rows of student, teacher and gradient start at element 2**31 and more; what is between is untouched."""
    stride = 2**31 + 64
    if torch.get_default_device().type == "cuda":
        storage = torch.empty(stride + 384, dtype=HALF)
    else:  # a sparse file
        storage = torch.from_file(str(tmp_path / "logits"), shared=True, size=stride + 384, dtype=HALF)
    student, teacher, over = (storage.as_strided((2, 100), (stride, 1), offset) for offset in (0, 128, 256))
    student.copy_(logits(2, 100, dtype=HALF))
    teacher.copy_(logits(2, 100, dtype=HALF))
    labels = some_labels(2, 100)
    assert_matches(student, teacher, labels, Objective(alpha=0.3), backend=backend)

    kernel, values, options = backend_module(backend), torch.ones(2), plain_options()
    tokens = Tokens(labels, values[:1], values[:1], values)
    _, _, grad = kernel.distillation_rows(student, teacher, tokens, **options)
    kernel.distillation_rows(student, teacher, tokens, **options, grad=over)
    assert torch.equal(over, grad)
    kernel.scale_rows_(over, torch.tensor([1.0, 2.0]))
    assert torch.equal(over, grad * torch.tensor([[1.0], [2.0]]).to(HALF))


def plain_options(divergence="forward_kl"):
    """What a launcher is told besides its tensors."""
    return {
        "settings": Settings(divergence, 0.3, 2, -100, [1.0, 0.0, 1.0, 0.0], "bucket"),
        "needs_grad": True,
        "reduced": True,
    }


# ---- objectives and options ----


@pytest.mark.pairwise
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scaling", ["auto", "none", "tau", "tau2"])
def test_every_temperature_scaling_matches(backend, divergence, scaling):
    objective = Objective(divergence, temperature=1.7, alpha=0.3, temperature_scaling=scaling)
    assert_matches(logits(2, 257), logits(2, 257), some_labels(2, 257), objective, backend=backend)


# the mixture's share is data: a very small and a very large one
@pytest.mark.pairwise
@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_every_share_of_a_mixture_matches(backend, divergence, share):
    objective = Objective(divergence, temperature=1.3, alpha=0.3, beta=share, skew=share)
    assert_matches(logits(2, 700), logits(2, 700), some_labels(2, 700), objective, backend=backend)


def test_values_for_each_token_match(backend):
    N, V = 4, 211
    objective = Objective("reverse_kl", temperature=torch.rand(N) + 0.5, alpha=torch.rand(N))
    options = {"token_weights": torch.rand(N), "reduction": "none", "upstream": torch.rand(N), "backend": backend}
    assert_matches(logits(N, V), logits(N, V), some_labels(N, V), objective, **options)


@pytest.mark.pairwise
@pytest.mark.parametrize("num_items", [None, 17, torch.tensor(17)])
@pytest.mark.parametrize(
    ("reduction", "upstream", "dtype"),
    [("mean", 1.0, torch.float16), ("mean", -2.5, torch.float32), ("sum", 0.0, HALF), ("none", 3.0, torch.float16)],
)
def test_reductions_and_upstream_gradients_match(backend, num_items, reduction, upstream, dtype):
    options = {"reduction": reduction, "num_items": num_items, "upstream": upstream, "backend": backend}
    student, teacher = logits(4, 97, dtype=dtype), logits(4, 97)
    assert_matches(student, teacher, some_labels(4, 97), Objective(alpha=0.3), **options)


# softcap of Gemma, scale of Granite, both, on either side; what is masked stays masked
@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("V_s", "transforms"),
    [
        (150, {"logit_softcap": 3.0}),
        (170, {"logit_scale": 0.25, "teacher_logit_scale": 2.0}),
        (170, {"logit_scale": 0.5, "logit_softcap": 5.0, "teacher_logit_softcap": 30.0}),
    ],
)
def test_scaled_and_softcapped_logits_match(backend, divergence, V_s, transforms):
    student, teacher = logits(3, V_s), logits(3, 150)
    student[0, 7], teacher[1, 8] = -math.inf, -math.inf
    if "logit_softcap" in transforms:
        student[2, 7] = 1e4  # far past the cap
    objective = Objective(divergence, temperature=1.3, alpha=0.3)
    assert_matches(student, teacher, torch.tensor([1, 2, 3]), objective, backend=backend, **transforms)


@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("V_s", "V_t", "dtype"), [(300, 300, torch.float32), (300, 150, HALF)])
def test_a_gradient_written_over_the_logits_is_the_same(backend, divergence, V_s, V_t, dtype):
    """Also where the rows lie apart, and nothing between them is touched."""
    wide, teacher, labels = logits(3, V_s + 20, dtype=dtype), logits(3, V_t, dtype=dtype), some_labels(3, V_s)
    student, between = wide[:, 4 : V_s + 4], wide.clone()
    arguments = (teacher, Tokens(labels, torch.tensor([1.3]), torch.tensor([0.3]), torch.rand(3)))
    options = plain_options(divergence)
    kernel = backend_module(backend)
    loss, stats, grad = kernel.distillation_rows(student, *arguments, **options)
    loss_over, stats_over, over = kernel.distillation_rows(student, *arguments, **options, grad=student)
    assert over.data_ptr() == student.data_ptr()
    assert torch.equal(over, grad)
    assert torch.equal(stats_over, stats)
    assert torch.equal(loss_over, loss)
    between[:, 4 : V_s + 4] = grad
    assert torch.equal(wide, between)


# ---- rows that are not like others ----


def test_ignored_rows_cost_nothing_and_are_not_read(backend):
    student, teacher = logits(6, 100), logits(6, 100)
    labels = some_labels(6, 100)
    student[2], teacher[2], teacher[5] = math.nan, math.nan, math.inf
    weights = torch.ones(6)
    weights[2] = math.nan
    options = {"backend": backend, "reduction": "none", "token_weights": weights}
    for dtype in DTYPES:
        got, gradient, want, exact = both(student.to(dtype), teacher, labels, Objective(alpha=0.3), **options)
        assert gradient[[2, 5]].count_nonzero() == 0
        assert got.loss[[2, 5]].tolist() == [0, 0]
        assert relative_error(got.loss, want.loss) <= 2e-6
        assert relative_error(gradient, exact) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.3), (1.5, 0.0)])
def test_minus_infinity_on_either_side_matches(backend, divergence, temperature, alpha):
    student, teacher = logits(7, 201), logits(7, 201)
    labels = some_labels(7, 201, ignored=False)
    student[0, 5], student[1, :140], student[2, -9:] = -math.inf, -math.inf, -math.inf
    teacher[0, 7], teacher[2, 3], teacher[3, 100:], teacher[4, :-1] = -math.inf, -math.inf, -math.inf, -math.inf
    student[5, :150], teacher[5, 150:] = -math.inf, -math.inf  # nothing in common
    teacher[6] = -math.inf
    labels[1], labels[0], labels[2] = 190, 6, 7  # CE stays finite
    labels[5] = 190
    objective = Objective(divergence, temperature=temperature, alpha=alpha)
    assert_matches(student, teacher, labels, objective, backend=backend)


# what the masks of attention code make instead of −inf, and what overflows when it is scaled
@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_the_lowest_number_as_a_mask_on_both_sides_matches(backend, divergence, dtype, temperature):
    student, teacher = logits(2, 200, dtype=dtype), logits(2, 200, dtype=dtype)
    student[:, 100:150], teacher[:, 100:150] = torch.finfo(dtype).min, torch.finfo(dtype).min
    objective = Objective(divergence, temperature=temperature, alpha=0.3)
    assert_matches(student, teacher, torch.tensor([3, 4]), objective, backend=backend)


def test_a_row_with_nothing_to_compare_has_no_divergence_and_no_gradient_of_it(backend):
    """Of forward KL that is a row whose every term is left out; of all a side of −inf alone."""
    student, teacher = logits(2, 40), logits(2, 40)
    student[0, :20], teacher[0, 20:] = -math.inf, -math.inf
    teacher[1] = -math.inf
    out, gradient, _, _ = both(student, teacher, torch.tensor([30, 0]), Objective(), backend=backend)
    assert out.per_token["divergence"].tolist() == [0, 0]
    assert gradient.count_nonzero() == 0


def test_a_label_of_minus_infinity_costs_infinitely_much_but_nothing_at_alpha_0(backend):
    student, teacher = logits(3, 40), logits(3, 40)
    student[0, 4] = -math.inf
    student[1] = -math.inf
    labels = torch.tensor([4, 4, 4])
    for side in (backend, "reference"):
        for alpha, finite in ((0.0, [True, True, True]), (0.3, [False, False, True])):
            s = student.clone().requires_grad_(True)
            out = distillation_loss(s, teacher, labels, Objective(alpha=alpha), reduction="none", backend=side)
            assert out.loss.isfinite().tolist() == finite
            assert not out.loss.isnan().any()
            out.loss.sum().backward()
            assert s.grad.isfinite().all()
            assert s.grad[1].count_nonzero() == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_nan_or_infinity_makes_its_row_nan_and_no_other(backend, divergence):
    """On either side; in a vector, at its end, and in the rest that does not fill one. Every fourth row is sound."""
    bad_rows = [(bad, side, v) for bad in (math.nan, math.inf) for side in (0, 1) for v in (0, 40, 66)]
    sound = torch.arange(16) % 4 == 0
    sides = logits(2, 16, 67)
    for n, (bad, side, v) in zip((~sound).nonzero()[:, 0].tolist(), bad_rows, strict=True):
        sides[side, n, v] = bad
    objective = Objective(divergence, temperature=1.3, alpha=0.3)
    labels = some_labels(16, 67, ignored=False)
    got, gradient, want, exact = both(*sides, labels, objective, backend=backend, reduction="none")
    assert torch.equal(got.loss.isnan(), ~sound)
    students = torch.tensor([side == 0 for _, side, _ in bad_rows])
    for name in ("student_entropy", "ce"):
        assert torch.equal(got.per_token[name][~sound].isnan(), students)
    assert relative_error(got.loss[sound], want.loss[sound]) <= 2e-6
    assert relative_error(gradient[sound], exact[sound]) <= GRADIENT_TOLERANCE[torch.float32]


# ---- digits ----


@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_huge_and_tiny_logits_match(backend, divergence, size):
    """At ±1e4 most entries underflow on one side or both. A difference of such logits is known to about 1e-3 nats in
    fp32, and the gradient of reverse KL is such a difference. At ±1e-4 some p and q are nearer to each other than the
    normalisers are known, and TVD's gradient takes either side."""
    student, teacher = (torch.rand(3, 333) * 2 - 1) * size, (torch.rand(3, 333) * 2 - 1) * size
    got, gradient, want, exact = both(
        student, teacher, some_labels(3, 333), Objective(divergence, alpha=0.3), backend=backend
    )
    assert relative_error(got.loss, want.loss) <= 2e-6
    assert relative_error(got.ce, want.ce) <= 2e-6
    loose = divergence == ("reverse_kl" if size > 1 else "tvd")
    assert relative_error(gradient, exact) <= (2e-2 if loose else 2e-6)


# the student a fine-tuned step away from the teacher, down to a divergence of 1e-9 nats, with and without gradient;
# about 0.01 is where the C++ kernel begins to take it from moments, exact to 1e-7 nats
@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("distance", "tolerance"), [(1e-1, 5e-5), (1e-2, 1e-5), (1e-3, 1e-5), (1e-4, 1e-4)])
def test_a_small_divergence_keeps_its_digits(backend, divergence, distance, tolerance):
    teacher = logits(2, 5003)
    student = teacher + distance * torch.randn(2, 5003)
    labels, objective = some_labels(2, 5003), Objective(divergence)
    if divergence == "tvd":  # linear, not quadratic, in the distance: so is its error in that of log p - log q
        tolerance = max(tolerance, 1e-6 / distance)
    got, gradient, want, exact_gradient = both(student, teacher, labels, objective, backend=backend)
    ungraded = distillation_loss(student, teacher, labels, objective, backend=backend)
    for out in (got, ungraded):
        assert relative_error(out.per_token["divergence"], want.per_token["divergence"]) <= tolerance
    if divergence != "tvd":  # whose gradient changes its sign with p - q, which is within rounding somewhere
        # Triton's forward KL is the difference of two probabilities, known to some 1e-7 each
        rounding = 2e-6 / distance if (backend, divergence) == ("triton", "forward_kl") else 2e-6
        if divergence == "reverse_kl":  # of differences, small ones where one token holds nearly all of q
            rounding = GRADIENT_TOLERANCE[torch.float32]
        assert relative_error(gradient, exact_gradient) <= rounding


# the student's logit of one entry falls until its probability underflows, which the teacher's never does
@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("share", [0.5, 0.02])
@pytest.mark.parametrize("teacher_logit", [0.0, -2.0])
def test_a_probability_that_underflows_on_one_side_keeps_its_term(backend, divergence, share, teacher_logit):
    falling, still = torch.zeros(2, 31, 5)
    falling[:, 1], still[:, 1] = torch.arange(-80, -111, -1), teacher_logit
    if backend == "triton" and not torch.cuda.is_available():  # interpreted: every fourth row, a millisecond each
        some = slice(int(torch.randint(4, ())), None, 4)
        falling, still = falling[some], still[some]
    labels, objective = torch.zeros(len(falling), dtype=torch.int64), Objective(divergence, beta=share, skew=share)
    for student, teacher in ((falling, still), (still, falling)):
        got, _, want, _ = both(student, teacher, labels, objective, backend=backend, reduction="none")
        torch.testing.assert_close(got.loss.double(), want.loss, rtol=3e-6, atol=1e-7)


# an offset between the models, which no divergence depends on
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_an_offset_between_the_models_costs_no_digits(backend, divergence):
    student, teacher = logits(3, 133), logits(3, 133) + 64.0
    student, teacher = student.bfloat16().float(), teacher.bfloat16().float()  # the offset itself must not round
    assert_matches(student, teacher, some_labels(3, 133), Objective(divergence, alpha=0.3), backend=backend)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_is_never_negative_and_0_between_equals(backend, divergence):
    student = logits(6, 1003)
    labels = torch.zeros(6, dtype=torch.int64)
    nearly = student * (1 + 1e-7 * torch.randn(6, 1003))
    # TVD is of first order in the rounding of the shifted logits and of the normalisers, the others of second
    small = 1e-5 if divergence == "tvd" else 1e-10
    for teacher, limit in ((student, 0.0), (student + 8.0, small), (nearly, small)):
        objective = Objective(divergence, temperature=1.3)
        out = distillation_loss(student, teacher, labels, objective, reduction="none", backend=backend)
        assert (out.loss >= 0).all()
        assert (out.loss <= limit).all()


@pytest.mark.parametrize("reduced", [False, True])
def test_one_scale_for_all_tokens_is_the_same_as_each_its_own(backend, reduced):
    N, V = 5, 97
    labels, one = some_labels(N, V), torch.rand(1)
    labels[2] = -100
    sides, tokens = (logits(N, V), logits(N, V)), Tokens(labels, torch.tensor([1.3]), torch.tensor([0.3]), one)
    kernel, options = backend_module(backend), plain_options("jsd") | {"reduced": reduced}
    loss, stats, grad = kernel.distillation_rows(*sides, tokens, **options)
    each = kernel.distillation_rows(*sides, tokens._replace(row_scale=one.expand(N).contiguous()), **options)
    assert all(torch.equal(a, b) for a, b in zip(each, (loss, stats, grad), strict=True))
    scaled = stats[0].double() * one.double()
    torch.testing.assert_close(loss.double(), scaled.sum() if reduced else scaled, rtol=1e-6, atol=0)
