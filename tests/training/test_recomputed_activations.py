"""Activation checkpointing: layers run again in backward, and the gradient is the same, with adapters and without."""

import peft
import pytest
import torch
from tiny import tiny_model
from tiny_training import curriculum_of, trainer_of
from transformers import AutoModelForCausalLM, GPT2Config

GPT2 = {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
FAMILIES = {
    "llama": (tiny_model, "q_proj", "model.layers"),
    "gpt2": (lambda: AutoModelForCausalLM.from_config(GPT2Config(**GPT2)), "c_attn", "transformer.h"),
}


@pytest.mark.parametrize(("family", "adapters"), [("llama", True), ("gpt2", False)])
def test_every_layer_runs_again_in_backward_and_the_step_is_the_same(tmp_path, family, adapters):
    make, target, layers = FAMILIES[family]
    after, calls = [], []
    for again in (False, True):
        torch.manual_seed(0)
        student, config = make().float(), None
        if adapters:
            config = peft.LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM", init_lora_weights=False)
        trainer = trainer_of(
            tmp_path / str(again), curriculum=curriculum_of(4, stages=1), student=student, peft_config=config,
            dev=False, activation_checkpointing=again, save_strategy="no", learning_rate=1e-2,
        )  # fmt: skip
        count = [0]

        def counted(_module, args, kwargs, count=count):
            count[0] += 1

        for layer in student.get_submodule(layers):
            layer.mlp.register_forward_pre_hook(counted, with_kwargs=True)
        trainer.train()
        calls.append(count[0])
        after.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
    assert calls[1] == 2 * calls[0] == 4
    for name, weight in after[0].items():
        torch.testing.assert_close(after[1][name], weight, rtol=1e-5, atol=1e-7)
