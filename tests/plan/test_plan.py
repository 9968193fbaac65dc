"""`pocl-fast plan`: what it says against what `distill` then does, and that it loads and writes nothing."""

import shutil

import pytest
import torch
from tiny_plan import by_tokens, planned, text
from tiny_run import options, read_json
from transformers import AutoModelForCausalLM

from pocl_fast.models import loading
from pocl_fast.training.checkpoints import checkpoints
from pocl_fast.training.metrics import read_metrics


def content(shard):
    """Bytes of a shard of the teacher's cache without its header and the end of its offsets."""
    with open(shard, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return shard.stat().st_size - 8 - header - 8


def all_files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ---- what a run does ----


def test_steps_stages_and_the_cache_are_those_of_the_run(finished, capsys):
    inputs, output = finished
    plan = planned(capsys, *options(inputs))
    records = read_metrics(output / "metrics.jsonl")
    assert plan["steps"]["exact"]
    assert plan["steps"]["steps"] == max(record["step"] for record in records)
    stages = read_json(output / "curriculum.json")["stages"]
    assert [one["samples"] for one in plan["steps"]["stages"]] == [stage["size"] for stage in stages]
    for name in ("temperature", "alpha"):
        assert [one[name] for one in plan["steps"]["stages"]] == [stage[name] for stage in stages]
    assert plan["steps"]["evaluations"] == sum("eval_rouge_l" in record for record in records)
    shards = (output / "teacher_cache").rglob("shard-*.safetensors")
    assert plan["disk"]["cache"] == sum(map(content, shards))


def test_the_tokens_of_all_passes_are_those_that_were_trained_on(finished, capsys):
    """Of a run whose order is known; without it the stages' samples are taken to be of mean length."""
    inputs, output = finished
    known = planned(capsys, *options(inputs), "--output", output)
    trained = sum(record["tokens"] for record in read_metrics(output / "metrics.jsonl") if "tokens" in record)
    assert known["steps"]["tokens"] == trained
    assert planned(capsys, *options(inputs))["steps"]["tokens"] == pytest.approx(trained, rel=0.05)


def test_batches_by_tokens_are_an_estimate_until_the_order_is_known(inputs, kept, capsys):
    steps = max(record["step"] for record in read_metrics(kept / "metrics.jsonl"))
    before, after = planned(capsys, *by_tokens(inputs)), planned(capsys, "--output", kept)
    assert not before["steps"]["exact"]
    assert before["steps"]["steps"] == pytest.approx(steps, abs=2)
    assert after["steps"]["exact"]
    assert after["steps"]["steps"] == steps
    assert before["steps"]["largest_batch_tokens"] <= 170


@pytest.mark.parametrize("words", [(), ("--rollouts", "gkd"), ("--alpha", 1, 0.5)], ids=["none", "rollouts", "alpha"])
def test_a_training_without_divergence_has_no_teachers_cache(inputs, capsys, words):
    given = [*options(inputs, stages=2, eval_seeds=(1,), max_new_tokens=2), "--alpha", 1, 1, *words, "--time"]
    plan = planned(capsys, *given)
    times, memory = ([one["step"] for one in part] for part in (plan["times"], plan["memory"]["steps"]))
    assert [("the teacher's cache" in times), ("load the teacher" in memory)] == [bool(words)] * 2
    assert (plan["disk"]["cache"] is not None) == bool(words)
    assert times.count("train") == memory.count("train") == 1


def test_steps_that_do_not_depend_on_the_order_are_exact(inputs, capsys):
    assert planned(capsys, *by_tokens(inputs), "--curriculum", "none")["steps"]["exact"]
    plan = planned(capsys, *by_tokens(inputs), "--steps-per-stage", 3)["steps"]
    assert plan["exact"]
    assert plan["steps"] == 6
    assert planned(capsys, *by_tokens(inputs), "--set", "max_steps=5")["steps"]["steps"] == 5
    patient = planned(capsys, *options(inputs), "--patience", 1)["steps"]
    assert not patient["exact"]
    assert patient["note"].startswith("at most")


def test_checkpoints_best_weights_and_the_student_take_what_was_said(inputs, kept, capsys):
    """Beside headers of files and lists of numbers, which are a few kilobytes."""
    disk = planned(capsys, "--output", kept)["disk"]
    folder = kept / "checkpoints"
    found = checkpoints(folder)
    assert len(found) == disk["checkpoints"] - 1  # the one more is there while the next is written
    for one in found:
        bytes_ = sum(path.stat().st_size for path in one.rglob("*") if path.is_file())
        assert disk["checkpoint"] <= bytes_ <= disk["checkpoint"] + 60_000
    best = sum(path.stat().st_size for path in folder.glob("stage-*-best-*"))
    weights = 4 * sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(kept / "student").parameters())
    assert disk["best_weights"] == 4 * weights  # both stages', and those that the two checkpoints know
    assert 2 * weights <= best <= disk["best_weights"] + 10_000
    student = sum(path.stat().st_size for path in (kept / "student").iterdir())
    assert disk["student"] <= student <= disk["student"] + 10_000


@pytest.mark.parametrize(
    ("changed", "bytes_a_token"),
    [
        ({"cache_dtype": "fp32"}, 32 * 4),
        ({"cache_dtype": "int8"}, 32 + 4),
        ({"cache_mode": "topk", "cache_top_k": 7}, 7 * 8),
    ],
)
def test_the_cache_is_counted_by_what_is_kept_of_a_token(inputs, capsys, changed, bytes_a_token):
    plan = planned(capsys, *options(inputs, **changed))
    supervised = plan["data"]["train"]["supervised_tokens"]
    assert plan["disk"]["cache"] == supervised * bytes_a_token + 24 * 32  # a key, a checksum, a place


