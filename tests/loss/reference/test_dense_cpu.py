"""The C++ kernel against the float64 reference at the sizes of real models, in every build that this processor can run.

What it shares with the Triton kernel: test_dense.py.
"""

import math

import pytest
import torch
from compare import GRADIENT_TOLERANCE, assert_matches, both, logits, some_labels

from pocl_fast import _C
from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=_C.supported_isas(), autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("POCL_FAST_ISA", request.param)
    assert _C.isa() == request.param
    return request.param


# 31: vectors and a rest; 4097: past the blocks that are summed in fp32; 50257: a real vocabulary, odd. 1 and 7 tokens:
# fewer than threads, and not a multiple of them. Each build, divergence and dtype is code of its own: all of these.
@pytest.mark.pairwise("isa", "divergence", "dtype")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "V"), [(7, 31), (7, 4097), (1, 4097), (3, 50257)])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.3), (1.33, 0.3), (2.0, 0.0), (0.5, 1.0)])
def test_loss_metrics_and_gradient_match(divergence, dtype, N, V, temperature, alpha):
    assert_matches(
        logits(N, V, dtype=dtype),
        logits(N, V, dtype=dtype),
        some_labels(N, V),
        Objective(divergence, temperature=temperature, alpha=alpha),
        backend="cpp",
    )


# 4097: a narrow vector's sums of one block have the most terms; rows enough for their mean error to be steady
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_a_divergence_keeps_its_digits_however_narrow_the_vectors_are(divergence):
    student, teacher, labels = logits(300, 4097), logits(300, 4097), some_labels(300, 4097, False)
    objective = Objective(divergence, alpha=0.0)
    got = distillation_loss(student, teacher, labels, objective, backend="cpp", reduction="none").loss
    exact = distillation_loss(
        student.double(), teacher.double(), labels, objective, backend="reference", reduction="none"
    ).loss
    assert ((got.double() - exact) / exact).square().mean().sqrt() < 2.5e-7


# the largest vocabulary in wide use, and gradients large enough to be streamed past the caches
@pytest.mark.parametrize(("dtype", "N", "V"), [(torch.float32, 28, 151936), (torch.bfloat16, 3, 151936)])
def test_a_large_vocabulary_matches(isa, dtype, N, V):
    if isa == "plain":
        N = 2
    assert_matches(
        logits(N, V, dtype=dtype), logits(N, V, dtype=dtype), some_labels(N, V), Objective(alpha=0.3), backend="cpp"
    )


# the transforms are taken before any divergence, by code of each build and dtype, whose pair is among those that run
@pytest.mark.pairwise("isa", "divergence")
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


# a few more on either side, and a whole vector more; with code of each build, divergence and dtype
@pytest.mark.pairwise("isa", "divergence", "dtype")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V_s", "V_t"), [(130, 128), (128, 131), (64, 4097), (4097, 64)])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_unequal_vocabularies_match(divergence, dtype, V_s, V_t, temperature):
    objective = Objective(divergence, temperature=temperature, alpha=0.3)
    assert_matches(
        logits(6, V_s, dtype=dtype), logits(6, V_t, dtype=dtype), some_labels(6, V_s), objective, backend="cpp"
    )


def test_a_batch_may_have_more_logits_than_32_bits_count(tmp_path):
    """Two supervised tokens among 14 200 of a sparse file, which takes no more room than what is written to it."""
    N, V = 14_200, 151_936
    assert N * V > 2**31
    sides, tokens = [], [3, N - 1]
    for side in ("student", "teacher"):
        matrix = torch.from_file(str(tmp_path / side), shared=True, size=N * V, dtype=torch.bfloat16).view(N, V)
        matrix[tokens] = logits(2, V, dtype=torch.bfloat16)
        sides.append(matrix)
    labels = torch.full((N,), -100)
    labels[tokens] = torch.tensor([5, V - 1])
    objective = Objective("jsd", temperature=1.33, alpha=0.3)
    got = distillation_loss(*sides, labels, objective)
    exact = distillation_loss(*(matrix[tokens].double() for matrix in sides), labels[tokens], objective)
    torch.testing.assert_close(got.loss.double(), exact.loss, rtol=2e-6, atol=0)
    for name, want in exact.per_token.items():
        values = got.per_token[name].double()
        torch.testing.assert_close(values[tokens], want, rtol=2e-6, atol=3e-6)
        assert values.count_nonzero() == want.count_nonzero()


