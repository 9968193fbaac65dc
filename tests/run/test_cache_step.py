"""`pocl-fast cache`, and runs with each way of keeping the teacher."""

import shutil

import pytest
from tiny_cache import flip, shards
from tiny_run import make_inputs, options, refusal, run, scores_of, select, weights

from pocl_fast.settings.configuration import recorded_config
from pocl_fast.teacher.teacher import Teacher
from pocl_fast.training.metrics import read_metrics


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), train=12, dev=4)


def brief(inputs, **changed):
    return options(inputs, **({"stages": 1, "eval_seeds": (10,)} | changed))


def no_body(*_):
    raise AssertionError("the teacher's body ran")


def test_a_run_whose_cache_was_filled_ahead_never_runs_the_teachers_body(inputs, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    words = brief(inputs, cache_dtype="fp32")
    assert run("cache", output, *select(words, "cache")) == 0
    said = capsys.readouterr().out
    assert "teacher cache: hidden-fp32 changes hidden states by 0.0e+00 of their norm" in said
    assert f"cache: 12 samples, 0.0 MiB in {output / 'teacher_cache'}" in said
    assert recorded_config(output).cache.cache_dtype == "fp32"
    before = [path.stat().st_mtime_ns for path in shards(output)]
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "_compute", no_body)
        assert run("cache", output, *select(words, "cache")) == 0
        assert run("distill", output, *words) == 0
    assert [path.stat().st_mtime_ns for path in shards(output)] == before
    assert run("distill", tmp_path / "usual", *words) == 0
    before, after = (scores_of(tmp_path / name)["after"] for name in ("usual", "out"))
    # batches of another composition round otherwise: not the same bits
    assert after["cross_entropy"] == pytest.approx(before["cross_entropy"], rel=1e-4)


def test_a_sample_added_to_the_data_is_all_that_is_computed(inputs, tmp_path, monkeypatch):
    output, train = tmp_path / "out", tmp_path / "train.jsonl"
    lines = (inputs / "train.jsonl").read_text().splitlines(keepends=True)
    train.write_text("".join(lines[:9]))
    words = select(brief(inputs, train=train), "cache")
    assert run("cache", output, *words) == 0
    train.write_text("".join(lines))
    computed, compute = [], Teacher._compute
    monkeypatch.setattr(Teacher, "_compute", lambda self, new: computed.extend(new) or compute(self, new))
    assert run("cache", output, *words) == 0
    assert sorted(sample.index for sample in computed) == [9, 10, 11]
    computed.clear()
    assert (
        run("cache", output, *words, "--max-prompt-length", "31", "--max-length", "33") == 0
    )  # some responses are shorter now
    assert 0 < len(computed) < 12
    assert all(sample.truncated for sample in computed)


def test_a_run_on_rounded_entries_learns_what_a_run_on_whole_ones_learns(inputs, tmp_path):
    loss = {}
    for name, given in {"whole": {"cache_dtype": "fp32"}, "other": {"cache_dtype": "int8"}}.items():
        assert run("distill", tmp_path / name, *brief(inputs, learning_rate=1e-3, epochs_per_stage=2, **given)) == 0
        loss[name] = scores_of(tmp_path / name)["after"]["cross_entropy"]
    assert weights(tmp_path / "whole") != weights(tmp_path / "other")
    assert loss["other"] == pytest.approx(loss["whole"], rel=2e-3)


def test_training_from_a_top_k_cache_of_the_whole_vocabulary_is_training_from_hidden_states(inputs, tmp_path):
    losses = {}
    for mode, given in (("hidden", {"cache_dtype": "fp32"}), ("topk", {"cache_top_k": 259})):
        output = tmp_path / mode
        assert run("distill", output, *brief(inputs, cache_mode=mode, **given)) == 0
        losses[mode] = [r["loss"] for r in read_metrics(output / "metrics.jsonl") if "loss" in r]
    assert losses["topk"] == pytest.approx(losses["hidden"], rel=1e-4)


def test_a_top_k_cache_says_how_much_of_the_teacher_it_holds(inputs, tmp_path, capsys):
    output, words = tmp_path / "out", brief(inputs, cache_mode="topk", cache_top_k=5)
    assert run("cache", output, *select(words, "cache")) == 0
    assert "the 5 most likely tokens hold " in capsys.readouterr().out
    assert len(shards(output)) == 1
    assert run("distill", output, *words) == 0


def test_a_damaged_cache_is_repaired_by_the_next_training(inputs, tmp_path, capsys):
    output, words = tmp_path / "out", brief(inputs)
    assert run("distill", output, *words) == 0
    first = weights(output)
    [shard] = shards(output)
    flip(shard, "hidden", byte=77)
    for name in ("student", "checkpoints"):
        shutil.rmtree(output / name)
    (output / "metrics.jsonl").unlink()
    capsys.readouterr()
    assert run("distill", output, *words) == 0
    assert f"{shard} is damaged" in capsys.readouterr().out
    assert weights(output) == first


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cache_dtype": "fp16"}, "fp16"),
        (
            {"cache_mode": "topk", "cache_top_k": 260},
            "a top-k of 260: must be within 1 and the vocabulary's 259 tokens",
        ),
        ({"cache_top_k": 0}, "--cache-top-k must be at least 1, got 0"),
        ({"teacher": None}, "--teacher"),
        ({"train": None}, "--train is missing"),
    ],
)
def test_options_that_do_not_fit_are_named(inputs, tmp_path, capsys, given, says):
    assert says in refusal(capsys, "cache", tmp_path / "out", *select(brief(inputs, **given), "cache"))
    assert not shards(tmp_path / "out")
