"""The Triton kernel against the float64 reference: under Triton's interpreter without a GPU, on the GPU with one."""

import math

import pytest
import torch
from compare import GRADIENT_TOLERANCE, assert_matches, both, logits, relative_error, some_labels

from pocl_fast.losses import distillation_loss
from pocl_fast.objectives import DIVERGENCES, Objective

triton = pytest.importorskip("triton")

from pocl_fast.kernels import dense, tiles  # noqa: E402

ON_GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    """On the GPU: tensors are made there. Under the interpreter: fp32 becomes bf16 by rounding, as hardware does it,
    where the interpreter cuts off."""
    if ON_GPU:
        torch.set_default_device("cuda")
        yield
        torch.set_default_device("cpu")
        return
    from triton.language import bfloat16
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self, src, dst_type):
        if dst_type.scalar != bfloat16:
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(src.data.copy()).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view("uint16"), bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", create_fp_trunc)
    yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 128 logits, so that a short row has several."""
    monkeypatch.setattr(tiles, "choose_tile", lambda *_: tiles.Tile(32, 4, 1))


# 1 and 2: next to nothing; 31: within a tile; 300: tiles and a rest that ends within a vector. 0 tokens: no launch
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "V", "temperature", "alpha"),
    [(2, 1, 1.33, 0.3), (2, 2, 1.0, 0.3), (3, 31, 2.0, 0.0), (0, 31, 1.0, 0.3), (2, 300, 1.0, 0.3), (2, 300, 0.5, 1.0)],
)
def test_loss_metrics_and_gradient_match(divergence, dtype, N, V, temperature, alpha):
    assert_matches(
        logits(N, V, dtype=dtype),
        logits(N, V, dtype=dtype),
        some_labels(N, V),
        Objective(divergence, temperature=temperature, alpha=alpha),
        backend="triton",
    )


# with the tiles that the launcher chooses: a tile and one more logit; a real vocabulary, odd
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("N", "V", "dtype"), [(2, 4097, torch.float32), (1, 50257, torch.bfloat16)])
def test_a_real_vocabulary_matches(divergence, N, V, dtype):
    objective = Objective(divergence, temperature=1.33, alpha=0.3)
    assert_matches(logits(N, V, dtype=dtype), logits(N, V, dtype=dtype), some_labels(N, V), objective, backend="triton")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scaling", ["none", "tau", "tau2"])
def test_every_temperature_scaling_matches(divergence, scaling):
    objective = Objective(divergence, temperature=1.7, alpha=0.3, temperature_scaling=scaling)
    assert_matches(logits(2, 57), logits(2, 57), some_labels(2, 57), objective, backend="triton")


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_student_and_teacher_may_differ_in_dtype(student_dtype, teacher_dtype):
    student, teacher = logits(2, 517, dtype=student_dtype), logits(2, 517, dtype=teacher_dtype)
    assert_matches(student, teacher, some_labels(2, 517), Objective(alpha=0.3), backend="triton")


# the mixture's share is data: a very small and a very large one
@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_every_share_of_the_mixture_matches(divergence, share):
    objective = Objective(divergence, alpha=0.3, beta=share, skew=share)
    assert_matches(logits(2, 57), logits(2, 57), some_labels(2, 57), objective, backend="triton")


# a few more on either side; whole tiles more
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("V_s", "V_t", "temperature"),
    [(130, 128, 1.0), (128, 131, 1.5), (300, 101, 1.5), (64, 300, 1.0), (1, 5, 1.5), (5, 1, 1.0)],
)
def test_unequal_vocabularies_match(divergence, V_s, V_t, temperature):
    objective = Objective(divergence, temperature=temperature, alpha=0.3)
    assert_matches(logits(2, V_s), logits(2, V_t), some_labels(2, V_s), objective, backend="triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.3), (1.5, 0.0)])
def test_entries_of_minus_infinity_are_left_out_of_the_divergence(divergence, temperature, alpha):
    student, teacher = logits(7, 301), logits(7, 301)
    labels = some_labels(7, 301, ignored=False)
    student[0, 5], student[1, :200], student[2, -9:] = -math.inf, -math.inf, -math.inf
    teacher[0, 7], teacher[2, 3], teacher[3, 100:], teacher[4, :-1] = -math.inf, -math.inf, -math.inf, -math.inf
    student[5, :150], teacher[5, 150:] = -math.inf, -math.inf  # nothing in common
    teacher[6] = -math.inf
    labels[1], labels[0], labels[2] = 250, 6, 7  # CE stays finite
    labels[5] = 200
    objective = Objective(divergence, temperature=temperature, alpha=alpha)
    assert_matches(student, teacher, labels, objective, backend="triton")


# what some models mask with instead of −inf, and what overflows when it is scaled
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_number_as_a_mask_on_both_sides_matches(divergence, dtype):
    student, teacher = logits(2, 40, dtype=dtype), logits(2, 40, dtype=dtype)
    student[:, 30:], teacher[:, 30:] = torch.finfo(dtype).min, torch.finfo(dtype).min
    labels = torch.tensor([3, 4])
    assert_matches(student, teacher, labels, Objective(divergence, temperature=0.7, alpha=0.3), backend="triton")


def test_a_row_with_nothing_to_compare_has_no_divergence_and_no_gradient_of_it():
    student, teacher = logits(2, 40), logits(2, 40)
    student[0, :20], teacher[0, 20:] = -math.inf, -math.inf
    teacher[1] = -math.inf
    out, gradient, _, _ = both(student, teacher, torch.tensor([30, 0]), Objective(), backend="triton")
    assert out.per_token["divergence"].tolist() == [0, 0]
    assert gradient.count_nonzero() == 0


def test_a_label_of_minus_infinity_costs_infinitely_much_but_nothing_at_alpha_0():
    student, teacher = logits(3, 40), logits(3, 40)
    student[0, 4] = -math.inf
    student[1] = -math.inf
    labels = torch.tensor([4, 4, 4])
    for alpha, finite in ((0.0, [True, True, True]), (0.3, [False, False, True])):
        s = student.clone().requires_grad_(True)
        out = distillation_loss(s, teacher, labels, Objective(alpha=alpha), reduction="none", backend="triton")
        assert out.loss.isfinite().tolist() == finite
        assert not out.loss.isnan().any()
        out.loss.sum().backward()
        assert s.grad.isfinite().all()
        assert s.grad[1].count_nonzero() == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("bad", "side"), [(math.nan, "student"), (math.nan, "teacher"), (math.inf, "student")])
def test_a_nan_or_infinity_makes_its_row_nan_and_no_other(divergence, bad, side):
    sides = {"student": logits(3, 67), "teacher": logits(3, 67)}
    labels = some_labels(3, 67, ignored=False)
    objective = Objective(divergence, temperature=1.3, alpha=0.3)
    _, clean, _, _ = both(*sides.values(), labels, objective, backend="triton", reduction="sum")
    sides[side][1, 40] = bad
    got, gradient, _, _ = both(*sides.values(), labels, objective, backend="triton", reduction="none")
    assert got.loss.isnan().tolist() == [False, True, False]
    assert torch.equal(gradient[[0, 2]], clean[[0, 2]])
    assert got.metrics["student_entropy"].isnan() == (side == "student")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_huge_and_tiny_logits_match(divergence, size):
    """At ±1e4 most entries underflow on one side or both. A difference of such logits is known to about 1e-3 nats in
    fp32, and the gradient of reverse KL is such a difference. At ±1e-4 some p and q are nearer to each other than the
    normalisers are known, and TVD's gradient takes either side."""
    student, teacher = (torch.rand(3, 333) * 2 - 1) * size, (torch.rand(3, 333) * 2 - 1) * size
    got, gradient, want, exact = both(
        student, teacher, some_labels(3, 333), Objective(divergence, alpha=0.3), backend="triton"
    )
    assert relative_error(got.loss, want.loss) <= 2e-6
    assert relative_error(got.ce, want.ce) <= 2e-6
    loose = divergence == ("reverse_kl" if size > 1 else "tvd")
    assert relative_error(gradient, exact) <= (2e-2 if loose else 2e-6)


