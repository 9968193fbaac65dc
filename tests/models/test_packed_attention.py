"""Which way a model attends over packed rows, that each way computes the same, and what it costs."""

import warnings

import pytest
import torch
from tiny_packed import FALCON, GQA, LENGTHS, MIXED_LAYERS, by_hand, model_of, varlen_by_its_documentation
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhimoeConfig,
    Qwen2Config,
)

from pocl_fast.models import packed_attention
from pocl_fast.models.packed_attention import (
    BY_MASK,
    BY_SAMPLE,
    VARLEN,
    choose_way,
    enable_packing,
    packed_by_sample,
    packed_varlen,
)
from pocl_fast.models.packing_check import packing_ready

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Layer(torch.nn.Module):
    """What an attention function asks of the module that calls it."""

    num_key_value_groups = 2
    is_causal = True


# ---- which way ----


@pytest.fixture(autouse=True)
def a_torch_that_has_varlen_attn(monkeypatch):
    """As 2.10 and later have, so that the choice is tested with any torch."""
    if packed_attention._varlen_attn() is None:
        monkeypatch.setattr(packed_attention, "_varlen_attn", lambda: varlen_by_its_documentation)


@pytest.fixture
def flash_attn(monkeypatch):
    monkeypatch.setattr(packed_attention, "_has_flash_attn", lambda: True)


def chosen(config, device=CUDA, dtype=torch.bfloat16, trains=False):
    return choose_way(model_of(config, dtype), device, here=device, trains=trains)


def test_a_gpu_takes_torchs_flash_attention_where_the_package_is_missing():
    for config in (LlamaConfig(**GQA), MistralConfig(**GQA, sliding_window=4), Qwen2Config(**GQA, **MIXED_LAYERS)):
        assert chosen(config).implementation == VARLEN
        assert chosen(config, dtype=torch.float16).implementation == VARLEN


def test_a_gpu_takes_the_flash_attn_package_where_it_is_and_the_family_runs_on_it(flash_attn):
    assert chosen(LlamaConfig(**GQA)).implementation == "flash_attention_2"
    assert chosen(Gemma2Config(**GQA)).implementation == "flash_attention_2"  # it has no sdpa, for its softcap
    assert chosen(PhimoeConfig(**GQA, sliding_window=4, num_local_experts=2)).implementation == BY_SAMPLE
    assert chosen(LlamaConfig(**GQA, head_dim=264)).implementation == BY_SAMPLE
    assert chosen(FalconConfig(**FALCON)).implementation is None  # its attention cannot be set


def test_under_autocast_weights_in_fp32_take_flash_attention(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")  # without a GPU torch turns it off
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
    assert chosen(LlamaConfig(**GQA), dtype=torch.float32).implementation == VARLEN


def test_a_model_that_will_be_sharded_over_gpus_and_is_not_there_yet_is_prepared_for_them(flash_attn):
    model = model_of(LlamaConfig(**GQA), torch.bfloat16)
    assert choose_way(model, CUDA, here=CPU).implementation == VARLEN  # flash-attn could not be tried on a CPU
    assert packing_ready(model, lambda _: None, device=CUDA)
    assert model.config._attn_implementation == VARLEN


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (LlamaConfig(**GQA), {"dtype": torch.float32}, "bf16 or fp16 alone, and the model computes in torch.float32"),
        (LlamaConfig(**GQA, attention_dropout=0.1), {"trains": True}, "no dropout, and the model's attention has 0.1"),
        (GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4), {"trains": True}, "the model's attention has 0.1"),
        (LlamaConfig(**GQA, head_dim=264), {}, "heads of 256 numbers at most, and the model's have 264"),
        (PhimoeConfig(**GQA, sliding_window=4, num_local_experts=2), {}, "masks that varlen_attn does not take"),
    ],
)
def test_a_gpu_never_takes_the_slow_way_without_the_reason(config, options, reason):
    way = chosen(config, **options)
    assert way.implementation == BY_SAMPLE
    assert "slower than flash attention" in way.says
    assert reason in way.says


