"""`Objective` says what is wrong with it before any tensor is touched."""

import dataclasses

import pytest
import torch

from pocl_fast.loss.dense import distillation_loss
from pocl_fast.loss.objective import DIVERGENCES, Objective


def test_an_unknown_divergence_is_refused_with_the_list_of_those_there_are():
    with pytest.raises(ValueError, match=r"forward_kl, reverse_kl, jsd.*; got 'hellinger'"):
        Objective("hellinger")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"alpha": float("nan")},
        {"beta": -0.1},
        {"beta": 1.1},
        {"skew": 0.0},
        {"skew": 1.0},
        {"beta": torch.tensor(0.0)},
        {"skew": torch.tensor(0.1)},
        {"temperature_scaling": "tau3"},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Objective(**wrong)


def test_tensors_are_taken_as_they_are():
    temperature = torch.tensor([1.0, 2.0])
    assert Objective(temperature=temperature, alpha=torch.tensor(0.3)).temperature is temperature


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("scaling", "power"), [("none", 0), ("tau", 1), ("tau2", 2)])
def test_the_power_of_the_temperature_follows_the_scaling(divergence, scaling, power):
    assert Objective(divergence, temperature_scaling=scaling).temperature_power == power


# at a high temperature both distributions flatten: a KL's gradient falls with τ², that of tvd with τ
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_automatic_scaling_keeps_the_gradients_size(divergence):
    student, teacher = torch.randn(2, 4, 50, dtype=torch.float64).unbind()
    norms = []
    for temperature in (200.0, 400.0):
        s = student.clone().requires_grad_(True)
        objective = Objective(divergence, temperature=temperature)
        distillation_loss(s, teacher, torch.zeros(4, dtype=torch.int64), objective).loss.backward()
        norms.append(s.grad.norm())
    torch.testing.assert_close(norms[0], norms[1], rtol=0.02, atol=0)


def test_the_ends_of_jsd_are_the_two_kls():
    assert Objective("jsd", beta=0.0).family == "forward_kl"
    assert Objective("jsd", beta=1.0).family == "reverse_kl"
    assert Objective("jsd", beta=0.3).family == "jsd"


# POCL's published code scales forward KL, jsd and skew reverse KL by the squared temperature, the others not at all
@pytest.mark.parametrize(
    ("divergence", "power"),
    [("forward_kl", 2), ("reverse_kl", 0), ("jsd", 2), ("skew_forward_kl", 0), ("skew_reverse_kl", 2), ("tvd", 0)],
)
def test_the_papers_presets(divergence, power):
    preset = Objective.preset(f"paper:{divergence}")
    assert (preset.divergence, preset.temperature, preset.alpha) == (divergence, 1.0, 0.3)
    assert preset.temperature_power == power


def test_a_preset_takes_changes():
    last_stage = Objective.preset("paper:forward_kl", temperature=2.0, alpha=0.0)
    assert (last_stage.temperature, last_stage.alpha, last_stage.temperature_scaling) == (2.0, 0.0, "tau2")


def test_an_unknown_preset_is_refused_with_the_list_of_those_there_are():
    with pytest.raises(ValueError, match="paper:forward_kl, paper:reverse_kl"):
        Objective.preset("paper")


def test_an_objective_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Objective().temperature = 2.0
