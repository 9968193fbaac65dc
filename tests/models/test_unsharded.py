"""Whole models for work that is not training; test_distributed_training.py has models that are really sharded."""

import pytest
import torch
from tiny import tiny_model

from pocl_fast.models.parameters import unsharded
from pocl_fast.models.probing import found_of
from pocl_fast.system.errors import InputError


def test_a_model_that_is_whole_is_given_as_it_is_within_its_wrappers():
    model = tiny_model()
    wrapped = torch.nn.Module()
    wrapped.module = model
    with unsharded(wrapped) as whole:
        assert whole is model


class FullyShardedDataParallel(torch.nn.Module):
    """FSDP1 is told by its name."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_what_cannot_be_gathered_is_refused_with_what_to_give_instead():
    with (
        pytest.raises(InputError, match=r'FSDP1 cannot be evaluated: give fsdp_config=\{"version": 2\}'),
        unsharded(FullyShardedDataParallel(tiny_model())),
    ):
        pass


def test_a_sharded_model_is_copied_with_its_whole_weights_and_no_random_numbers_are_drawn():
    """`full_tensor` is what FSDP2's parameters have beside a tensor's own."""
    model = tiny_model()
    want = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.full_tensor = lambda name=name: want[name]
        parameter.data.zero_()  # a rank has only its part
    before = torch.get_rng_state()
    with unsharded(model) as whole:
        assert whole is not model
        assert all(torch.equal(parameter, want[name]) for name, parameter in whole.named_parameters())
        assert not whole.training
        assert found_of(whole) is found_of(model)  # what is tried on a copy is not tried on the next one
    assert torch.equal(torch.get_rng_state(), before)
