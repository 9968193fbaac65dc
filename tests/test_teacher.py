"""The teacher's logits, live and from the cache; and what the cache does about changes and damage."""

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

from pocl_fast.errors import InputError
from pocl_fast.packing import enable_packing, pack, supervised_logits
from pocl_fast.samples import EncodedSample
from pocl_fast.teacher import Teacher, TeacherCache


def samples(count=6, vocab=200):
    generator = torch.Generator().manual_seed(count)
    rows = [torch.randint(0, vocab, (4 + i + 3,), generator=generator).tolist() for i in range(count)]
    return [EncodedSample(i, tuple(row[:4]), tuple(row[4:]), False) for i, row in enumerate(rows)]


def ready(model):
    enable_packing(model)
    return model


def test_logits_are_the_models_own_first_live_and_then_from_the_cache(tmp_path):
    want = supervised_logits(ready(tiny_model()), pack(samples()), packed=True)
    teacher = Teacher(ready(tiny_model()), tmp_path, cache_dtype=torch.float32)
    live = teacher.logits(samples())
    torch.testing.assert_close(live, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(teacher.logits(samples()), live)
    assert teacher.release_body_if_cached(samples())
    reordered = samples()[::-1]
    torch.testing.assert_close(teacher.logits(reordered), torch.cat(live.split([s + 3 for s in range(6)])[::-1]))


def test_a_bf16_cache_gives_the_same_bits_live_and_read_back(tmp_path):
    teacher = Teacher(ready(tiny_model()), tmp_path)
    live = teacher.logits(samples())
    teacher.cache.flush()
    again = Teacher(ready(tiny_model()), tmp_path)
    assert all(sample in again.cache for sample in samples())
    assert torch.equal(again.logits(samples()), live)


def test_the_body_runs_only_for_samples_that_are_not_cached(tmp_path):
    model = ready(tiny_model())
    teacher = Teacher(model, tmp_path)
    tokens = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    few, every = samples()[:2], samples()
    teacher.logits(few)
    teacher.logits(every)
    teacher.logits(every)
    assert tokens == [sum(map(len, few)), sum(map(len, every[2:]))]


def test_the_body_is_kept_until_every_sample_is_cached(tmp_path):
    teacher = Teacher(ready(tiny_model()), tmp_path)
    teacher.logits(samples()[:2])
    assert not teacher.release_body_if_cached(samples())
    teacher.logits(samples())
    assert teacher.release_body_if_cached(samples())
    with pytest.raises(RuntimeError, match="released"):
        teacher.logits(samples(7))


def test_another_teacher_finds_nothing_in_the_cache(tmp_path):
    Teacher(ready(tiny_model()), tmp_path).logits(samples())
    other = Teacher(ready(tiny_model(seed=1)), tmp_path)
    assert not any(sample in other.cache for sample in samples())


def test_a_sample_with_another_prompt_boundary_is_another_sample():
    a, b = EncodedSample(0, (1, 2), (3, 4), False), EncodedSample(0, (1, 2, 3), (4,), False)
    assert TeacherCache.key(a) != TeacherCache.key(b)


def test_a_damaged_shard_is_said_and_computed_again(tmp_path, capsys):
    teacher = Teacher(ready(tiny_model()), tmp_path)
    want = teacher.logits(samples())
    teacher.cache.flush()
    [shard] = tmp_path.glob("*/shard-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    again = Teacher(ready(tiny_model()), tmp_path)
    assert "is damaged and is computed again" in capsys.readouterr().out
    assert torch.equal(again.logits(samples()), want)


def test_a_leftover_partial_shard_is_not_read(tmp_path):
    cache = TeacherCache(tmp_path, teacher="x" * 64)
    (cache.folder / "shard-00000.partial-1").write_bytes(b"half")
    assert samples()[0] not in TeacherCache(tmp_path, teacher="x" * 64)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    cache = TeacherCache(tmp_path, teacher="x" * 64)
    cache.put(samples()[0], torch.zeros(3, 4))
    cache.folder.rmdir()
    with pytest.raises(InputError, match="cannot write the teacher cache"):
        cache.flush()


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
