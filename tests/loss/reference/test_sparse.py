"""The sparse teacher: its kernels against the float64 reference, and the reference against the dense one.

Each backend compiles a kernel a divergence, and Triton one a tail: grids marked `pairwise` keep every combination of
those where terms of D go wrong, and every pair of all other values.
"""

import math

import pytest
import torch
from compare import relative_error
from sparse_compare import assert_matches, case, exact, run, settings_of

from pocl_fast.loss import reference
from pocl_fast.loss.arguments import Tokens
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective
from pocl_fast.loss.teacher_output import TAILS, TopKTeacher

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what overflows in the interpreter's NumPy is what a kernel then writes over, or leaves out
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def tiles_of_128_logits(request):
    if "backend" in request.fixturenames:
        request.getfixturevalue("small_tiles")


# K = 1, 7, 64 and all V; V = 1: nothing but the label; 31: within a tile; 301: tiles, and a rest within a vector; 4097:
# past the blocks that are summed in fp32. (Interpreted, Triton takes one of the first three in each case.)
SIZES = [(301, 7), (31, 31), (1, 1), (4097, 64), (4097, 1), (1500, 1000)]


@pytest.mark.pairwise("backend", "divergence", "tail")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.3), (1.33, 0.3), (2.0, 0.3), (0.5, 0.0), (1.5, 1.0)])
def test_loss_metrics_and_gradient_match(backend, divergence, tail, dtype, temperature, alpha):
    interpreted = backend == "triton" and not torch.cuda.is_available()
    for V, K in [SIZES[int(torch.randint(3, ()))]] if interpreted else SIZES:
        assert_matches(backend, case(3, V, K, dtype, temperature, alpha), divergence, tail)


@pytest.mark.pairwise
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_many_entries_match(backend, divergence, tail):
    assert_matches(backend, case(2, 1500, 1000, torch.float32, 1.3), divergence, tail)
    assert_matches(backend, case(2, 1500, 64, torch.bfloat16, 1.3), divergence, tail)


# ---- the specification, against others -------------------------------------------------------------------------------


def dense(arguments, teacher, divergence):
    s = arguments.student.double().requires_grad_(True)
    tokens = Tokens(arguments.labels, *(value.double() for value in arguments[4:]))
    rows = reference.distillation_rows(s, teacher.double(), tokens, settings_of(divergence, "bucket"))
    (rows.loss * arguments.row_scale.double()).sum().backward()
    return torch.stack([value.detach() for value in rows]), s.grad


def scattered(arguments, elsewhere):
    """Teacher logits [N, V]: the listed log-probabilities, and `elsewhere` [N, 1] in the other places."""
    logits = torch.as_tensor(elsewhere).double().expand(arguments.student.shape).clone()
    return logits.scatter(1, arguments.indices, arguments.log_probs.double())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_renormalised_entries_are_two_dense_sides_of_no_other_entries(divergence):
    arguments = case(5, 200, 9, temperature=1.7, alpha=0.0)
    indices, few = arguments.indices, torch.where(arguments.labels == -100, -100, 0)
    arguments.student[0, indices[0, 3]] = -math.inf
    arguments.log_probs[1, 5] = -math.inf
    arguments.student[1, indices[1, 5]] = -math.inf  # that entry is not compared
    got, gradient = exact(arguments, divergence, "renormalise")
    sides = arguments._replace(student=arguments.student.gather(1, indices), labels=few)
    want, dense_gradient = dense(sides, arguments.log_probs, divergence)
    same = [0, 2, 4]  # the student's metrics are of its whole vocabulary here
    torch.testing.assert_close(got[same], want[same], rtol=1e-12, atol=1e-12)
    assert relative_error(gradient, torch.zeros_like(gradient).scatter(1, indices, dense_gradient)) <= 1e-12


@pytest.mark.pairwise
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_all_entries_are_the_dense_teacher(backend, divergence, tail):
    arguments = case(4, 64, 64, temperature=1.7)
    arguments.student[0, 5], arguments.labels[0] = -math.inf, 6
    got, gradient = run(backend, arguments, divergence, tail)
    want, dense_gradient = dense(arguments, scattered(arguments, 0.0), divergence)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=3e-6)
    assert relative_error(gradient, dense_gradient) <= 1e-5