def test_a_teacher_with_dropout_in_its_attention_does_not_train_and_takes_flash_attention():
    assert chosen(LlamaConfig(**GQA, attention_dropout=0.1)).implementation == VARLEN


def test_a_torch_without_varlen_attn_is_named(monkeypatch):
    monkeypatch.setattr(packed_attention, "_varlen_attn", lambda: None)
    assert f"torch {torch.__version__} has no varlen_attn" in chosen(LlamaConfig(**GQA)).says
    monkeypatch.setattr(packed_attention, "_has_flash_attn", lambda: True)
    way = choose_way(model_of(LlamaConfig(**GQA), torch.bfloat16), CUDA, here=CPU)
    assert "flash-attn is tried on a GPU alone" in way.says


def test_a_gpu_that_flash_attention_is_not_compiled_for_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0 or above" in chosen(LlamaConfig(**GQA), dtype=torch.float16).says


def test_the_way_is_said_once_and_again_where_it_is_another():
    model, said = model_of(LlamaConfig(**GQA)), []
    for device in ("cpu", "cpu", "cuda", "cuda"):
        enable_packing(model, said.append, device=device)
    assert said[0] == "LlamaForCausalLM attends to packed rows by one sdpa call per sample"
    assert said[1].startswith(said[0] + ", which is slower than flash attention: that takes bf16")
    assert len(said) == 2


# ---- what is computed ----


@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
def test_output_and_gradients_of_each_sample_are_those_of_float64(seed, window):
    T = sum(LENGTHS)
    leaves = [torch.randn(1, heads, T, 8, requires_grad=True) for heads in (4, 2, 2)]
    upstream = torch.randn(1, T, 4, 8)
    got, _ = packed_by_sample(Layer(), *leaves, None, LENGTHS, sliding_window=window, scaling=0.3)
    want = by_hand(*leaves, LENGTHS, 0.3, window)
    gradients = [torch.autograd.grad(out, leaves, up) for out, up in ((got, upstream), (want, upstream.double()))]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for ours, exact in zip(*gradients, strict=True):
        assert (ours - exact).norm() <= 1e-5 * max(exact.norm(), upstream.norm())  # a window of 1 has none


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("size", [64, 128, 12])
def test_on_a_gpu_flash_attention_and_its_gradients_are_those_of_float64(seed, window, size):
    lengths = (*LENGTHS, 200, 131)
    T = sum(lengths)
    leaves = [torch.randn(1, heads, T, size).bfloat16().requires_grad_(True) for heads in (4, 2, 2)]
    upstream = torch.randn(1, T, 4, size).bfloat16()
    ends = torch.tensor((0, *lengths)).cumsum(0).to("cuda", torch.int32)
    on_gpu = [x.detach().cuda().requires_grad_(True) for x in leaves]
    got, _ = packed_varlen(Layer(), *on_gpu, None, lengths, sliding_window=window, cu_seq_lens_q=ends)
    got.backward(upstream.cuda())
    want = by_hand(*leaves, lengths, size**-0.5, window)
    want.backward(upstream.double())
    assert (got.cpu() - want).norm() <= 1e-2 * want.norm()  # of bf16 products
    for ours, exact in zip(on_gpu, leaves, strict=True):
        scale = max(exact.grad.norm(), upstream.norm() / 100)  # a window of 1 has no gradient by query and key
        assert (ours.grad.cpu().float() - exact.grad.float()).norm() <= 2e-2 * scale


