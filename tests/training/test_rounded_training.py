"""A student that trains with products of bf16 on a CPU, against one that trains in fp32."""

import pytest
import torch
from precise import relative_error
from tiny_training import student_model, trainer_of
from transformers import TrainerCallback

from pocl_fast.models.precision import Precision
from pocl_fast.models.product_speed import CpuProducts


class Gradients(TrainerCallback):
    """The gradients of the first step."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = self.found or {name: p.grad.clone() for name, p in model.named_parameters()}


def first_step(folder, way, **options):
    """Loss and gradients of a training's first step, with weights that train multiplied this `way`; the trainer."""
    seen = Gradients()
    trainer = trainer_of(folder, count=6, student=student_model(), max_grad_norm=0.0, callbacks=[seen], **options)
    trainer.precision = Precision("bf16", torch.device("cpu"), CpuProducts(way, "fp32", "fp32"))
    trainer.train()
    return trainer.state.log_history[0]["loss"], seen.found, trainer


@pytest.mark.parametrize(("supervised", "checkpointing"), [(False, False), (True, True)])
def test_rounded_gradients_are_near_those_of_fp32_and_not_the_same(tmp_path, supervised, checkpointing):
    options = {"supervised": supervised, "activation_checkpointing": checkpointing, "logging_steps": 1}
    loss, want, _ = first_step(tmp_path / "fp32", "bf16", **options)
    rounded, got, trainer = first_step(tmp_path / "rounded", "rounded", **options)
    assert rounded == pytest.approx(loss, rel=1e-2)
    errors = {name: relative_error(grad, want[name]) for name, grad in got.items()}
    assert all(1e-5 < error < 5e-2 for error in errors.values()), errors
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert not any("forward" in vars(module) for module in trainer.model.modules())
