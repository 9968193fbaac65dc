"""A student that trains with products of bf16 on a CPU, against one that trains in fp32."""

import pytest
import torch
from precise import relative_error
from tiny_training import before_each_batch, student_model, trainer_of
from torch import nn
from transformers import TrainerCallback

from pocl_fast.loss import cpp
from pocl_fast.models import rounded
from pocl_fast.models.precision import Precision
from pocl_fast.models.product_speed import CpuProducts

EXACT, LAYERS = CpuProducts("bf16", "fp32", "fp32"), CpuProducts("rounded", "fp32", "fp32")


class Gradients(TrainerCallback):
    """The gradients of the first step."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = self.found or {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture
def modes_as_before():
    """The modes of the process, which a training sets."""
    before = Precision("fp32", torch.device("cpu"), EXACT)
    yield
    before.set_modes()


def first_step(folder, chosen, **options):
    """Loss and gradients of a training's first step, whose products were chosen so; the trainer."""
    seen = Gradients()
    trainer = trainer_of(folder, count=6, student=student_model(), max_grad_norm=0.0, callbacks=[seen], **options)
    trainer.precision = Precision("bf16", torch.device("cpu"), chosen)
    trainer.precision.set_modes()
    trainer.train()
    return trainer.state.log_history[0]["loss"], seen.found, trainer


@pytest.mark.parametrize(("supervised", "checkpointing"), [(False, False), (True, True)])
def test_every_product_of_a_step_is_rounded_where_that_was_chosen(
    tmp_path, monkeypatch, modes_as_before, supervised, checkpointing
):
    options = {"supervised": supervised, "activation_checkpointing": checkpointing, "logging_steps": 1}
    loss, want, _ = first_step(tmp_path / "fp32", EXACT, **options)
    calls, product = [], rounded._forward
    monkeypatch.setattr(rounded, "_forward", lambda module, x: calls.append(module) or product(module, x))
    near, of_layers, trainer = first_step(tmp_path / "layers", LAYERS, **options)
    body = [module for module in trainer.model.model.modules() if isinstance(module, nn.Linear)]
    assert set(calls) == set(body)
    assert len(calls) == (2 if checkpointing else 1) * len(body) * trainer.state.global_step
    rounded_loss, of_all, _ = first_step(tmp_path / "all", CpuProducts("rounded", "fp32", "bf16"), **options)
    assert near == pytest.approx(loss, rel=1e-2)
    assert rounded_loss == pytest.approx(loss, rel=1e-2)
    for found in (of_layers, of_all):
        assert all(1e-5 < relative_error(grad, want[name]) < 5e-2 for name, grad in found.items())
    head = "model.embed_tokens.weight"
    assert torch.equal(of_layers[head], of_all[head]) == (not cpp.has_products())
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert not any("forward" in vars(module) for module in trainer.model.modules())


def test_a_tied_embeddings_gradient_is_sparse_within_a_step_and_dense_after_it(tmp_path, monkeypatch):
    within = []
    before_each_batch(monkeypatch, lambda _, trainer, __: within.append(trainer.model.get_input_embeddings().sparse))
    seen = Gradients()
    trainer = trainer_of(tmp_path, count=6, student=student_model(), callbacks=[seen], gradient_accumulation_steps=2)
    trainer.train()
    assert within
    assert all(within)
    assert not trainer.model.get_input_embeddings().sparse
    assert seen.found["model.embed_tokens.weight"].layout == torch.strided