def test_by_flash_attention_a_window_holds_the_token_itself(flash_on_a_cpu, seed):
    T = sum(LENGTHS)
    q, k, v = (torch.randn(1, heads, T, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    got, _ = packed_varlen(Layer(), q, k, v, None, LENGTHS, sliding_window=4, cu_seq_lens_q=ends)
    torch.testing.assert_close(got, by_hand(q, k, v, LENGTHS, 8**-0.5, 4).to(torch.bfloat16))


def test_values_of_another_size_than_the_keys_come_back_in_their_own(flash_on_a_cpu, seed):
    T = sum(LENGTHS)
    q, k, v = (torch.randn(1, 4, T, size, dtype=torch.bfloat16) for size in (12, 12, 8))
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    got, _ = packed_varlen(Layer(), q, k, v, None, LENGTHS, cu_seq_lens_q=ends)
    torch.testing.assert_close(got, by_hand(q, k, v, LENGTHS, 12**-0.5).to(torch.bfloat16))


def test_torchs_varlen_attn_takes_what_it_is_given():
    """Its own shape functions, on tensors without values: fewer heads of keys, a window, and gradients."""
    attend = packed_attention._varlen_attn()
    if attend is varlen_by_its_documentation:
        pytest.skip(f"torch {torch.__version__} has no varlen_attn")
    leaves = [
        torch.empty(27, heads, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, 2, 2)
    ]
    ends = torch.empty(5, dtype=torch.int32, device="meta")
    output = attend(*leaves, ends, ends, 12, 12, scale=0.3, window_size=(3, 0))
    output.sum().backward()
    assert output.shape == leaves[0].shape
    assert [x.grad.shape for x in leaves] == [x.shape for x in leaves]


def test_the_scale_is_the_models_own(flash_on_a_cpu, seed):
    T = sum(LENGTHS)
    q, k, v = (torch.randn(1, heads, T, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    got, _ = packed_varlen(Layer(), q, k, v, None, LENGTHS, scaling=1.5, cu_seq_lens_q=ends)
    torch.testing.assert_close(got, by_hand(q, k, v, LENGTHS, 1.5).to(torch.bfloat16))


@pytest.mark.parametrize("what", [{"softcap": 2.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}])
def test_what_flash_attention_cannot_compute_is_not_left_out(flash_on_a_cpu, monkeypatch, what):
    called = []
    monkeypatch.setattr(packed_attention, "packed_by_sample", lambda *args, **kwargs: called.append(kwargs))
    q, k, v = (torch.randn(1, heads, 27, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    packed_varlen(Layer(), q, k, v, None, LENGTHS, cu_seq_lens_q=ends, **what)
    assert [call.keys() & what.keys() for call in called] == [what.keys()]


def test_flash_attention_is_not_asked_for_dropout_or_fp32():
    class OnGpu:
        is_cuda, device, dtype = True, CUDA, torch.bfloat16

    assert packed_attention._takes_flash(OnGpu, 0.0)
    assert not packed_attention._takes_flash(OnGpu, 0.1)
    OnGpu.dtype = torch.float32
    assert not packed_attention._takes_flash(OnGpu, 0.0)


def test_rows_that_are_not_packed_keep_their_mask(seed):
    model = model_of(LlamaConfig(**GQA))
    ids, mask = torch.randint(3, 97, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    want = model(input_ids=ids, attention_mask=mask).logits
    for name in (VARLEN, BY_SAMPLE, BY_MASK):
        enable_packing(model)
        model.config._attn_implementation = name
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[0, 3:], want[0, 3:])


def test_a_cpu_which_has_no_other_way_is_not_warned():
    q, k, v = (torch.randn(1, heads, 27, 8) for heads in (4, 2, 2))
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed_varlen(Layer(), q, k, v, None, LENGTHS, cu_seq_lens_q=ends)


# ---- what it costs ----


class Written(TorchDispatchMode):
    """Counts the numbers in all results of the operators within it."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor) and not one._is_view():
                self.numbers += one.numel()
        return out


def test_the_backward_of_a_row_twice_as_long_writes_twice_as_much():
    """By slices of the row it would write four times as much: each slice's gradient is as long as the row."""
    written = []
    for count in (16, 32):
        leaves = [torch.randn(1, heads, count * 8, 8, requires_grad=True) for heads in (4, 2, 2)]
        output, _ = packed_by_sample(Layer(), *leaves, None, [8] * count)
        with Written() as mode:
            output.sum().backward()
        written.append(mode.numbers)
    assert written[1] <= 2.1 * written[0]