# threads take rows, whatever these are: of the dtypes each is with every build and every divergence
@pytest.mark.pairwise("isa", "divergence")
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


def neighbours_of_every_kind(N, V, dtype, gap=1e-3):
    """Logits, labels, temperatures and alphas of rows that the kernel treats in different ways, in random order."""
    student, teacher, labels = logits(N, V, dtype=dtype), logits(N, V, dtype=dtype), some_labels(N, V)
    kinds = torch.randint(0, 8, (N,))
    student[kinds == 1, V // 2] = -math.inf  # swept as a copy, after a part of the row was swept where it lies
    student[kinds == 2, V - 1] = 60.0  # a block that is swept again
    teacher[kinds == 3] = (student[kinds == 3] + gap * torch.randn(V)).to(dtype)
    temperatures = torch.tensor([1.0, 1.0, 2.0, 1.33])[torch.randint(0, 4, (N,))]
    alphas = torch.tensor([0.3, 0.3, 0.0, 1.0])[torch.randint(0, 4, (N,))]
    return student, teacher, labels, temperatures, alphas


# a row's gradient is written while the next one is swept, by code of each build, divergence and dtype
@pytest.mark.pairwise("isa", "divergence", "dtype")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [2, 33, 2048, 4097])
def test_a_row_has_the_same_bits_alone_as_among_others(divergence, dtype, V):
    student, teacher, labels, temperatures, alphas = neighbours_of_every_kind(24, V, dtype)

    def run(rows):
        s = student[rows].clone().requires_grad_(True)
        objective = Objective(divergence, temperature=temperatures[rows], alpha=alphas[rows])
        out = distillation_loss(s, teacher[rows], labels[rows], objective, backend="cpp", reduction="none")
        (out.loss * torch.arange(1.0, 25.0)[rows]).sum().backward()
        return [out.loss.detach(), s.grad, *out.per_token.values()]

    together = run(slice(None))
    for n in range(24):
        for all_rows, alone in zip(together, run(slice(n, n + 1)), strict=True):
            assert torch.equal(all_rows[n : n + 1], alone)


# rows that begin at every offset from a cache line; gradients of over 16 MiB, which are streamed past the caches
@pytest.mark.pairwise("isa", "divergence")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "N", "V"), [(torch.float32, 95, 50257), (torch.bfloat16, 530, 16001)])
def test_rows_of_every_kind_match_beside_each_other(full, isa, divergence, dtype, N, V):
    """Every row is what it is in parts of the batch that are not streamed; with the reference, which takes ten times as
    long as all else, 16 are compared, or with --full all."""
    if isa == "plain":  # which streams nothing
        N = 20
    gap = 0.3 if divergence == "tvd" else 1e-3  # which side of total variation's kink is rounding where p is nearly q
    student, teacher, labels, temperatures, alphas = neighbours_of_every_kind(N, V, dtype, gap)

    def run(rows):
        objective = Objective(divergence, temperature=temperatures[rows], alpha=alphas[rows])
        s = student[rows].detach().requires_grad_(True)
        out = distillation_loss(s, teacher[rows], labels[rows], objective, backend="cpp", reduction="none")
        out.loss.sum().backward()
        return out, s.grad

    together, gradient = run(slice(None))
    kink = 1e-4 if divergence == "tvd" else 0.0  # where p is q, rounding decides an entry's sign
    bound = max(GRADIENT_TOLERANCE[dtype], kink)
    for rows in torch.arange(N).split(40):
        out, part = run(rows)
        for name, values in out.per_token.items():
            torch.testing.assert_close(together.per_token[name][rows], values, rtol=2e-6, atol=3e-6)
        errors = torch.linalg.vector_norm(gradient[rows] - part, dim=1, dtype=torch.float32)
        sizes = torch.linalg.vector_norm(part, dim=1, dtype=torch.float32)
        assert (errors <= bound * sizes.clamp_min(1e-2)).all()  # of a certain row it is rounding
    rows = torch.arange(N) if full else torch.randperm(N)[:16]
    objective = Objective(divergence, temperature=temperatures[rows], alpha=alphas[rows])
    assert_matches(student[rows], teacher[rows], labels[rows], objective, backend="cpp")


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
