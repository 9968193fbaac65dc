"""The sizes of a forward and a step on the meta device, against what PyTorch's allocator gives in the same on a CPU."""

import pytest
import torch
from memory import peak_of
from tiny import tiny_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.packed import pack
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.teacher_output import LinearTeacher
from pocl_fast.models.lm_head import loss_within_forward
from pocl_fast.models.packed_attention import enable_packing
from pocl_fast.models.packed_forward import decoder_of, supervised_hidden
from pocl_fast.plan.meter import forward_peak, training_peak

CPU = torch.device("cpu")


def on_meta(model):
    with torch.device("meta"):
        return type(model)(model.config)


def llama():
    return tiny_model(layers=4, hidden=64)


def gemma():
    """Norms around attention and layers, windows in all layers but one."""
    config = Gemma3TextConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


def batch(count=20, length=90, answer=20):
    """`count` samples of as many tokens."""
    ids = torch.arange(length).remainder(200).tolist()
    return pack([EncodedSample(i, tuple(ids[:-answer]), tuple(ids[-answer:]), False) for i in range(count)])


def step_of(model, rows):
    """Forward and backward as a training's."""
    teacher = torch.randn(len(rows.labels), 64)

    def loss(hidden, head):
        out = LinearTeacher(teacher, head.weight.detach(), None)
        return linear_distillation_loss(hidden, head.weight, out, rows.labels, Objective()).loss

    def run():
        loss_within_forward(model, rows, loss, packed=True).backward()

    return run


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_steps_peak_is_what_the_allocator_gives_out(make, checkpointing):
    model, rows = make(), batch()
    meta = on_meta(model)
    enable_packing(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    run = step_of(model, rows)
    run()  # what is made once
    model.zero_grad()
    came = peak_of(run)
    said = training_peak(
        meta,
        rows.input_ids.numel(),
        len(rows.labels),
        teacher_columns=len(model.lm_head.weight),
        device=CPU,
        bf16=False,
        checkpointing=checkpointing,
        accumulates=False,
    )
    assert said.alive == pytest.approx(came, rel=0.05)
    assert said.alive <= said.resident


def test_gradients_of_an_earlier_micro_batch_are_there_besides():
    meta = on_meta(llama())
    weights = 4 * sum(p.numel() for p in meta.parameters())
    given = {"teacher_columns": 259, "device": CPU, "bf16": False, "checkpointing": False}
    once, twice = (training_peak(meta, 1800, 400, accumulates=more, **given).alive for more in (False, True))
    assert once < twice <= once + weights


def test_autocast_keeps_the_inputs_of_linear_layers_in_two_bytes():
    meta = on_meta(llama())
    given = {"teacher_columns": 259, "device": CPU, "checkpointing": False, "accumulates": False}
    half, full = (training_peak(meta, 4000, 400, bf16=bf16, **given).alive for bf16 in (True, False))
    assert 0.5 * full < half < 0.95 * full


@pytest.mark.parametrize("make", [llama, gemma])
def test_a_forwards_peak_is_what_the_allocator_gives_out(make):
    model, rows = make(), batch()
    meta = on_meta(model)
    enable_packing(model)

    @torch.no_grad()
    def run():
        supervised_hidden(decoder_of(model), rows, packed=True)

    run()
    said, stays = forward_peak(meta, 1, rows.input_ids.numel(), bf16=False)
    assert said.alive == pytest.approx(peak_of(run), rel=0.02)
    assert stays == rows.input_ids.numel() * 64 * 4


def test_keys_and_values_stay_by_layer_head_and_token():
    _, stays = forward_peak(on_meta(llama()), 7, 50, bf16=False, cache=True)
    keys_and_values = 2 * 4 * 2 * 16 * 4  # both, layers, heads of keys, their size, fp32
    assert stays == 7 * 50 * (keys_and_values + 64 * 4)
