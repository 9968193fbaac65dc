"""What `distillation_loss` is, and which arguments it refuses.

Its numbers: reference/. Autograd and compilation: test_torch_citizenship.py."""

import math
import subprocess
import sys

import pytest
import torch
from loss_batch import BACKENDS, N, V, some_logits
from torch.nn import functional as F

from pocl_fast.loss import reference
from pocl_fast.loss.arguments import Settings, Tokens
from pocl_fast.loss.dense import DistillationLoss, distillation_loss, shift_labels
from pocl_fast.loss.objective import DIVERGENCES, Objective

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture
def batch(seed):
    return some_logits()


# ---- the definition ----


# torch's own kl_div and cross_entropy, combined by hand: neither the kernel nor the reference
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_is_what_the_paper_writes(batch, backend, divergence):
    student, teacher, labels = batch
    tau, alpha = 1.7, 0.3
    kept = labels != -100
    s, t = student[kept].double(), teacher[kept].double()
    q, p = torch.softmax(s / tau, -1), torch.softmax(t / tau, -1)

    def kl(a, b):
        return F.kl_div(b.log(), a, reduction="batchmean")

    beta, skew = 0.3, 0.2
    m = beta * p + (1 - beta) * q
    kd = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skew_forward_kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - skew) * p + skew * q),
        "tvd": lambda: (p - q).abs().sum() / (2 * len(p)),
    }[divergence]()
    factor = tau if divergence == "tvd" else tau**2
    ce = F.cross_entropy(s, labels[kept])
    objective = Objective(divergence, tau, alpha, beta=beta, skew=skew)
    out = distillation_loss(student, teacher, labels, objective, backend=backend)
    torch.testing.assert_close(out.loss.double(), alpha * ce + (1 - alpha) * factor * kd, rtol=2e-6, atol=0)
    torch.testing.assert_close(out.divergence.double(), kd, rtol=2e-6, atol=0)
    torch.testing.assert_close(out.ce.double(), ce, rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("beta", "kl"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_at_its_ends_is_a_kl(batch, backend, beta, kl):
    got, want = (distillation_loss(*batch, o, backend=backend) for o in (Objective("jsd", beta=beta), Objective(kl)))
    assert torch.equal(got.loss, want.loss)


# Gemma's, Granite's and Cohere's heads: what the model itself would have handed over, and the gradient before that
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_and_a_softcap_are_the_models_own(batch, backend):
    student, teacher, labels = batch
    raw = student.clone().requires_grad_(True)
    capped = raw.clone()
    options = {"logit_scale": 0.5, "logit_softcap": 2.0, "teacher_logit_softcap": 4.0}
    got = distillation_loss(raw, teacher, labels, Objective(alpha=0.3), backend=backend, **options).loss
    (gradient,) = torch.autograd.grad(got, raw)
    by_hand = distillation_loss(
        2 * torch.tanh(capped * 0.5 / 2), 4 * torch.tanh(teacher / 4), labels, Objective(alpha=0.3), backend="reference"
    ).loss
    torch.testing.assert_close(got, by_hand)
    torch.testing.assert_close(gradient, torch.autograd.grad(by_hand, raw)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_metrics_are_means_over_supervised_tokens(batch, backend):
    student, teacher, labels = batch
    teacher[0] = student[0] + 0.1 * torch.rand(V)  # one agreement, one right answer
    labels[0] = student[0].argmax()
    out = distillation_loss(student, teacher, labels, Objective(), backend=backend)
    kept = labels != -100
    s, t = student[kept], teacher[kept]
    entropies = [torch.distributions.Categorical(logits=x).entropy().mean() for x in (s, t)]
    torch.testing.assert_close(out.metrics["student_entropy"], entropies[0])
    torch.testing.assert_close(out.metrics["teacher_entropy"], entropies[1])
    torch.testing.assert_close(out.metrics["accuracy"], (s.argmax(-1) == labels[kept]).float().mean())
    torch.testing.assert_close(out.metrics["agreement"], (s.argmax(-1) == t.argmax(-1)).float().mean())
    assert out.num_tokens == kept.sum()
    assert all(value.shape == (N,) for value in out.per_token.values())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("V_s", "V_t"), [(7, 7), (9, 7), (7, 9)])
@pytest.mark.parametrize("with_infinities", [False, True])
def test_the_references_gradient_is_that_of_its_loss(divergence, V_s, V_t, with_infinities):
    student = torch.randn(4, V_s, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, V_t, dtype=torch.float64)
    labels = torch.tensor([0, -100, 3, 2])
    if with_infinities:
        teacher[0, 1] = teacher[2, 4] = -torch.inf

    def loss(s):
        return distillation_loss(
            s, teacher, labels, Objective(divergence, temperature=1.3, alpha=0.3), reduction="none"
        ).loss

    assert torch.autograd.gradcheck(loss, (student,))
    assert torch.autograd.gradgradcheck(loss, (student,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_ignored_tokens_costs_nothing(batch, backend):
    student, teacher, labels = batch
    student = student.requires_grad_(True)
    out = distillation_loss(student, teacher, torch.full_like(labels, -100), Objective(alpha=0.3), backend=backend)
    out.loss.backward()
    assert (out.loss, out.ce, out.divergence, out.num_tokens) == (0, 0, 0, 0)
    assert student.grad.count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_costs_nothing(backend):
    student = torch.randn(0, V, requires_grad=True)
    out = distillation_loss(student, torch.randn(0, V), torch.zeros(0, dtype=torch.int64), Objective(), backend=backend)
    out.loss.backward()
    assert out.loss == 0
    assert student.grad.shape == (0, V)


def test_batches_of_sequences_are_rows(batch):
    student, teacher, labels = batch
    flat = distillation_loss(student, teacher, labels, Objective(alpha=0.3))
    folded = distillation_loss(student.view(2, 3, V), teacher.view(2, 3, V), labels.view(2, 3), Objective(alpha=0.3))
    assert torch.equal(flat.loss, folded.loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_may_be_int32_and_the_ignored_one_another(batch, backend):
    student, teacher, labels = batch
    usual = distillation_loss(student, teacher, labels, Objective(alpha=0.3), backend=backend).loss
    other = torch.where(labels == -100, -1, labels).int()
    options = {"ignore_index": -1, "backend": backend}
    assert torch.equal(distillation_loss(student, teacher, other, Objective(alpha=0.3), **options).loss, usual)


def test_labels_shift_as_transformers_shifts_them():
    assert shift_labels(torch.tensor([[1, 2, 3], [4, -100, 6]])).tolist() == [[2, 3, -100], [-100, 6, -100]]


def test_the_module_gives_what_the_function_gives(batch):
    student, teacher, labels = batch
    module = DistillationLoss(Objective(alpha=0.3), reduction="none", logit_softcap=5.0)
    weights = torch.rand(N)
    got = module(student, teacher, labels, token_weights=weights)
    want = distillation_loss(
        student, teacher, labels, module.objective, reduction="none", token_weights=weights, logit_softcap=5.0
    )
    assert torch.equal(got.loss, want.loss)
    assert "forward_kl" in repr(module)


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logits": torch.zeros(V)}, r"student_logits must be \[N, V\] or \[B, T, V\]"),
        ({"teacher_logits": torch.zeros(N + 1, V)}, "all but the last dimension"),
        ({"labels": torch.zeros(N + 1, dtype=torch.int64)}, "labels must be"),
        ({"labels": torch.zeros(N)}, "int32 or int64"),
        ({"teacher_logits": torch.zeros(N, 0)}, "vocabulary is empty"),
        ({"student_logits": torch.zeros(N, V, dtype=torch.int64)}, "fp32, bf16, fp16 or float64"),
        ({"teacher_logits": torch.zeros(N, V).to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
        ({"token_weights": torch.ones(N - 1)}, "token_weights must be one value or one a token"),
        ({"objective": Objective(temperature=torch.ones(N + 1))}, "temperature must be one value"),
        ({"objective": Objective(alpha=torch.ones(2))}, "alpha must be one value"),
        ({"num_items": 0}, "num_items must be positive"),
        ({"num_items": math.nan}, "num_items must be positive"),
        ({"num_items": -1, "reduction": "sum"}, "num_items must be positive"),
        ({"num_items": torch.ones(N)}, "num_items must be one number"),
        ({"reduction": "median"}, "reduction must be"),
        ({"backend": "cuda"}, "backend must be"),
        ({"logit_scale": 0.0}, "logit_scale must be positive"),
        ({"teacher_logit_softcap": -1.0}, "teacher_logit_softcap must be positive"),
        ({"backend": "cpp", "student_logits": torch.zeros(N, V, dtype=torch.float64)}, "fp32, bf16 and fp16"),
    ],
)
def test_a_wrong_argument_is_refused_at_the_door(change, message):
    arguments = {
        "student_logits": torch.zeros(N, V),
        "teacher_logits": torch.zeros(N, V),
        "labels": torch.zeros(N, dtype=torch.int64),
        "objective": Objective(),
    }
    with pytest.raises(ValueError, match=message):
        distillation_loss(**(arguments | change))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [V, -1, 2**40])
def test_a_label_outside_the_vocabulary_is_refused(batch, backend, label):
    student, teacher, labels = batch
    labels[3] = label
    with pytest.raises(ValueError, match=f"label {label} at token 3 is outside the student's vocabulary of {V}"):
        distillation_loss(student, teacher, labels, Objective(), backend=backend)


def test_the_instruction_set_can_be_chosen_and_a_wrong_one_is_refused(batch, monkeypatch):
    monkeypatch.setenv("POCL_FAST_ISA", "avx1024")
    with pytest.raises(RuntimeError, match="plain, avx2 or avx512"):
        distillation_loss(*batch, Objective(), backend="cpp")


@pytest.mark.parametrize(
    ("missing", "backend", "hint"),
    [("pocl_fast._C", "cpp", "pip install -e ."), ("triton", "triton", r"pocl-fast\[gpu\]")],
)
def test_a_backend_that_is_not_installed_says_how_to_get_it(missing, backend, hint):
    """In a process of its own, where the module cannot be imported."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
import torch
from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import Objective
logits = torch.zeros(1, 2)
distillation_loss(logits, logits, torch.zeros(1, dtype=torch.int64), Objective(), backend={backend!r})
"""
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failed.returncode != 0
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert hint.replace("\\", "") in last


def test_float64_goes_to_the_reference(batch):
    student, teacher, labels = (x.double() if x.is_floating_point() else x for x in batch)
    got = distillation_loss(student, teacher, labels, Objective(temperature=1.33, alpha=0.3)).loss
    one = torch.ones(1).double()
    settings = Settings("forward_kl", 0.5, 2, -100, [1.0, 0.0, 1.0, 0.0], "bucket")
    rows = reference.distillation_rows(student, teacher, Tokens(labels, 1.33 * one, 0.3 * one, one), settings)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, rows.loss.sum() / 5, rtol=1e-6, atol=0)
