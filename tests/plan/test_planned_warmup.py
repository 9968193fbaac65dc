"""What `pocl-fast plan` says of a warm-up, against the warm-up that is then done."""

import pytest
from tiny_plan import planned, text
from tiny_run import options, run, select

from pocl_fast.run import fine_tuning
from pocl_fast.training.metrics import read_metrics

WARM = ("--warmup-epochs", "2", "--warmup-learning-rate", "0.003")


@pytest.fixture(scope="module")
def warmed(inputs, tmp_path_factory):
    """A measured student that was warmed up before, with the checkpoints of its warm-up."""
    output = tmp_path_factory.mktemp("warmed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine_tuning, "checkpoints", lambda _: [])  # which are deleted
        assert run("measure", output, *select(options(inputs), "measure"), *WARM) == 0
    return output


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_steps_and_tokens_are_those_of_the_warm_up(inputs, warmed, capsys):
    plan = planned(capsys, *options(inputs), *WARM)["warmup"]
    records = read_metrics(warmed / "warmup" / "metrics.jsonl")
    assert plan["steps"] == records[-1]["step"] == 12
    assert plan["tokens"] == sum(record["tokens"] for record in records)
    assert (plan["samples"], plan["passes"], plan["learning_rate"]) == (24, 2, 0.003)
    some = planned(capsys, *options(inputs), "--warmup-steps", 9)["warmup"]
    assert (some["steps"], some["passes"], some["learning_rate"]) == (9, 1.5, 1e-4)


def test_the_disk_has_the_warmed_up_student_and_the_warm_ups_checkpoints(inputs, warmed, capsys):
    plan, without = (planned(capsys, *options(inputs), *words)["disk"] for words in (WARM, ()))
    saved = size_of(warmed / "warmup" / "student")
    assert plan["warmed"] <= saved <= plan["warmed"] + 15_000
    kept = list((warmed / "warmup" / "checkpoints").glob("checkpoint-*"))
    assert len(kept) == planned(capsys, *options(inputs), *WARM)["warmup"]["checkpoints"] == 2
    assert plan["checkpoint"] <= size_of(kept[0]) <= plan["checkpoint"] + 60_000  # random states, logs
    assert plan["peak"] - without["peak"] == plan["warmed"]
    assert without["warmed"] is None


def test_with_adapters_the_student_keeps_the_model_that_they_are_for(inputs, capsys):
    named = options(inputs, student=inputs / "teacher", student_layers=None, lora_rank=2)
    plan, without = (planned(capsys, *named, *words)["disk"] for words in (WARM, ()))
    assert (without["saved"], plan["saved"]) == ("adapters", "adapters, and the model they are for")
    assert plan["student"] > without["student"] + plan["warmed"] / 2


def test_the_table_names_the_warm_up_its_memory_and_its_time(inputs, capsys):
    said = text(capsys, *options(inputs), *WARM, "--time")
    assert "Warm-up (supervised fine-tuning, before the student is measured)" in said
    assert "the warmed-up student" in said
    memory, times = (said.split(head)[1].split("\n\n")[0] for head in ("\nMemory,", "\nTime,"))
    for part in (memory, times):
        assert part.index("warm up") < part.index("measure")
    assert "evaluate warmed up" in times
    assert "arm-up" not in text(capsys, *options(inputs))
