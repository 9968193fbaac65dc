"""The gradient of a tied embedding, against torch's own."""

from contextlib import nullcontext

import pytest
import torch
from precise import relative_error
from tiny import tiny_model
from torch import nn

from pocl_fast.models.lm_head import tied_rows_alone

IDS = torch.tensor([[3, 7, 7, 0, 250, 3]])


def gradients(model, context, steps=1):
    model.zero_grad()
    for _ in range(steps):
        with context(model):
            model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_are_torchs_and_dense_also_when_they_add_up(steps):
    model = tiny_model(tied=True)
    want = gradients(model.double(), nullcontext, steps)
    got = gradients(model.float(), tied_rows_alone, steps)
    assert got.keys() == want.keys()
    for name, grad in got.items():
        assert grad.layout == torch.strided, name
        assert relative_error(grad, want[name]) <= 1e-5, name


def test_only_a_tied_embedding_is_changed_and_it_is_as_before_afterwards():
    tied, untied = tiny_model(tied=True), tiny_model(tied=False)
    with tied_rows_alone(tied), tied_rows_alone(untied):
        assert tied.get_input_embeddings().sparse
        assert not untied.get_input_embeddings().sparse
    assert not tied.get_input_embeddings().sparse
    with pytest.raises(ZeroDivisionError), tied_rows_alone(tied):
        1 / 0  # noqa: B018
    assert not tied.get_input_embeddings().sparse


def test_an_embedding_that_does_not_train_gets_no_gradient():
    model = tiny_model(tied=True)
    model.get_input_embeddings().weight.requires_grad_(False)
    assert gradients(model, tied_rows_alone)["model.embed_tokens.weight"] is None


def test_the_gradient_of_a_padding_row_stays_the_lm_heads_alone():
    model = tiny_model(tied=True)
    model.get_input_embeddings().padding_idx = 7
    want = gradients(model, nullcontext)["model.embed_tokens.weight"].clone()
    got = gradients(model, tied_rows_alone)["model.embed_tokens.weight"]
    assert relative_error(got, want) <= 1e-5
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
