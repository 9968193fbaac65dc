"""The gradient of a tied embedding, against torch's own."""

from contextlib import nullcontext

import pytest
import torch
from precise import relative_error
from tiny import tiny_model
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM

from pocl_fast.models.lm_head import sparse_tied_embedding

IDS = torch.tensor([[3, 7, 7, 0, 250, 3]])


def gradients(model, context, steps=1):
    model.zero_grad()
    for _ in range(steps):
        with context(model):
            model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_are_torchs_and_dense_also_when_they_add_up(steps):
    model = tiny_model(tied=True)
    want = gradients(model.double(), nullcontext, steps)
    got = gradients(model.float(), sparse_tied_embedding, steps)
    assert got.keys() == want.keys()
    for name, grad in got.items():
        assert grad.layout == torch.strided, name
        assert relative_error(grad, want[name]) <= 1e-5, name


def test_only_a_tied_embedding_is_changed_and_it_is_as_before_afterwards():
    tied, untied = tiny_model(tied=True), tiny_model(tied=False)
    with sparse_tied_embedding(tied), sparse_tied_embedding(untied):
        assert tied.get_input_embeddings().sparse
        assert not untied.get_input_embeddings().sparse
    assert not tied.get_input_embeddings().sparse
    with pytest.raises(ZeroDivisionError), sparse_tied_embedding(tied):
        1 / 0  # noqa: B018
    assert not tied.get_input_embeddings().sparse


def test_an_embedding_that_does_not_train_gets_no_gradient():
    model = tiny_model(tied=True)
    model.get_input_embeddings().weight.requires_grad_(False)
    assert gradients(model, sparse_tied_embedding)["model.embed_tokens.weight"] is None


def test_the_gradient_of_a_padding_row_stays_the_lm_heads_alone():
    model = tiny_model(tied=True)
    model.get_input_embeddings().padding_idx = 7
    want = gradients(model, nullcontext)["model.embed_tokens.weight"]
    got = gradients(model, sparse_tied_embedding)["model.embed_tokens.weight"]
    assert relative_error(got, want) <= 1e-5
    assert isinstance(model.get_input_embeddings(), nn.Embedding)


class OfShrunkRows(nn.Embedding):
    """Code of somebody's own: its weight is no leaf any more where it is looked up."""

    def forward(self, ids):
        weight = self.weight / (1 + self.weight.norm(dim=1, keepdim=True))
        return nn.functional.embedding(ids, weight, sparse=self.sparse)


def test_an_embedding_that_computes_its_weight_keeps_its_dense_gradient():
    model = tiny_model(tied=True)
    before = model.get_input_embeddings()
    own = OfShrunkRows(*before.weight.shape)
    own.weight = before.weight
    model.set_input_embeddings(own)
    want = gradients(model, nullcontext)
    got = gradients(model, sparse_tied_embedding)
    assert all(relative_error(grad, want[name]) <= 1e-6 for name, grad in got.items())


def test_gemmas_scaled_embedding_has_torchs_gradient():
    config = GemmaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = GemmaForCausalLM(config)
    want = gradients(model, nullcontext)
    with sparse_tied_embedding(model):
        assert model.get_input_embeddings().sparse
    got = gradients(model, sparse_tied_embedding)
    assert all(relative_error(grad, want[name]) <= 1e-5 for name, grad in got.items())
