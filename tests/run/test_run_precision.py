"""What `--precision auto` chose in the first step of a run holds for all of it."""

import pytest
import torch
from tiny_run import make_inputs, options, read_json, run, select
from tiny_training import before_each_batch

from pocl_fast.models import precision, product_speed
from pocl_fast.models.precision import PRECISION_FILE, choose_precision
from pocl_fast.models.product_speed import CpuProducts, Speeds
from pocl_fast.training import trainer

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not multiply bf16 for torch"
)


@pytest.fixture
def timing(monkeypatch):
    """`timing("bf16")`: from now on that is what timing finds faster, for the smallest model too."""
    monkeypatch.setattr(product_speed, "SMALL", 0)

    def says(faster):
        both = {"fp32": 100.0, "bf16": 200.0 if faster == "bf16" else 50.0}
        found = Speeds({"ieee": 100.0, "bf16": 100.0, "rounded": both["bf16"]}, both, both, rounds=False)
        monkeypatch.setattr(precision, "measure_speeds", lambda _: found)

    yield says
    choose_precision("fp32", torch.device("cpu"))


@needs_bf16
@pytest.mark.parametrize("first", ["fp32", "bf16"])
def test_a_run_goes_on_in_what_its_first_step_chose(timing, tmp_path, capsys, monkeypatch, first):
    other = "fp32" if first == "bf16" else "bf16"
    words, output = options(make_inputs(tmp_path, train=8, dev=2), precision="auto"), tmp_path / "run"
    made = []
    parts = trainer.training_parts
    monkeypatch.setattr(trainer, "training_parts", lambda *given: made.append(parts(*given)) or made[-1])
    timing(first)
    assert run("measure", output, *select(words, "measure")) == 0
    assert f"precision: {first} for layers that do not train: their products run at" in capsys.readouterr().out
    kept = (output / PRECISION_FILE).read_bytes()
    assert read_json(output / PRECISION_FILE)["layers"] == first
    timing(other)
    assert run("distill", output, *words) == 0
    said = capsys.readouterr().out
    assert said.count("precision: ") == 1
    assert f"precision: {first} for layers that do not train and {first} for weights that do, which an earlier" in said
    assert (output / PRECISION_FILE).read_bytes() == kept
    assert [one.precision.name for one in made] == [first]
    assert "auto" in (output / "config.yaml").read_text()


@needs_bf16
@pytest.mark.parametrize(
    ("command", "given", "trainings"),
    [
        ("sft", {"teacher": None, "student_layers": None, "epochs_per_stage": None}, 1),
        ("distill", {"warmup_epochs": 1, "alpha": (1, 1)}, 2),  # neither reads a teacher
    ],
)
def test_a_training_without_a_teacher_multiplies_as_its_run_chose(
    timing, tmp_path, capsys, monkeypatch, command, given, trainings
):
    inputs, output = make_inputs(tmp_path, train=8, dev=2), tmp_path / "run"
    words = options(inputs, precision="auto", **given)
    named = ["--model", str(inputs / "teacher")] if command == "sft" else []
    made = []
    parts = trainer.training_parts
    monkeypatch.setattr(trainer, "training_parts", lambda *given: made.append(parts(*given)) or made[-1])
    timing("fp32")
    both = {"fp32": 100.0, "bf16": 200.0}  # of layers that do not train alone
    found = Speeds({"ieee": 200.0, "bf16": 100.0, "rounded": 50.0}, both, both, rounds=True)
    monkeypatch.setattr(precision, "measure_speeds", lambda _: found)
    modes = []
    before_each_batch(monkeypatch, lambda *_: modes.append(torch.backends.mkldnn.matmul.fp32_precision))
    assert run(command, output, *select(words, command), *named) == 0
    assert set(modes) == {"ieee"}
    assert capsys.readouterr().out.count("precision: ") == 1
    assert [one.precision.chosen for one in made] == [CpuProducts("ieee", "bf16", "bf16")] * trainings
    assert list(output.rglob(PRECISION_FILE)) == [output / PRECISION_FILE]


@needs_bf16
def test_a_cache_that_was_filled_in_one_precision_is_read_by_the_training_after_it(timing, tmp_path, capsys):
    words, output = options(make_inputs(tmp_path, train=8, dev=2), precision="auto"), tmp_path / "run"
    timing("bf16")
    assert run("cache", output, *select(words, "cache")) == 0
    files = sorted(path.name for path in (output / "teacher_cache").rglob("*"))
    timing("fp32")
    assert run("distill", output, *words) == 0
    assert sorted(path.name for path in (output / "teacher_cache").rglob("*")) == files


@needs_bf16
def test_a_plan_takes_what_a_run_chose_and_keeps_no_choice_of_its_own(timing, tmp_path, capsys):
    words, output = options(make_inputs(tmp_path, train=8, dev=2), precision="auto"), tmp_path / "run"
    timing("fp32")
    assert run("plan", output, *select(words, "plan")) == 0
    assert "precision: fp32 for layers that do not train: their products run at" in capsys.readouterr().out
    assert not output.exists()
    timing("bf16")
    assert run("measure", output, *select(words, "measure")) == 0
    timing("fp32")
    capsys.readouterr()
    assert run("plan", output, *select(words, "plan")) == 0
    assert (
        "precision: bf16 for layers that do not train and bf16 for weights that do, which an earlier"
        in capsys.readouterr().out
    )
