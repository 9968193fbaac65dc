"""The fused linear loss against the float64 reference, and the reference against whole logits and `distillation_loss`.

The Triton row kernel runs on the GPU with one, under Triton's interpreter without. The kernel of each divergence and
dtype is that of test_dense.py, so that most grids here are of pairs of values.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compare import in_float64, logits, relative_error, some_labels
from torch.nn import functional as F

from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective
from pocl_fast.loss.teacher_output import DenseTeacher, LinearTeacher

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("dense", "linear", "none")
# of a gradient's norm. fp32: a logit is a sum of H products, known to about 1e-6, so is a log-ratio. bf16: the gradient
# by the logits is rounded to it on its way into the products, their results once more. fp16: the results alone
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def on_the_device(request):
    """On a GPU the Triton tests make their tensors there."""
    triton = "triton" in request.node.name
    if triton:
        pytest.importorskip("triton")
    if triton and torch.cuda.is_available():
        torch.set_default_device("cuda")
        yield
        torch.set_default_device("cpu")
    else:
        yield


def head(V, H, dtype=torch.float32):
    """An lm_head whose logits of normal hidden states have a spread of 3."""
    return (torch.randn(V, H) * 3 * H**-0.5).to(dtype)


def a_teacher(kind, N, V, dtype=torch.float32, H=21, bias=False):
    if kind == "none":
        return None
    if kind == "dense":
        return DenseTeacher(logits(N, V, dtype=dtype))
    return LinearTeacher(torch.randn(N, H).to(dtype), head(V, H, dtype), torch.randn(V).to(dtype) if bias else None)


def exact_teacher(teacher):
    return teacher and replace(teacher, **{name: in_float64(value) for name, value in vars(teacher).items()})


def gradients(hidden, weight, bias, teacher, labels, objective, upstream=None, **options):
    """The output and the gradients of hidden states, weight and bias (None without one)."""
    leaves = [None if x is None else x.detach().requires_grad_(True) for x in (hidden, weight, bias)]
    out = linear_distillation_loss(*leaves[:2], teacher, labels, objective, student_bias=leaves[2], **options)
    (out.loss if upstream is None else out.loss * upstream).sum().backward()
    return out, [None if x is None else x.grad for x in leaves]


def assert_matches(hidden, weight, bias, teacher, labels, objective, *, backend, tolerance=None, **options):
    """Loss, every metric of every token and the gradients agree with the float64 reference's."""
    got, grads = gradients(hidden, weight, bias, teacher, labels, objective, backend=backend, **options)
    exact_objective = replace(
        objective, temperature=in_float64(objective.temperature), alpha=in_float64(objective.alpha)
    )
    want, exact = gradients(
        hidden.double(), weight.double(), in_float64(bias), exact_teacher(teacher), labels, exact_objective, **options
    )
    assert want.loss.dtype == torch.float64
    assert got.num_tokens == want.num_tokens
    assert relative_error(got.loss, want.loss) <= 3e-6
    for name, value in want.per_token.items():
        torch.testing.assert_close(
            got.per_token[name].double(), value, rtol=2e-6, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    unit = 2**-24 if hidden.dtype == torch.float16 else 0.0
    for x, gradient, value in zip((hidden, weight, bias), grads, exact, strict=True):
        if x is not None:
            assert (gradient.dtype, gradient.shape) == (x.dtype, x.shape)
            assert relative_error(gradient, value, unit) <= (tolerance or GRADIENT_TOLERANCE[hidden.dtype])


# ---- the reference itself ----


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["dense", "linear"])
def test_the_reference_is_the_loss_of_the_logits(divergence, kind):
    hidden, weight, bias = torch.randn(7, 13).double(), head(31, 13).double(), torch.randn(31).double()
    teacher, labels = exact_teacher(a_teacher(kind, 7, 29, bias=True)), some_labels(7, 31)
    objective = Objective(divergence, temperature=1.3, alpha=0.3)
    options = {"logit_scale": 0.5, "logit_softcap": 4.0, "token_weights": torch.rand(7).double(), "num_items": 11}
    got, grads = gradients(hidden, weight, bias, teacher, labels, objective, **options)

    leaves = [x.clone().requires_grad_(True) for x in (hidden, weight, bias)]
    teacher_logits = teacher.logits if kind == "dense" else F.linear(teacher.hidden, teacher.weight, teacher.bias)
    want = distillation_loss(F.linear(*leaves), teacher_logits, labels, objective, **options)
    want.loss.backward()
    torch.testing.assert_close(got.loss, want.loss)
    for gradient, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad)
    for name, value in want.per_token.items():
        torch.testing.assert_close(got.per_token[name], value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_references_gradient_is_that_of_its_loss(kind, divergence):
    teacher, labels = exact_teacher(a_teacher(kind, 4, 7, H=3)), some_labels(4, 9)
    objective = Objective(divergence, temperature=1.3, alpha=1.0 if kind == "none" else 0.3)

    def loss(hidden, weight, bias):
        return linear_distillation_loss(
            hidden, weight, teacher, labels, objective, student_bias=bias, reduction="none", logit_softcap=5.0
        ).loss

    leaves = [x.double().requires_grad_(True) for x in (torch.randn(4, 5), head(9, 5), torch.randn(9))]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


# ---- the kernels ----


# 31: less than a slice of the weight; 4097: past one (see projection.SLICE). 0, 1 and 7 tokens; chunks of one token, of
# tokens that leave a rest, and larger than all. Odd hidden sizes, which no vector of any build divides.
@pytest.mark.pairwise("divergence", "dtype")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("N", "V", "H", "chunk_tokens"),
    [(7, 31, 37, 1), (7, 31, 37, 3), (7, 4097, 33, None), (1, 4097, 35, 64), (0, 31, 5, 2)],
)
def test_cpp_matches_at_every_size(divergence, dtype, kind, N, V, H, chunk_tokens):
    objective = Objective(divergence, temperature=1.33, alpha=1.0 if kind == "none" else 0.3)
    bias = torch.randn(V).to(dtype)
    assert_matches(
        torch.randn(N, H).to(dtype),
        head(V, H, dtype),
        bias,
        a_teacher(kind, N, V, dtype),
        some_labels(N, V),
        objective,
        backend="cpp",
        chunk_tokens=chunk_tokens,
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "linear"), (torch.bfloat16, "dense"), (torch.float16, "none")]
)
@pytest.mark.parametrize(("N", "V", "H", "chunk_tokens"), [(4, 31, 37, 2), (0, 31, 5, 2)])
def test_triton_matches(divergence, dtype, kind, N, V, H, chunk_tokens):
    objective = Objective(divergence, temperature=1.33, alpha=1.0 if kind == "none" else 0.3)
    assert_matches(
        torch.randn(N, H).to(dtype),
        head(V, H, dtype),
        torch.randn(V).to(dtype),
        a_teacher(kind, N, V, dtype),
        some_labels(N, V),
        objective,
        backend="triton",
        chunk_tokens=chunk_tokens,
    )