# ---- nothing is loaded and nothing written ----


def no_model(*_, **__):
    raise AssertionError("a model was loaded")


def test_no_model_is_loaded_and_no_run_begun(inputs, tmp_path, capsys, monkeypatch):
    for name in ("load_model", "load_gguf", "_load_merged"):
        monkeypatch.setattr(loading, name, no_model)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_model)
    monkeypatch.chdir(tmp_path)
    planned(capsys, *options(inputs), "--output", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_read_with_its_options_and_left_as_it_is(kept, capsys):
    before = all_files(kept)
    plan = planned(capsys, "--output", kept)
    assert plan["steps"]["stages"][0]["passes"] == 2
    assert all_files(kept) == before


def test_a_run_in_use_can_be_looked_at(kept, capsys):
    from pocl_fast.run_directory.directory import RunDirectory

    before = (kept / "config.yaml").read_bytes()
    held = RunDirectory(kept)
    assert planned(capsys, "--output", kept)["steps"]["exact"]
    assert (kept / "config.yaml").read_bytes() == before
    held._lock.close()


def test_options_of_a_yaml_file_are_read_and_the_command_line_wins(inputs, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    data = f"train: {inputs / 'train.jsonl'}\ndev: {inputs / 'dev.jsonl'}\n"
    file.write_text(f"{data}teacher: {inputs / 'teacher'}\nstages: 3\npacing: baby-steps\nbatch_size: 2\n")
    limits = ("--max-length", 96, "--max-prompt-length", 80)
    plan = planned(capsys, "--config", file, *limits, "--batch-size", 4, "--epochs-per-stage", 1)
    assert [one["samples"] for one in plan["steps"]["stages"]] == [8, 16, 24]
    assert [one["steps"] for one in plan["steps"]["stages"]] == [2, 4, 6]


# ---- what is not known ----


def test_an_optimizer_whose_state_is_not_known_is_said_to_be_counted_as_adamw(inputs, capsys, monkeypatch):
    words, said = options(inputs), "keeps is not known before it runs, and counted as AdamW's"
    known = planned(capsys, *words)
    monkeypatch.setattr("pocl_fast.plan.plan.state_bytes_a_weight", lambda _: None)
    now = planned(capsys, *words)
    assert now["disk"]["checkpoint"] == known["disk"]["checkpoint"]
    assert any(said in note for note in now["notes"])
    assert not any(said in note for note in known["notes"])


# ---- how it looks ----


def test_the_table_fits_into_100_columns_and_has_every_part(inputs, capsys):
    lines = text(capsys, *options(inputs, train_on="last")).splitlines()
    assert max(map(len, lines)) <= 100
    heads = [line.split(":")[0].split(",")[0] for line in lines if line and not line.startswith(" ")]
    assert heads == ["Data", "Data", "Steps", "Models", "Disk", "Memory"]


def test_a_disk_or_a_memory_that_is_too_small_is_a_warning(inputs, capsys, monkeypatch):
    assert "WARNING" not in text(capsys, *options(inputs))
    small = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    assert "WARNING: it does not fit on the disk" in text(capsys, *options(inputs))


def test_the_json_is_all_that_is_on_stdout_whatever_libraries_print(inputs, capsys, monkeypatch):
    from pocl_fast.plan import plan

    made = plan.make_plan

    def with_words(*given, **options):
        print("[WARNING] a library's line")
        return made(*given, **options)

    monkeypatch.setattr(plan, "make_plan", with_words)
    assert planned(capsys, *options(inputs))["steps"]["steps"] > 0


# ---- time ----


def test_times_are_of_every_step_and_what_was_trained_for_them_is_gone(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.manual_seed(0)
    times = planned(capsys, *options(inputs, signals="rouge_l,mean_kl"), "--time", "--output", tmp_path / "out")[
        "times"
    ]
    assert [one["step"] for one in times] == [
        "load and check the models",
        "measure",
        "measure the teacher",
        "evaluate before",
        "evaluate the teacher",
        "the teacher's cache",
        "train",
        "evaluate in training",
        "evaluate after",
    ]
    assert all(0 < one["seconds"] < 60 for one in times)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_measured_is_not_planned(inputs, capsys):
    pocl = planned(capsys, *options(inputs, signals="rouge_l,mean_kl"))
    plan = planned(capsys, *options(inputs, signals="rouge_l,mean_kl", curriculum="random"), "--time")
    assert [one["steps"] for one in plan["steps"]["stages"]] == [one["steps"] for one in pocl["steps"]["stages"]]
    steps = [one["step"] for one in plan["times"]]
    assert "measure" not in steps
    assert "measure the teacher" not in steps
    assert "evaluate before" in steps
    rows = [[one["step"] for one in made["memory"]["steps"]] for made in (pocl, plan)]
    assert [row[0] for row in rows] == ["measure, evaluate", "evaluate"]
    assert ["measure the teacher" in row for row in rows] == [True, False]


@pytest.mark.parametrize("pace", [("--pacing", "competence"), ("--stage-length", "equal"), ("--curriculum", "none")])
def test_every_pace_has_the_same_steps_in_all_and_about_the_same_tokens(inputs, capsys, pace):
    pocl, plan = (planned(capsys, *options(inputs), *more)["steps"] for more in ((), pace))
    assert plan["steps"] == pocl["steps"]
    assert plan["exact"]
    assert plan["tokens"] == pytest.approx(pocl["tokens"], rel=0.1)
