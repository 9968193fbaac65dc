"""What a teacher says, live and from the cache; whose cache it is; and when the body leaves memory."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model
from tiny_cache import flip, only_shard, samples
from tiny_teacher import lengths_of_calls, ready
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

from pocl_fast.data.packed import pack
from pocl_fast.loss.teacher_output import LinearTeacher, TopKTeacher
from pocl_fast.models.lm_head import lm_head
from pocl_fast.models.loading import load_model
from pocl_fast.models.packed_forward import supervised_logits
from pocl_fast.system.errors import InputError
from pocl_fast.teacher.shards import HiddenEntries
from pocl_fast.teacher.teacher import Teacher, most_likely, rounding_loss, teacher_fingerprint


def shard_position(folder, sample):
    """Which of a shard's samples this one is."""
    keys = load_file(only_shard(folder))["keys"].numpy()
    return [bytes(key) for key in keys].index(sample.fingerprint)


def test_logits_are_the_models_own_first_live_and_then_from_the_cache(tmp_path):
    want = supervised_logits(ready(tiny_model()), pack(samples()), packed=True)
    teacher = Teacher(ready(tiny_model()), tmp_path, cache_dtype=torch.float32)
    live = teacher.logits(samples())
    torch.testing.assert_close(live, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(teacher.logits(samples()), live)
    assert teacher.release_body_if_cached(samples())
    reordered = samples()[::-1]
    torch.testing.assert_close(teacher.logits(reordered), torch.cat(live.split([s + 3 for s in range(6)])[::-1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_a_cache_gives_the_same_bits_live_and_read_back_by_another_process(tmp_path, dtype):
    teacher = Teacher(ready(tiny_model()), tmp_path, cache_dtype=dtype)
    live = teacher.logits(samples())
    teacher.cache.flush()
    again = Teacher(ready(tiny_model()), tmp_path, cache_dtype=dtype)
    assert not again.cache.missing(samples())
    assert torch.equal(again.logits(samples()), live)


def test_the_body_runs_only_for_samples_that_are_not_cached(tmp_path):
    model = ready(tiny_model())
    teacher = Teacher(model, tmp_path)
    tokens = lengths_of_calls(model)
    few, every = samples()[:2], samples()
    teacher.logits(few)
    teacher.logits([*every, every[3]])  # one of them twice
    teacher.logits(every)
    assert tokens == [sum(map(len, few)), sum(map(len, every[2:]))]


def test_a_pass_of_its_own_leaves_nothing_to_compute(tmp_path):
    Teacher(ready(tiny_model()), tmp_path).fill(samples(40))
    model = ready(tiny_model())
    teacher = Teacher(model, tmp_path)
    tokens = lengths_of_calls(model)
    want = supervised_logits(ready(tiny_model()), pack(samples(40)), packed=True)
    assert (teacher.logits(samples(40)) - want).norm() < 1e-2 * want.norm()
    assert tokens == []


def test_the_body_is_kept_until_every_sample_is_cached(tmp_path):
    teacher = Teacher(ready(tiny_model()), tmp_path)
    teacher.logits(samples()[:2])
    assert not teacher.release_body_if_cached(samples())
    teacher.logits(samples())
    assert teacher.release_body_if_cached(samples())
    with pytest.raises(RuntimeError, match="released"):
        teacher.logits(samples(7))


def test_the_body_leaves_memory_and_the_lm_head_stays(tmp_path):
    model = ready(tiny_model())
    teacher = Teacher(model, tmp_path)
    want = teacher.logits(samples())
    alive = [weakref.ref(model), *(weakref.ref(parameter) for parameter in model.parameters())]
    assert len(alive) > 15
    del model
    assert teacher.release_body_if_cached(samples())
    gc.collect()
    assert not any(reference() is not None for reference in alive)
    assert torch.equal(teacher.logits(samples()), want)
    assert (teacher.vocab_size, teacher.lm_head.weight.shape) == (259, (259, 32))


def test_a_shard_damaged_before_the_release_is_computed_again_first(tmp_path, capsys):
    want = supervised_logits(ready(tiny_model()), pack(samples()), packed=True)
    Teacher(ready(tiny_model()), tmp_path).fill(samples())
    flip(only_shard(tmp_path), "hidden")
    teacher = Teacher(ready(tiny_model()), tmp_path)
    assert not teacher.release_body_if_cached(samples())
    assert "shard-000000.safetensors is damaged" in capsys.readouterr().out
    assert (teacher.logits(samples()) - want).norm() < 1e-2 * want.norm()
    assert teacher.release_body_if_cached(samples())


def test_a_shard_found_damaged_when_it_is_read_is_computed_again(tmp_path, capsys):
    teacher = Teacher(ready(tiny_model()), tmp_path)
    want = teacher.logits(samples())
    teacher.cache.close()
    flip(only_shard(tmp_path), "hidden", byte=100)
    again = Teacher(ready(tiny_model()), tmp_path)
    assert torch.equal(again.logits(samples()), want)
    assert "shard-000000.safetensors is damaged" in capsys.readouterr().out
    again.cache.close()
    assert torch.equal(Teacher(ready(tiny_model()), tmp_path).logits(samples()), want)
    assert "damaged" not in capsys.readouterr().out


def test_a_shard_damaged_after_the_release_is_one_clear_error(tmp_path):
    Teacher(ready(tiny_model()), tmp_path).fill(samples()[:5])
    flip(only_shard(tmp_path), "hidden", byte=-1 + 2 * 32 * 25)  # the last of the 5 samples' 25 tokens
    teacher = Teacher(ready(tiny_model()), tmp_path)
    first = min(samples()[:5], key=lambda sample: shard_position(tmp_path, sample))
    assert teacher.release_body_if_cached([first])
    teacher.logits([first])
    with pytest.raises(InputError, match=r"is damaged .*: its 5 samples are computed again by the same command"):
        teacher.logits(samples()[:5])


def test_what_is_said_live_is_what_the_cache_gives_and_leaves_nothing_behind(tmp_path):
    teacher = Teacher(ready(tiny_model()), tmp_path / "a", cache_dtype=torch.float32)
    live = teacher.live(samples())
    assert not list(tmp_path.rglob("*.safetensors"))
    assert teacher.cache.missing(samples()) == samples()
    cached = Teacher(ready(tiny_model()), tmp_path / "b", cache_dtype=torch.float32).output(samples())
    assert isinstance(live, LinearTeacher)
    assert torch.equal(live.hidden, cached.hidden)
    assert torch.equal(live.weight, cached.weight)


def test_the_k_best_are_said_live_too(tmp_path):
    teacher = Teacher(ready(tiny_model()), tmp_path, cache_mode="topk", top_k=5)
    live, cached = teacher.live(samples()), teacher.output(samples())
    assert isinstance(live, TopKTeacher)
    assert torch.equal(live.log_probs, cached.log_probs)
    assert torch.equal(live.indices, cached.indices)


def test_a_body_that_is_kept_answers_after_every_sample_is_cached(tmp_path):
    teacher = Teacher(ready(tiny_model()), tmp_path, keep_body=True)
    teacher.fill(samples())
    assert not teacher.release_body_if_cached(samples())
    assert teacher.live(samples(7)[6:]).hidden.shape == (9, 32)


def test_a_body_that_was_released_says_how_to_keep_it(tmp_path):
    teacher = Teacher(ready(tiny_model()), tmp_path)
    teacher.fill(samples())
    assert teacher.release_body_if_cached(samples())
    with pytest.raises(RuntimeError, match=r"released, as all training samples are in its cache: .* keep_body=True"):
        teacher.live(samples())


@pytest.mark.parametrize("change", ["seed", "configuration", "buffer"])
def test_another_teacher_finds_nothing_in_the_cache(tmp_path, change):
    Teacher(ready(tiny_model()), tmp_path).fill(samples())
    other = tiny_model(seed=int(change == "seed"))
    if change == "configuration":
        other.config.rms_norm_eps = 1e-3
    if change == "buffer":
        other.model.register_buffer("shift", torch.ones(1))
    assert Teacher(ready(other), tmp_path).cache.missing(samples()) == samples()


def test_what_was_computed_in_another_precision_is_not_read(tmp_path):
    Teacher(ready(tiny_model()), tmp_path, precision="fp32").fill(samples())
    assert Teacher(ready(tiny_model()), tmp_path, precision="bf16").cache.missing(samples()) == samples()
    assert Teacher(ready(tiny_model()), tmp_path, precision="fp32").cache.missing(samples()) == []


def test_a_teacher_saved_elsewhere_and_loaded_again_is_the_same(tmp_path):
    tiny_model().save_pretrained(tmp_path / "copy")
    assert teacher_fingerprint(load_model(str(tmp_path / "copy"))) == teacher_fingerprint(tiny_model())


def test_the_scales_of_a_quantised_teacher_are_part_of_its_fingerprint(tmp_path):
    model = load_model(str(save_tiny(tmp_path / "model", hidden=64)), quantization="8bit")
    before = teacher_fingerprint(model)
    assert teacher_fingerprint(model) == before
    model.model.layers[1].mlp.up_proj.weight.SCB.mul_(2)  # the int8 weights stay as they are
    assert teacher_fingerprint(model) != before


def test_what_rounding_loses_is_said_once(tmp_path, capsys):
    teacher = Teacher(ready(tiny_model()), tmp_path, cache_dtype=torch.int8)
    teacher.logits(samples())
    teacher.logits(samples(7))
    said = capsys.readouterr().out
    assert said.count("hidden-int8 changes hidden states by") == 1
    assert "nats (mean KL)" in said


# bf16 keeps 8 bits: 2^-9 at most, about 1.7e-3 in norm. int8 of a normal row: absmax / 127 / sqrt(12) of a sigma.
@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.float32, 0, 0), (torch.bfloat16, 1e-3, 2**-9), (torch.int8, 4e-3, 1e-2)]
)
def test_the_loss_of_rounding_is_that_of_the_stored_rows(dtype, low, high):
    torch.manual_seed(0)
    head, hidden = lm_head(tiny_model()), torch.randn(300, 32)
    loss = rounding_loss(HiddenEntries(32, dtype), head, hidden)
    assert low <= loss.hidden <= high
    entries = HiddenEntries(32, dtype)
    stored = entries.decode(entries.encode(hidden), torch.float32)
    p, q = (log_softmax((x @ head.weight.detach().T).double(), -1) for x in (hidden, stored))
    assert loss.divergence == pytest.approx(
        kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-4, abs=1e-12
    )


def test_hidden_states_with_nan_are_refused_and_not_cached(tmp_path):
    model = ready(tiny_model())
    teacher = Teacher(model, tmp_path)
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        teacher.logits(samples())
    assert teacher.cache.missing(samples()) == samples()


def test_top_k_is_that_of_the_whole_distribution_live_and_read_back(tmp_path, capsys):
    want = log_softmax(supervised_logits(ready(tiny_model()), pack(samples()), packed=True).double(), -1)
    teacher = Teacher(ready(tiny_model()), tmp_path, cache_mode="topk", top_k=5)
    for top in (teacher.top_k(samples()), teacher.top_k(samples())):
        torch.testing.assert_close(top.log_probs.double(), want.topk(5).values, rtol=1e-5, atol=1e-5)
        assert torch.equal(top.indices.long(), want.topk(5).indices)
        assert (top.log_probs.dtype, top.indices.dtype) == (torch.float32, torch.int32)
    held = 100 * want.topk(5).values.exp().sum(1).mean()
    assert f"the 5 most likely tokens hold {held:.4g} %" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a cache of top5 holds no hidden states"):
        teacher.logits(samples())


def test_rows_past_a_chunk_are_ranked_too():
    torch.manual_seed(0)
    head, hidden = lm_head(tiny_model()), torch.randn(600, 32)
    want = log_softmax(hidden @ head.weight.detach().T, -1).topk(4)
    top = most_likely(head, hidden, 4)
    assert torch.equal(top.indices.long(), want.indices)
    torch.testing.assert_close(top.log_probs, want.values, rtol=1e-5, atol=1e-5)


def test_a_top_k_teacher_leaves_memory_whole_its_lm_head_too(tmp_path):
    model = ready(tiny_model())
    teacher = Teacher(model, tmp_path, cache_mode="topk", top_k=5)
    want = teacher.top_k(samples())
    head = weakref.ref(model.lm_head.weight)
    del model
    assert teacher.release_body_if_cached(samples())
    gc.collect()
    assert head() is None
    assert torch.equal(teacher.top_k(samples()).log_probs, want.log_probs)
    with pytest.raises(RuntimeError, match="released"):
        _ = teacher.lm_head


def test_a_loss_is_given_the_hidden_states_with_the_lm_head_or_the_top_k(tmp_path):
    whole = Teacher(ready(tiny_model()), tmp_path).output(samples())
    assert isinstance(whole, LinearTeacher)
    assert torch.equal(whole.hidden, Teacher(ready(tiny_model()), tmp_path / "other").hidden(samples()))
    top = Teacher(ready(tiny_model()), tmp_path, cache_mode="topk", top_k=3).output(samples())
    assert isinstance(top, TopKTeacher)
    assert top.log_probs.shape == (33, 3)


def test_a_top_k_that_the_vocabulary_does_not_have_is_refused(tmp_path):
    with pytest.raises(InputError, match="a top-k of 260: must be within 1 and the vocabulary's 259 tokens"):
        Teacher(ready(tiny_model()), tmp_path, cache_mode="topk", top_k=260)


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(
            **SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=None
        ),
        GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=4.0),
    ],
    ids=["gemma2-softcap", "granite-scaling"],
)
def test_what_a_family_does_to_its_logits_is_repeated_from_hidden_states(tmp_path, config):
    torch.manual_seed(0)
    config.initializer_range = 0.3
    model = ready(AutoModelForCausalLM.from_config(config).eval())
    want = supervised_logits(model, pack(samples(vocab=97)), packed=True)
    teacher = Teacher(model, tmp_path, cache_dtype=torch.float32)
    torch.testing.assert_close(teacher.logits(samples(vocab=97)), want, rtol=1e-4, atol=1e-4)


def test_a_family_whose_logits_are_something_else_is_refused(tmp_path):
    model = ready(tiny_model())
    model.lm_head.register_forward_hook(lambda _, __, logits: logits * 2)
    with pytest.raises(InputError, match="more to its logits"):
        Teacher(model, tmp_path)
