"""What is no argument of a loss at all: one line names it and says what to give, at once and whatever the backend."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pocl_fast.loss.dense import DistillationLoss, distillation_loss
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.teacher_output import DenseTeacher, LinearTeacher, TopKTeacher

N, V, H = 4, 11, 3
OUTPUT = SimpleNamespace(logits=torch.zeros(N, V), last_hidden_state=torch.zeros(N, H))
HEAD = nn.Linear(H, V)


def dense(**change):
    given = {
        "student_logits": torch.randn(N, V),
        "teacher_logits": torch.randn(N, V),
        "labels": torch.zeros(N, dtype=torch.int64),
        "objective": Objective(alpha=0.3),
    }
    return distillation_loss(**(given | change))


def linear(**change):
    given = {
        "student_hidden": torch.randn(N, H),
        "student_weight": torch.randn(V, H),
        "teacher": DenseTeacher(torch.randn(N, V)),
        "labels": torch.zeros(N, dtype=torch.int64),
        "objective": Objective(alpha=0.3),
    }
    return linear_distillation_loss(**(given | change))


# ---- another kind of thing ----


@pytest.mark.parametrize(
    ("loss", "change", "message"),
    [
        (dense, {"student_logits": None}, "student_logits must be a torch.Tensor, got None"),
        (dense, {"student_logits": "logits"}, "student_logits must be a torch.Tensor, got 'logits'"),
        (dense, {"student_logits": [[0.0]]}, "student_logits .* got a list; give torch.tensor of it"),
        (dense, {"student_logits": [torch.zeros(V)]}, "give torch.stack of them"),
        (dense, {"student_logits": np.zeros((N, V))}, "got a numpy ndarray; give torch.from_numpy of it"),
        (dense, {"student_logits": OUTPUT}, "got a types SimpleNamespace; give its .logits"),
        (dense, {"student_logits": HEAD}, "got a Linear; give what it computes"),
        (dense, {"teacher_logits": None}, "teacher_logits must be a torch.Tensor, got None"),
        (dense, {"teacher_logits": DenseTeacher(torch.zeros(N, V))}, "got a DenseTeacher; give its .logits"),
        (dense, {"teacher_logits": TopKTeacher(None, None)}, "teacher.log_probs must be a torch.Tensor, got None"),
        (dense, {"labels": None}, "labels must be a torch.Tensor, got None"),
        (dense, {"labels": [0] * N}, "labels .* give torch.tensor of it"),
        (dense, {"objective": "jsd"}, r"objective must be an Objective, got 'jsd'; give Objective\('jsd'\)"),
        (dense, {"objective": "paper:tvd"}, r"give Objective.preset\('paper:tvd'\)"),
        (dense, {"objective": {"alpha": 1}}, r"give Objective\(\*\*fields\)"),
        (dense, {"objective": Objective}, "got the class Objective"),
        (dense, {"token_weights": [1.0] * N}, "token_weights must be a torch.Tensor, got a list"),
        (dense, {"num_items": "7"}, "num_items must be a number, got '7'"),
        (dense, {"ignore_index": None}, "ignore_index must be an integer, got None"),
        (dense, {"logit_scale": None}, "logit_scale must be a number, got None"),
        (dense, {"teacher_logit_softcap": "30"}, "teacher_logit_softcap must be a number, got '30'"),
        (linear, {"student_hidden": None}, "student_hidden must be a torch.Tensor, got None"),
        (linear, {"student_hidden": OUTPUT}, "give its .last_hidden_state"),
        (linear, {"student_weight": None}, "student_weight must be a torch.Tensor, got None"),
        (linear, {"student_weight": HEAD}, "student_weight .* got a Linear; give its .weight"),
        (linear, {"student_weight": lambda: HEAD}, "what student_weight gives .* give its .weight"),
        (linear, {"student_bias": HEAD}, "student_bias .* give its .bias"),
        (linear, {"teacher": DenseTeacher(OUTPUT)}, "teacher.logits .* give its .logits"),
        (linear, {"teacher": LinearTeacher(torch.zeros(N, H), HEAD)}, "teacher_weight .* give its .weight"),
        (linear, {"teacher": OUTPUT}, "teacher must be a DenseTeacher, LinearTeacher, TopKTeacher or None"),
        (linear, {"labels": None}, "labels must be a torch.Tensor, got None"),
        (linear, {"objective": None}, "objective must be an Objective, got None"),
        (linear, {"chunk_tokens": "64"}, "chunk_tokens must be an integer, got '64'"),
    ],
)
def test_another_kind_of_thing_is_named_with_what_to_give(loss, change, message):
    with pytest.raises(TypeError, match=message) as raised:
        loss(**change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", ["temperature", "alpha", "beta", "skew"])
@pytest.mark.parametrize("value", [None, "0.5", [0.5]])
def test_a_field_of_an_objective_is_a_number(field, value):
    with pytest.raises(TypeError, match=f"{field} must be a number"):
        Objective(**{field: value})


def test_numpys_numbers_are_numbers():
    want = dense_loss(Objective(temperature=2.0, alpha=0.5))
    assert torch.equal(dense_loss(Objective(temperature=np.float64(2.0), alpha=np.float32(0.5))), want)


def dense_loss(objective):
    torch.manual_seed(0)
    return dense(objective=objective).loss


def test_the_module_refuses_another_objective_when_it_is_made():
    with pytest.raises(TypeError, match="objective must be an Objective, got 'forward_kl'"):
        DistillationLoss("forward_kl")


# ---- tensors without plain numbers ----


@pytest.mark.parametrize(
    ("loss", "change", "message"),
    [
        (dense, {"student_logits": torch.zeros(N, V).to_sparse()}, "student_logits must be a dense tensor, .* sparse"),
        (
            dense,
            {"student_logits": torch.zeros(N, V, dtype=torch.complex64)},
            "must be fp32, bf16, fp16 or float64, got torch.complex64",
        ),
        (
            dense,
            {"teacher_logits": torch.zeros(N, V, dtype=torch.int64)},
            "must be fp32, bf16, fp16 or float64, got .* torch.int64",
        ),
        (dense, {"labels": torch.zeros(N)}, "labels must be int32 or int64, got torch.float32"),
        (
            linear,
            {"student_weight": torch.zeros(V, H, dtype=torch.int8)},
            "student_weight must be floating-point, got .* torch.int8",
        ),
        (linear, {"teacher": DenseTeacher(torch.zeros(N, V).to_sparse())}, "teacher.logits must be a dense tensor"),
    ],
)
def test_a_tensor_without_plain_numbers_is_refused(loss, change, message):
    with pytest.raises(ValueError, match=message):
        loss(**change)


@pytest.mark.filterwarnings("ignore")
def test_quantised_logits_are_refused():
    quantised = torch.quantize_per_tensor(torch.zeros(N, V), 0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match=r"student_logits must not be quantised, got torch\.qint8"):
        dense(student_logits=quantised)


# ---- a teacher's k best ----


def k_best(values=None, indices=None, K=3):
    """Log-probabilities of the K best of random logits, or `values` in their place."""
    best = torch.log_softmax(torch.randn(N, V), -1).topk(K)
    return TopKTeacher(
        best.values if values is None else values(best.values), best.indices if indices is None else indices
    )


@pytest.mark.parametrize("loss", [dense, linear])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.exp, "teacher.log_probs of token 0 look like probabilities: .* add up to .* give their logarithm"),
        (lambda x: x + 30, "look like logits: .* give torch.log_softmax over the whole vocabulary"),
        (lambda x: torch.full_like(x, -0.5), "are no log-probabilities: their exponentials add up to 1.82"),
        (lambda x: x.exp().bfloat16(), "look like probabilities"),
    ],
)
def test_what_is_no_log_probability_is_refused_before_it_is_a_loss(loss, backend, values, message):
    with pytest.raises(ValueError, match=message):
        loss(**{"teacher_logits" if loss is dense else "teacher": k_best(values)}, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_log_probabilities_are_taken(dtype):
    """All of them, whose mass is 1 but for rounding: by a log_softmax in that dtype, too."""
    for values in (lambda x: x.to(dtype), lambda x: torch.log_softmax((x + 20).to(dtype), -1)):
        assert dense(teacher_logits=k_best(values, K=V)).loss.isfinite()


def test_an_ignored_token_may_hold_anything():
    teacher = k_best()
    teacher.log_probs[1], teacher.indices[1] = 5.0, -7
    labels = torch.tensor([0, -100, 1, 2])
    assert dense(teacher_logits=teacher, labels=labels).loss.isfinite()
    assert linear(teacher=teacher, labels=labels).loss.isfinite()


@pytest.mark.parametrize("loss", [dense, linear])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 5, 0], "index 0 is there twice at token 2 of teacher.indices"),
        ([0, V, 1], f"index {V} of the teacher's entry 1 at token 2 is outside the student's vocabulary of {V}"),
        ([-1, 0, 1], "index -1 of the teacher's entry 0 at token 2 is outside"),
    ],
)
def test_entries_that_cannot_be_are_named(loss, backend, indices, message):
    places = torch.arange(3).repeat(N, 1)
    places[2] = torch.tensor(indices)
    teacher = k_best(indices=places)
    with pytest.raises(ValueError, match=message):
        loss(**{"teacher_logits" if loss is dense else "teacher": teacher}, backend=backend)


def test_the_places_of_absent_entries_are_not_looked_at():
    teacher = k_best()
    teacher.log_probs[0, 1:], teacher.indices[0, 1:] = -math.inf, 99
    assert dense(teacher_logits=teacher).loss.isfinite()