def test_triton_matches_past_a_slice_of_the_weight():
    assert_matches(
        torch.randn(2, 9),
        head(4097, 9),
        None,
        a_teacher("linear", 2, 4097),
        some_labels(2, 4097),
        Objective("reverse_kl", alpha=0.3),
        backend="triton",
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "linear"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_teacher_has_a_dtype_a_hidden_size_and_a_bias_of_its_own(dtype, teacher_dtype, kind, bias):
    assert_matches(
        torch.randn(7, 37).to(dtype),
        head(300, 37, dtype),
        torch.randn(300).to(dtype) if bias else None,
        a_teacher(kind, 7, 300, teacher_dtype, H=53, bias=bias),
        some_labels(7, 300),
        Objective(temperature=1.3, alpha=0.3),
        backend="cpp",
        chunk_tokens=4,
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["dense", "linear"])
@pytest.mark.parametrize(("V_s", "V_t"), [(130, 128), (128, 131), (64, 4097), (4097, 64)])
def test_unequal_vocabularies_match(divergence, kind, V_s, V_t):
    assert_matches(
        torch.randn(6, 17),
        head(V_s, 17),
        None,
        a_teacher(kind, 6, V_t),
        some_labels(6, V_s),
        Objective(divergence, alpha=0.3),
        backend="cpp",
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transforms", [(0.25, 3.0, 1.0, None), (1.0, 30.0, 0.5, 30.0), (2.0, None, 0.1, None)])
def test_scales_and_softcaps_match(divergence, kind, transforms):
    scale, softcap, teacher_scale, teacher_softcap = transforms
    teacher = a_teacher(kind, 6, 300)
    if teacher is not None:
        teacher = replace(teacher, logit_scale=teacher_scale, logit_softcap=teacher_softcap)
    assert_matches(
        torch.randn(6, 37),
        head(300, 37),
        torch.randn(300),
        teacher,
        some_labels(6, 300),
        Objective(divergence, temperature=1.3, alpha=1.0 if kind == "none" else 0.3),
        backend="cpp",
        logit_scale=scale,
        logit_softcap=softcap,
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "mean"},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"reduction": "mean", "num_items": 29},
        {"reduction": "mean", "num_items": torch.tensor(29)},
        {"reduction": "mean", "token_weights": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 0.1])},
        {"reduction": "none", "token_weights": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 0.1])},
        {"reduction": "mean", "upstream": -2.5},
        {"reduction": "none", "upstream": torch.tensor([0.5, -2.0, 9.0, 0.0, 3.0, 1.0, 0.1])},
    ],
    ids=lambda options: "-".join(f"{key}" for key in options) + "-" + options["reduction"],
)
def test_reductions_weights_and_incoming_gradients_match(dtype, kind, options):
    assert_matches(
        torch.randn(7, 37).to(dtype),
        head(131, 37, dtype),
        torch.randn(131).to(dtype),
        a_teacher(kind, 7, 131, dtype),
        some_labels(7, 131),
        Objective(temperature=1.3, alpha=1.0 if kind == "none" else 0.3),
        backend="cpp",
        chunk_tokens=2,
        **options,
    )


