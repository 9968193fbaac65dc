"""The presets against the losses they are named after: TRL's and Liger's own functions where these are installed
(extras `trl` and `dev`), and the formulas that DistiLLM, POCL and DistillKit publish, each in its own orientation."""

import math

import pytest
import torch
from compare import logits, relative_error, some_labels

from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective

N, V = 7, 301
BACKENDS = ["cpp", "reference"]


def assert_same_gradient(objective, published, backend="cpp", constant=0.0, **options):
    """The gradient is that of `published`, and the loss too less a constant; both of (student, teacher, labels)."""
    student, teacher, labels = logits(N, V), logits(N, V), some_labels(N, V)
    s, exact = student.clone().requires_grad_(True), student.double().requires_grad_(True)
    loss = distillation_loss(s, teacher, labels, objective, backend=backend, **options).loss
    want = published(exact, teacher.double(), labels)
    loss.backward()
    want.backward()
    if callable(constant):
        constant = constant(teacher.double(), labels)
    torch.testing.assert_close(loss.detach().double(), want.detach() - constant, rtol=3e-6, atol=1e-7)
    assert relative_error(s.grad, exact.grad) <= 1e-5


# ---- TRL: the teacher's weight is beta, and 0 and 1 are the KLs; a temperature without a factor ----


@pytest.fixture(scope="module")
def generalized_jsd_loss():
    pytest.importorskip("trl")
    gkd = pytest.importorskip("trl.experimental.gkd", reason="this TRL has its GKD trainer elsewhere")
    return gkd.GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_trl(generalized_jsd_loss, backend, beta, temperature):
    def published(student, teacher, labels):
        return generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=temperature)

    objective = Objective.preset("trl", beta=beta, temperature=temperature)
    assert_same_gradient(objective, published, backend)


def test_trl_under_gradient_accumulation(generalized_jsd_loss):
    """`num_items_in_batch` of transformers' Trainer is `num_items`."""

    def published(student, teacher, labels):
        return generalized_jsd_loss(student, teacher, labels, num_items_in_batch=23)

    assert_same_gradient(Objective.preset("trl"), published, num_items=23)


# ---- Liger: the same divergence, and as much of the cross-entropy ----


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_liger(beta, temperature):
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    published = liger.LigerFusedLinearJSDLoss(beta=beta, temperature=temperature, compiled=False)
    objective = Objective.preset("liger", beta=beta, temperature=temperature)
    hidden, head, *teacher = (torch.randn(rows, 5).double() for rows in (N, V, N, V))
    labels = some_labels(N, V)

    def ours(hidden, head, teacher_hidden, teacher_head, labels):
        student_logits, teacher_logits = (hidden @ head.T).float(), (teacher_hidden @ teacher_head.T).float()
        return distillation_loss(student_logits, teacher_logits, labels, objective).loss

    results = []
    for function in (ours, published):
        h, w = hidden.clone().requires_grad_(True), head.clone().requires_grad_(True)
        loss = function(h, w, *teacher, labels)
        loss.backward()
        results.append((loss, h.grad, w.grad))
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) <= 1e-5


# ---- DistiLLM and POCL: `lam` weighs the student in their js_distance, whose default is 0.9; forward KL and skew
# forward KL leave out the teacher's entropy; POCL multiplies the squared temperature onto some ----


def published_divergence(name, s, t):
    """Of each token, from logits over the temperature."""
    q, p = torch.softmax(s, -1), torch.softmax(t, -1)
    terms = {
        "forward_kl": lambda: -p * q.log(),
        "reverse_kl": lambda: q * q.log() - q * p.log(),
        "jsd": lambda: js_distance(p, q, lam=0.9),
        "skew_forward_kl": lambda: -p * (0.1 * p + 0.9 * q).log(),
        "skew_reverse_kl": lambda: q * q.log() - q * (0.9 * p + 0.1 * q).log(),
        "tvd": lambda: 0.5 * (p - q).abs(),
    }
    return terms[name]().sum(-1)


def js_distance(p, q, lam):
    m = (1 - lam) * p + lam * q
    return lam * (q * q.log() - q * m.log()) + (1 - lam) * (p * p.log() - p * m.log())


def mean(values, labels):
    return values[labels != -100].mean()


def entropy_left_out(name, temperature, weight):
    """What the published value is too large by."""

    def entropy(teacher, labels):
        return weight * mean(torch.distributions.Categorical(logits=teacher / temperature).entropy(), labels)

    return entropy if name in ("forward_kl", "skew_forward_kl") else 0.0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_distillm(divergence, backend):
    def published(student, teacher, labels):
        return mean(published_divergence(divergence, student, teacher), labels)

    constant = entropy_left_out(divergence, 1.0, 1.0)
    assert_same_gradient(Objective.preset(f"distillm:{divergence}"), published, backend, constant)
    if divergence == "skew_reverse_kl":
        assert Objective.preset("distillm") == Objective("skew_reverse_kl", skew=0.1, temperature_scaling="none")


# the four stages: temperature, and the share of the divergence
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "kd_ratio"), [(1.0, 0.7), (1.33, 0.8), (1.67, 0.9), (2.0, 1.0)])
def test_pocl(divergence, temperature, kd_ratio):
    squared = divergence in ("forward_kl", "jsd", "skew_reverse_kl")
    factor = temperature**2 if squared else 1.0

    def published(student, teacher, labels):
        kd = factor * mean(published_divergence(divergence, student / temperature, teacher / temperature), labels)
        return (1 - kd_ratio) * torch.nn.functional.cross_entropy(student, labels) + kd_ratio * kd

    objective = Objective.preset(f"paper:{divergence}", temperature=temperature, alpha=1 - kd_ratio)
    constant = entropy_left_out(divergence, temperature, kd_ratio * factor)
    assert_same_gradient(objective, published, constant=constant)
    if temperature == 1.0:
        assert math.isclose(Objective.preset(f"paper:{divergence}").alpha, 1 - kd_ratio)


# ---- DistillKit: each loss by its weight over the weights' sum, the divergence times the squared temperature ----


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillkit(temperature):
    def published(student, teacher, labels):
        p = torch.log_softmax(teacher / temperature, -1)
        q = torch.log_softmax(student / temperature, -1)
        kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        losses = torch.nn.functional.cross_entropy(student, labels), temperature**2 * mean(kl, labels)
        return (0.5 * losses[0] + 0.5 * losses[1]) / (0.5 + 0.5)

    assert_same_gradient(Objective.preset("distillkit", temperature=temperature), published)
