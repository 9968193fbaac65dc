"""Cutting a student out of a larger model."""

import pytest
import torch
from tiny import tiny_model

from pocl_fast.models.cut import cut_layers, evenly_spaced_layers, num_parameters
from pocl_fast.system.errors import InputError


def test_the_first_and_the_last_layer_stay_and_the_others_are_evenly_spread():
    assert evenly_spaced_layers(30, 6) == [0, 6, 12, 17, 23, 29]
    assert evenly_spaced_layers(4, 4) == [0, 1, 2, 3]
    assert evenly_spaced_layers(5, 1) == [0]


@pytest.mark.parametrize("keep", [0, -1, 6])
def test_an_impossible_number_of_layers_is_refused(keep):
    with pytest.raises(InputError, match="the model to cut from has 5 layers"):
        evenly_spaced_layers(5, keep)


def test_a_cut_model_computes_with_exactly_the_chosen_layers():
    teacher = tiny_model(layers=5)
    student = cut_layers(teacher, 3)
    by_hand = tiny_model(layers=5)
    by_hand.model.layers = torch.nn.ModuleList([by_hand.model.layers[i] for i in (0, 2, 4)])
    by_hand.config.num_hidden_layers = 3
    for new, layer in enumerate(by_hand.model.layers):
        layer.self_attn.layer_idx = new
    tokens = torch.arange(1, 20)[None]
    assert torch.equal(student(input_ids=tokens).logits, by_hand(input_ids=tokens).logits)
    assert student.config.num_hidden_layers == 3


def test_the_cut_model_shares_nothing_with_its_teacher_and_keeps_its_tied_head():
    teacher = tiny_model(layers=3)
    student = cut_layers(teacher, 1)
    student.get_input_embeddings().weight.data.zero_()
    assert teacher.get_input_embeddings().weight.abs().sum() > 0
    assert student.lm_head.weight.data_ptr() == student.get_input_embeddings().weight.data_ptr()
    layer = sum(p.numel() for p in teacher.model.layers[0].parameters())
    assert num_parameters(teacher) - num_parameters(student) == 2 * layer