@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_without_a_teacher_there_is_no_divergence(backend, divergence):
    out, _ = gradients(
        torch.randn(3, 9),
        head(31, 9),
        None,
        None,
        some_labels(3, 31),
        Objective(divergence, temperature=1.3, alpha=1.0),
        backend=backend,
        logit_softcap=2.0,
    )
    assert out.divergence.abs() <= 1e-7
    torch.testing.assert_close(out.loss, out.ce)
    assert out.metrics["agreement"] == 1


# values that belong to a token follow it into its chunk
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_temperatures_and_alphas_of_tokens_match(reduction):
    objective = Objective("jsd", temperature=torch.rand(7) + 0.7, alpha=torch.rand(7))
    assert_matches(
        torch.randn(7, 37),
        head(131, 37),
        None,
        a_teacher("linear", 7, 131),
        some_labels(7, 131),
        objective,
        backend="cpp",
        chunk_tokens=2,
        reduction=reduction,
    )


def test_sequences_are_rows():
    hidden, weight, labels = torch.randn(2, 3, 37), head(131, 37), some_labels(6, 131).view(2, 3)
    teacher = LinearTeacher(torch.randn(2, 3, 21), head(131, 21))
    assert_matches(hidden, weight, None, teacher, labels, Objective(alpha=0.3), backend="cpp")
    hidden = torch.randn(3, 2, 37).transpose(0, 1)  # rows that are no view
    assert_matches(hidden, weight, None, teacher, labels, Objective(alpha=0.3), backend="cpp")


# what ignored rows hold is never looked at
@pytest.mark.parametrize("kind", ["dense", "linear"])
def test_a_nan_in_an_ignored_row_changes_nothing(kind):
    hidden, weight, labels, teacher = torch.randn(6, 9), head(31, 9), some_labels(6, 31), a_teacher(kind, 6, 31)
    clean, grads = gradients(hidden, weight, None, teacher, labels, Objective(alpha=0.3))
    hidden[2] = torch.nan
    (teacher.logits if kind == "dense" else teacher.hidden)[5] = torch.nan
    got, got_grads = gradients(hidden, weight, None, teacher, labels, Objective(alpha=0.3))
    assert torch.equal(got.loss, clean.loss)
    assert torch.equal(got_grads[0], grads[0])
    assert torch.equal(got_grads[1], grads[1])


def test_a_nan_in_a_supervised_row_makes_the_loss_nan_and_no_other_token():
    hidden, labels = torch.randn(6, 9), some_labels(6, 31, ignored=False)
    hidden[2, 4] = torch.nan
    out, (grad, _, _) = gradients(
        hidden, head(31, 9), None, a_teacher("linear", 6, 31), labels, Objective(alpha=0.3), reduction="none"
    )
    assert out.loss.isnan().tolist() == [False, False, True, False, False, False]
    assert grad.isnan().any(1).tolist() == [False, False, True, False, False, False]


# logits rounded to bf16 would err by about 1 here: the divergence is all in digits that bf16 does not have
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3), (torch.float32, 1e-4)])
def test_a_near_teacher_gives_an_exact_gradient(dtype, tolerance):
    hidden, weight = torch.randn(16, 96).to(dtype), head(4200, 96, dtype)
    moved = torch.randn(16, 96)
    gap = (moved @ weight.float().t()).std()
    teacher = LinearTeacher(hidden.float() + moved * (0.05 / gap), weight.float())
    labels = some_labels(16, 4200)
    objective = Objective(temperature=1.33)
    _, (got, _, _) = gradients(hidden, weight, None, teacher, labels, objective, backend="cpp")
    _, (exact, _, _) = gradients(hidden.double(), weight.double(), None, exact_teacher(teacher), labels, objective)
    assert relative_error(got, exact, 2**-24 if dtype == torch.float16 else 0.0) <= tolerance


# thousands of tokens, a mean, and a GradScaler: what is divided first is below fp16's smallest number
def test_gradients_of_fp16_keep_their_digits_under_a_grad_scaler():
    N, V, H = 64, 131, 37
    hidden, weight = torch.randn(N, H).half(), head(V, H, torch.float16)
    assert_matches(
        hidden,
        weight,
        torch.randn(V).half(),
        a_teacher("linear", N, V),
        some_labels(N, V),
        Objective(alpha=0.3),
        backend="cpp",
        num_items=1e6,
        upstream=2.0**16,
    )