# the student a fine-tuned step away from the teacher, down to a divergence of 1e-9 nats; with and without gradient.
# (The C++ kernel's normalisers are double and it holds 1e-6 where here it is 2e-6.)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("distance", "tolerance"), [(1e-1, 1e-5), (1e-2, 1e-5), (1e-3, 1e-5), (1e-4, 1e-4)])
def test_a_small_divergence_keeps_its_digits(divergence, distance, tolerance):
    teacher = logits(2, 5003)
    student = teacher + distance * torch.randn(2, 5003)
    labels, objective = some_labels(2, 5003), Objective(divergence)
    got, _, want, _ = both(student, teacher, labels, objective, backend="triton")
    assert relative_error(got.per_token["divergence"], want.per_token["divergence"]) <= tolerance
    ungraded = distillation_loss(student, teacher, labels, objective, backend="triton")
    assert relative_error(ungraded.per_token["divergence"], want.per_token["divergence"]) <= tolerance


# an offset between the models, which no divergence depends on
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_an_offset_between_the_models_costs_no_digits(divergence):
    student, teacher = logits(3, 133), logits(3, 133) + 64.0
    student, teacher = student.bfloat16().float(), teacher.bfloat16().float()  # the offset itself must not round
    assert_matches(student, teacher, some_labels(3, 133), Objective(divergence, alpha=0.3), backend="triton")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_is_never_negative_and_0_between_equals(divergence):
    student = logits(6, 1003)
    labels = torch.zeros(6, dtype=torch.int64)
    nearly = student * (1 + 1e-7 * torch.randn(6, 1003))
    # TVD is of first order in the rounding of the shifted logits and of the normalisers, the others of second
    small = 1e-5 if divergence == "tvd" else 1e-10
    for teacher, limit in ((student, 0.0), (student + 8.0, small), (nearly, small)):
        out = distillation_loss(
            student, teacher, labels, Objective(divergence, temperature=1.3), reduction="none", backend="triton"
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
        student, teacher, labels, Objective(alpha=0.3), backend="triton", reduction="none", token_weights=weights
    )
    assert gradient[[2, 5]].count_nonzero() == 0
    assert got.loss[[2, 5]].tolist() == [0, 0]
    assert relative_error(got.loss, want.loss) <= 2e-6
    assert relative_error(gradient, exact) <= GRADIENT_TOLERANCE[torch.float32]