@pytest.mark.parametrize("tail_temperature", [1.0, 1.7])
def test_the_bucket_is_the_sum_of_entries_that_share_the_teachers_rest(tail_temperature):
    arguments = case(5, 200, 9, temperature=tail_temperature)
    rest = ((1 - arguments.log_probs.double().exp().sum(1, keepdim=True)) / (200 - 9)).log()
    p_all = torch.softmax(scattered(arguments, rest) / arguments.temperature, -1)
    q_all = torch.softmax(arguments.student.double() / arguments.temperature, -1)
    listed = arguments.indices
    p, q = (torch.cat([x.gather(1, listed), x.scatter(1, listed, 0).sum(1, True)], 1) for x in (p_all, q_all))
    m = 0.3 * p + 0.7 * q
    kl = {"forward_kl": (p, q), "reverse_kl": (q, p), "skew_forward_kl": (p, m), "skew_reverse_kl": (q, m)}
    want = {name: (a * (a / b).log()).sum(1) for name, (a, b) in kl.items()}
    want["jsd"] = 0.3 * want["skew_forward_kl"] + 0.7 * want["skew_reverse_kl"]
    want["tvd"] = 0.5 * (p - q).abs().sum(1)
    for divergence in DIVERGENCES:
        stats, _ = exact(arguments, divergence, "bucket")
        torch.testing.assert_close(stats[2, :-1], want[divergence][:-1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(stats[4, :-1], -(p * p.log()).sum(1)[:-1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(stats[3, :-1], -(q_all * q_all.log()).sum(1)[:-1], rtol=1e-9, atol=1e-12)


# ---- entries that are not there --------------------------------------------------------------------------------------


@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_entries_that_are_all_masked_by_minus_1e30_are_compared_with_each_other(backend, divergence, tail):
    """Some code masks with -1e30: where that takes all listed entries, they are equal, and not all of them certain."""
    arguments = case(3, 301, 8, temperature=1.5)
    student, _, indices, labels = arguments[:4]
    student[0, indices[0]] = -1e30
    student[1, indices[1]] = torch.tensor([-1e30, -1e30, -2e30, -1e30, -2e30, -1e30, -1e30, -1e30])
    labels[:] = torch.tensor([next(v for v in range(301) if v not in row) for row in indices.tolist()])
    stats, gradient = run(backend, arguments, divergence, tail)
    want, exact_gradient = exact(arguments, divergence, tail)
    torch.testing.assert_close(stats.double(), want, rtol=2e-6, atol=3e-6)
    assert relative_error(gradient, exact_gradient) <= 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.3), (1.5, 0.3), (1.5, 0.0)])
def test_minus_infinity_on_either_side_matches(backend, divergence, tail, temperature, alpha):
    arguments = case(9, 301, 8, temperature=temperature, alpha=alpha)
    student, log_probs, indices, labels = arguments[:4]
    labels[:] = 300
    student[:, 300] = 1.0
    log_probs[0, 3:], indices[0, 3:] = -math.inf, -(2**40)  # their places are not looked at
    log_probs[1], indices[1] = -math.inf, 2**31
    student[2, indices[2, :3]] = -math.inf
    student[3, indices[3]] = -math.inf
    student[4, :150] = -math.inf
    listed = student[5, indices[5]].clone()  # nothing but the listed entries
    student[5] = -math.inf
    student[5, indices[5]], labels[5] = listed, indices[5, 0]
    student[6, 300], student[6, 200:] = -math.inf, -1e30  # as some code masks
    student[7], labels[6], labels[7] = -math.inf, 0, 0
    student[8, indices[8]], log_probs[8, 4:] = -math.inf, -math.inf
    stats, gradient = run(backend, arguments, divergence, tail)
    want, exact_gradient = exact(arguments, divergence, tail)
    torch.testing.assert_close(stats.double(), want, rtol=2e-6, atol=3e-6)
    finite = [0, 1, 2, 3, 4, 5, 6, 8]  # the reference's gradient of an infinite CE is NaN
    assert relative_error(gradient[finite], exact_gradient[finite]) <= 1e-5
    assert gradient[7].count_nonzero() == 0


@pytest.mark.pairwise
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("listed", [1.0, 1.01])
def test_a_teacher_with_no_mass_left_has_an_empty_bucket(backend, divergence, listed):
    """Log-probabilities rounded to bf16 add up to more than 1 as often as to less. The bucket then has p = 0; reverse
    KL, infinite there, leaves its term out."""
    arguments = case(3, 100, 4, temperature=1.3)
    arguments.log_probs[:] = torch.tensor([0.5 * listed, 0.25, 0.125, 0.125]).log()
    stats, _ = run(backend, arguments, divergence, "bucket")
    assert stats.isfinite().all()
    if listed > 1 or divergence != "reverse_kl":  # the logarithms' own rounding decides whether anything is left
        assert_matches(backend, arguments, divergence, "bucket")
    if listed > 1 and divergence == "reverse_kl":
        q = torch.softmax(arguments.student.double() / 1.3, -1).gather(1, arguments.indices)
        log_p = torch.log_softmax(arguments.log_probs.double() / 1.3, -1)
        torch.testing.assert_close(stats[2, :-1].double(), (q * (q.log() - log_p)).sum(1)[:-1], rtol=1e-5, atol=1e-6)


@pytest.mark.pairwise
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("gap", [10.0, 30.0, 300.0])
def test_the_rest_of_a_confident_student_keeps_its_digits(backend, divergence, gap):
    """Of a student who is sure, the rest has a mass far below the rounding of the normaliser: e^-gap or so."""
    arguments = case(3, 500, 5, temperature=1.3)
    arguments.log_probs.sub_(1.0)  # most of the teacher's mass is elsewhere
    arguments.student.scatter_add_(1, arguments.indices, torch.full((3, 5), gap))
    assert_matches(backend, arguments, divergence, "bucket")


@pytest.mark.pairwise
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("gap", [30.0, 300.0])
def test_entries_that_the_student_thinks_impossible_match(backend, divergence, tail, gap):
    arguments = case(3, 500, 5, temperature=1.3)
    arguments.student.scatter_add_(1, arguments.indices, torch.full((3, 5), -gap))
    assert_matches(backend, arguments, divergence, tail)


# ---- values, layouts, transforms -------------------------------------------------------------------------------------


@pytest.mark.pairwise
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("log_prob_dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
def test_entries_and_labels_of_every_dtype_match(backend, tail, log_prob_dtype, index_dtype, label_dtype):
    arguments = case(3, 150, 6, torch.bfloat16)
    arguments = arguments._replace(
        log_probs=arguments.log_probs.to(log_prob_dtype),
        indices=arguments.indices.to(index_dtype),
        labels=arguments.labels.to(label_dtype),
    )
    assert_matches(backend, arguments, "jsd", tail)


@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("transform", [(0.25, 0.0), (1.0, 5.0), (2.0, 30.0)])
def test_scaled_and_softcapped_logits_match(backend, divergence, tail, transform):
    arguments = case(4, 200, 6, temperature=1.3)
    arguments.labels[1:3] = arguments.indices[1:3, 1]
    arguments.student[1, arguments.indices[1, 0]] = -math.inf
    arguments.student[2, (arguments.labels[2] + 1) % 200] = -math.inf
    assert_matches(backend, arguments, divergence, tail, transform=transform)


def test_values_for_each_token_match(backend):
    arguments = case(4, 211, 9)._replace(temperature=torch.rand(4) + 0.5, alpha=torch.rand(4))
    for tail in TAILS:
        assert_matches(backend, arguments, "reverse_kl", tail)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("power", [0, 1])
def test_every_share_of_a_mixture_and_every_scaling_match(backend, share, power):
    for divergence in ("jsd", "skew_forward_kl", "skew_reverse_kl"):
        arguments = case(3, 211, 9, temperature=1.7)
        assert_matches(backend, arguments, divergence, "bucket", teacher_share=share, temperature_power=power)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_rows_match_and_no_gradient_is_the_same_loss(backend, dtype):
    arguments = case(2, 77, 5, dtype)
    wide = torch.zeros(4, 2 * 77 + 3, dtype=dtype)
    wide[::2, 5:82] = arguments.student
    strided = arguments._replace(
        student=wide[::2, 5:82],
        log_probs=arguments.log_probs.T.contiguous().T,
        indices=arguments.indices.T.contiguous().T,
    )
    for tail in TAILS:
        assert_matches(backend, strided, "jsd", tail)
        stats, gradient = run(backend, strided, "jsd", tail, needs_grad=False)
        assert gradient.numel() == 0
        assert torch.equal(stats, run(backend, arguments, "jsd", tail)[0])


@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_a_gradient_written_over_the_logits_is_the_same(backend, divergence, tail, dtype, temperature):
    arguments = case(3, 301, 9, dtype, temperature)
    stats, gradient = run(backend, arguments, divergence, tail)
    stats_over, over = run(backend, arguments, divergence, tail, grad=arguments.student)
    assert over.data_ptr() == arguments.student.data_ptr()
    assert torch.equal(over, gradient)
    assert torch.equal(stats_over, stats)


# ---- rows apart ------------------------------------------------------------------------------------------------------


def test_no_rows_are_no_work(backend):
    stats, gradient = run(backend, case(0, 31, 3), "jsd", "bucket")
    assert stats.shape == (7, 0)
    assert gradient.shape == (0, 31)


@pytest.mark.parametrize("tail", TAILS)
def test_ignored_rows_cost_nothing_and_are_not_read(backend, tail):
    arguments = case(4, 100, 5)
    arguments.labels[1] = -100
    arguments.student[1], arguments.student[3] = math.nan, math.inf
    arguments.log_probs[1], arguments.indices[1], arguments.indices[3] = math.nan, 10**6, -5
    arguments.row_scale[1] = math.nan
    stats, gradient = run(backend, arguments, "jsd", tail)
    assert stats[:, [1, 3]].count_nonzero() == 0
    assert gradient[[1, 3]].count_nonzero() == 0
    assert_matches(backend, arguments, "jsd", tail)


@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["listed", "rest", "teacher"])
def test_a_nan_or_infinity_makes_its_row_nan_and_no_other(backend, divergence, tail, bad, where):
    arguments = case(4, 301, 5, temperature=1.3)
    stats, clean = run(backend, arguments, divergence, tail)
    if where == "teacher":
        arguments.log_probs[1, 2] = bad
    elif where == "listed":
        arguments.student[1, arguments.indices[1, 2]] = bad
    else:
        unlisted = next(v for v in range(300, 0, -1) if v not in arguments.indices[1])
        arguments.student[1, unlisted] = bad
    got, gradient = run(backend, arguments, divergence, tail)
    assert got[0].isnan().tolist() == [False, True, False, False]
    assert got[3, 1].isnan() == (where != "teacher")
    assert torch.equal(gradient[[0, 2, 3]], clean[[0, 2, 3]])
    assert torch.equal(got[:, [0, 2, 3]], stats[:, [0, 2, 3]])


@pytest.mark.pairwise("backend", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_a_small_divergence_keeps_its_digits(backend, divergence, distance):
    """Down to 1e-7 nats; a rest of many equal entries is what the teacher's bucket means at other temperatures."""
    arguments = case(3, 301, 9)
    arguments.student.copy_(torch.log_softmax(arguments.student, -1))
    exact_log_probs = arguments.student.double().log_softmax(-1).gather(1, arguments.indices)
    arguments.log_probs.copy_(exact_log_probs + distance * torch.randn(3, 9) - 0.3 * distance)
    stats, _ = run(backend, arguments, divergence, "bucket")
    want, _ = exact(arguments, divergence, "bucket")
    # what the student's normalisers do not know, over the distance: of second order but for total variation
    assert relative_error(stats[2], want[2]) <= 5e-6 / distance


def test_the_same_bits_come_from_any_number_of_threads():
    arguments = case(64, 3001, 16, torch.bfloat16, 1.3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run("cpp", arguments, "jsd", "bucket"))
    finally:
        torch.set_num_threads(before)
    for stats, gradient in results[1:]:
        assert torch.equal(stats, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_an_index_or_label_outside_the_vocabulary_is_named():
    arguments = case(4, 100, 5)
    for wrong in (100, -1):
        arguments.indices[1, 3] = wrong
        with pytest.raises(ValueError, match=f"index {wrong} of the teacher's entry 3 at token 1 is outside .* of 100"):
            run("cpp", arguments, "jsd", "bucket")
    arguments.indices[1, 3] = arguments.indices[1, 2]
    arguments.labels[2] = 100
    with pytest.raises(ValueError, match="label 100 at token 2 is outside"):
        run("cpp", arguments, "jsd", "bucket")
    with pytest.raises(ValueError, match="tail must be bucket or renormalise, got tail"):
        run("cpp", arguments._replace(labels=torch.zeros(4, dtype=torch.int64)), "jsd", "tail")


def test_more_entries_than_the_gpu_kernel_takes_are_refused():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="at most 1024 entries of the teacher a token, got 1025"):
        run("triton", case(1, 1100, 1025), "jsd", "bucket")


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_loss_takes_the_k_best_of_each_token(tail, dtype):
    """Chunks of 3 rows, of which one ends before the last supervised token, and a head with bias and softcap."""
    arguments = case(8, 203, 7, dtype)
    objective = Objective("jsd", temperature=1.3, alpha=0.3)
    head = [torch.randn(*shape).to(dtype) for shape in ((8, 16), (203, 16), (203,))]
    results = []
    for exact_side in (False, True):
        leaves = [(x.double() if exact_side else x).detach().requires_grad_(True) for x in head]
        teacher = TopKTeacher(arguments.log_probs, arguments.indices, tail)
        out = linear_distillation_loss(
            leaves[0], leaves[1], teacher, arguments.labels, objective,
            student_bias=leaves[2], logit_softcap=5.0, backend="reference" if exact_side else "cpp",
            **({} if exact_side else {"chunk_tokens": 3}),
        )  # fmt: skip
        out.loss.backward()
        results.append([out.loss, out.divergence, *(leaf.grad for leaf in leaves)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) <= (2e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton_device")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("V", "K"), [(50257, 64), (128256, 1024), (151936, 64)])
def test_a_whole_batch_matches_on_a_gpu(divergence, tail, V, K):
    assert_matches("triton", case(64, V, K, torch.bfloat16, 1.33), divergence, tail)