def test_values_for_each_token_match():
    N, V = 4, 211
    objective = Objective("reverse_kl", temperature=torch.rand(N) + 0.5, alpha=torch.rand(N))
    assert_matches(
        logits(N, V),
        logits(N, V),
        some_labels(N, V),
        objective,
        backend="triton",
        token_weights=torch.rand(N),
        reduction="none",
        upstream=torch.rand(N),
    )


# softcap of Gemma, scale of Granite, both, on either side; −inf stays what it is
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "transforms",
    [
        {"logit_softcap": 3.0},
        {"logit_scale": 0.25, "teacher_logit_scale": 2.0},
        {"logit_scale": 0.5, "logit_softcap": 5.0, "teacher_logit_softcap": 30.0},
    ],
)
def test_scaled_and_softcapped_logits_match(divergence, transforms):
    student, teacher = logits(3, 150), logits(3, 150)
    student[0, 7], teacher[1, 8] = -math.inf, -math.inf
    objective = Objective(divergence, temperature=1.3, alpha=0.3)
    assert_matches(student, teacher, torch.tensor([1, 2, 3]), objective, backend="triton", **transforms)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_strided_rows_match(divergence):
    """Slices of wider matrices, every second row, and one row for all."""
    wide = logits(4, 2 * 77 + 3)
    labels = some_labels(2, 77)
    for student in (wide[::2, 5:82], wide[:1, :77].expand(2, 77)):
        assert_matches(student, wide[1::2, 1:78], labels, Objective(divergence, alpha=0.3), backend="triton")


def test_rows_may_lie_beyond_32_bits():
    """A bf16 matrix whose last row starts at element 2**31 and more; the pages between are never touched."""
    stride = 2**31 + 64
    storage = torch.empty(stride + 128, dtype=torch.bfloat16)
    far = storage.as_strided((2, 100), (stride, 1))
    far.copy_(logits(2, 100, dtype=torch.bfloat16))
    assert_matches(far, far.flip(0), some_labels(2, 100), Objective(alpha=0.3), backend="triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("V_s", "V_t"), [(300, 300), (300, 150)])
def test_a_gradient_written_over_the_logits_is_the_same(divergence, V_s, V_t):
    student, teacher, labels = logits(3, V_s), logits(3, V_t), some_labels(3, V_s)
    arguments = (teacher, labels, torch.tensor([1.3]), torch.tensor([0.3]), torch.ones(3))
    options = {
        "divergence": divergence,
        "teacher_share": 0.3,
        "temperature_power": 2,
        "ignore_index": -100,
        "transforms": [1.0, 0.0, 1.0, 0.0],
        "needs_grad": True,
    }
    stats, grad = dense.distillation_rows(student, *arguments, **options)
    stats_over, over = dense.distillation_rows(student, *arguments, **options, grad=student)
    assert over.data_ptr() == student.data_ptr()
    assert torch.equal(over, grad)
    assert torch.equal(stats_over, stats)


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("V", [50257, 128256, 151936])
def test_a_whole_batch_matches_on_a_gpu(divergence, V):
    student, teacher = logits(64, V, dtype=torch.bfloat16), logits(64, V, dtype=torch.bfloat16)
    objective = Objective(divergence, temperature=1.33, alpha=0.3)
    assert_matches(student, teacher, some_labels(64, V), objective, backend="triton")


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_and_a_captured_graph_follows_a_changed_temperature():
    student, teacher = logits(8, 4096).requires_grad_(True), logits(8, 4096)
    labels, tau = some_labels(8, 4096), torch.tensor([1.0])
    objective = Objective("jsd", temperature=tau, alpha=0.3)

    def step():
        student.grad = None
        out = distillation_loss(student, teacher, labels, objective, backend="triton")
        out.loss.backward()
        return out.loss

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    captured = student.grad
    for value in (1.0, 2.5):
        tau.fill_(value)
        graph.replay()
        again, gradient, _, _ = both(
            student, teacher, labels, Objective("jsd", temperature=value, alpha=0.3), backend="triton"
        )
        torch.testing.assert_close(loss, again.loss)
        torch.testing.assert_close(captured, gradient)


@pytest.mark.gpu
def test_torch_compile_takes_the_loss_without_a_graph_break():
    student, teacher, labels = logits(8, 4096), logits(8, 4096), some_labels(8, 4096)

    def loss(s):
        return distillation_loss(s, teacher, labels, Objective("jsd", alpha=0.3), backend="triton").loss

    plain, compiled = student.clone().requires_grad_(True), student.clone().requires_grad_(True)
    loss(plain).backward()
    torch.compile(loss, fullgraph=True)(compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad)
