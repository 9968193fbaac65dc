"""`pocl-fast sft`: a model is fine-tuned on the references in a run directory without a teacher."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from ranks import gloo
from safetensors.torch import load_file
from tiny import PAPERS_STAGES, arithmetic, write_jsonl
from tiny_run import make_inputs, options, read_json, refusal, run, scores_of, select, weights
from tiny_training import before_each_batch, encoded_samples, transformers_loss
from transformers import AutoModelForCausalLM

from pocl_fast.settings.configuration import recorded_config
from pocl_fast.settings.fine_tuning import EPOCHS
from pocl_fast.training.metrics import read_metrics


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def of_a_run(inputs, **changed):
    given = {"teacher": None, "student_layers": None, "epochs_per_stage": None, "eval_seeds": (1,), "max_new_tokens": 2}
    given |= dict.fromkeys(PAPERS_STAGES)  # which it does not have
    return [*options(inputs, **(given | {"learning_rate": 3e-3} | changed)), "--model", str(inputs / "teacher")]


@pytest.fixture(scope="module")
def tuned(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("tuned") / "run"
    assert run("sft", output, *of_a_run(inputs)) == 0
    return output


def test_the_model_learns_the_references(inputs, tuned):
    samples = encoded_samples(24)[1]
    before, after = (
        [transformers_loss(AutoModelForCausalLM.from_pretrained(folder).eval(), sample) for sample in samples]
        for folder in (inputs / "teacher", tuned / "student")
    )
    assert sum(after) < 0.8 * sum(before)
    scores = scores_of(tuned)
    assert scores["after"]["cross_entropy"] < scores["before"]["cross_entropy"]


def test_it_leaves_a_run_without_anything_of_a_teacher(tuned):
    assert list(read_json(tuned / "steps.json")) == ["evaluate-before", "sft", "evaluate-after"]
    left = {path.name for path in tuned.iterdir() if not path.name.startswith(".")}
    assert left == {
        "checkpoints", "config.yaml", "evaluation.json", "metrics.jsonl", "report.html", "scores", "steps.json",
        "student",
    }  # fmt: skip
    page = (tuned / "report.html").read_text(encoding="utf-8")
    assert "Fine-tuning report" in page
    shown = page.split("<h2>Options")[0]
    assert not any(word in shown for word in ("teacher", "divergence", "Distillation"))


def test_it_is_three_passes_unless_epochs_says_otherwise(inputs, tuned, tmp_path):
    records = [record for record in read_metrics(tuned / "metrics.jsonl") if "eval_rouge_l" in record]
    assert [record["step"] for record in records] == [6, 12, 18]
    assert EPOCHS == 3
    assert recorded_config(tuned).stages.epochs_per_stage == 3
    assert run("sft", tmp_path / "two", *of_a_run(inputs), "--epochs", "2") == 0
    assert read_metrics(tmp_path / "two" / "metrics.jsonl")[-1]["step"] == 12
    written = tmp_path / "one.yaml"
    written.write_text(yaml.safe_dump({"epochs_per_stage": 1}))
    assert run("sft", tmp_path / "one", *of_a_run(inputs), "--config", str(written)) == 0
    assert read_metrics(tmp_path / "one" / "metrics.jsonl")[-1]["step"] == 6


def test_the_same_command_and_the_folder_alone_do_nothing_again(inputs, tuned, capsys):
    before = weights(tuned), (tuned / "student").stat().st_mtime_ns
    for words in (of_a_run(inputs), []):
        capsys.readouterr()
        assert run("sft", tuned, *words) == 0
        assert "sft: already done" in capsys.readouterr().out
    assert (weights(tuned), (tuned / "student").stat().st_mtime_ns) == before


@pytest.mark.parametrize("batch", [1, 8, 18])
def test_killed_anywhere_it_ends_with_the_same_bits(inputs, tuned, tmp_path, batch):
    def kill(number, *_):
        if number == batch:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        before_each_batch(patch, kill)
        assert run("sft", tmp_path / "out", *of_a_run(inputs)) == 130
    assert run("sft", tmp_path / "out") == 0  # the folder knows the rest
    assert weights(tmp_path / "out") == weights(tuned)


def test_other_commands_read_its_folder(tuned, capsys):
    for command in ("evaluate", "report", "inspect"):
        assert run(command, tuned) == 0, command
    assert "trained on     the answer" in capsys.readouterr().out


def test_its_evaluation_may_compare_with_a_teacher_and_it_still_goes_on(inputs, tuned, tmp_path, capsys):
    output = shutil.copytree(tuned, tmp_path / "copy")
    assert run("evaluate", output, "--teacher", str(inputs / "teacher"), "--restart") == 0
    scores = scores_of(output)
    assert set(scores) == {"before", "after", "teacher"}
    assert abs(scores["before"]["mean_kl"]) < 1e-6 < scores["after"]["mean_kl"]
    capsys.readouterr()
    assert run("sft", output, *of_a_run(inputs)) == 0
    assert capsys.readouterr().out.count("already done") == 3
    shutil.rmtree(output / "student")
    assert run("sft", output) == 0
    assert weights(output) == weights(tuned)
    written = tmp_path / "other.yaml"
    written.write_text(yaml.safe_dump({"teacher": "another"}))
    assert "has no teacher 'another'" in refusal(capsys, "sft", output, "--config", str(written))


def test_a_dev_set_that_is_added_later_is_not_called_the_one_that_chose(inputs, tuned, tmp_path):
    output = shutil.copytree(tuned, tmp_path / "copy")
    write_jsonl(tmp_path / "later.jsonl", arithmetic(3, start=200))
    sets = f"later={tmp_path / 'later.jsonl'}", f"dev={inputs / 'dev.jsonl'}"
    assert run("evaluate", output, "--dev", *sets, "--restart") == 0
    known = read_json(output / "evaluation.json")["sets"]
    assert {name: one["chooses_weights"] for name, one in known.items()} == {"later": False, "dev": True}


def test_a_teachers_cache_is_not_for_its_folder(inputs, tuned, tmp_path, capsys):
    said = refusal(capsys, "cache", tuned, "--teacher", str(inputs / "teacher"))
    assert "holds a run of `pocl-fast sft`" in said
    assert recorded_config(tuned).models.teacher is None


def test_what_was_fine_tuned_is_a_teacher(inputs, tuned, tmp_path):
    output = tmp_path / "out"
    words = options(inputs, teacher=tuned / "student", stages=1, eval_seeds=(1,), max_new_tokens=2)
    assert run("distill", output, *words) == 0
    assert (output / "student").is_dir()


def test_adapters_are_fine_tuned_for_the_model_that_was_named(inputs, tmp_path):
    output = tmp_path / "out"
    assert run("sft", output, *of_a_run(inputs), "--epochs", "1", "--lora-rank", "2") == 0
    known = read_json(output / "student" / "adapter_config.json")
    assert known["base_model_name_or_path"] == str(inputs / "teacher")


def test_a_model_is_cut_before_it_is_fine_tuned(inputs, tmp_path):
    assert run("sft", tmp_path / "out", *of_a_run(inputs, student_layers=2), "--epochs", "1") == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student").config.num_hidden_layers == 2


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--epochs", "0"), "--epochs must be at least 1, got 0"),
        (("--epochs", "-2"), "--epochs must be at least 1, got -2"),
        (("--train", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_wrong_options_are_one_message(inputs, tmp_path, capsys, words, says):
    said = refusal(capsys, "sft", tmp_path / "out", *of_a_run(inputs), *words)
    assert says in said
    assert len(said.strip().splitlines()) == 1


def test_a_model_must_be_named(inputs, tmp_path, capsys):
    said = refusal(capsys, "sft", tmp_path / "out", *of_a_run(inputs)[:-2])
    assert "--model is missing: give what is to be fine-tuned" in said


def test_options_of_distilling_in_a_yaml_file_are_named(inputs, tmp_path, capsys):
    written = tmp_path / "distil.yaml"
    written.write_text(yaml.safe_dump({"teacher": "some/model", "alpha": [0.5, 0.5], "warmup_epochs": 1}))
    said = refusal(capsys, "sft", tmp_path / "out", *of_a_run(inputs), "--config", str(written))
    assert "has no teacher 'some/model', alpha [0.5, 0.5], warmup_epochs 1" in said


def test_a_fine_tuning_and_a_distillation_do_not_share_a_folder(inputs, tuned, finished, tmp_path, capsys):
    before = weights(tuned)
    for command in ("distill", "measure"):
        said = refusal(capsys, command, tuned, *select(options(inputs), command), "--restart")
        assert "holds a run of `pocl-fast sft`, whose student this one would replace" in said
    assert weights(tuned) == before
    said = refusal(capsys, "sft", finished[1], *of_a_run(inputs), "--restart")
    assert "another --output than that of a run of `pocl-fast distill`" in said


def test_other_data_in_the_same_folder_are_refused(inputs, tuned, capsys):
    said = refusal(capsys, "sft", tuned, "--learning-rate", "1e-5")
    assert "its step 'sft' was made with other input (learning_rate: was 0.003, now 1e-05)" in said


# -- several processes -------------------------------------------------------------------------------------------------


def under_torchrun(command, output, words):
    """A command on two ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pocl_fast.cli", command]
    quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*launch, *words, "--output", str(output)], env=os.environ | quiet, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-6000:]
    return done.stdout


def assert_close(ours, theirs):
    ours, theirs = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-4)


# "auto" is the CPU of both ranks where there is no GPU
DEVICE = "cpu" if torch.cuda.is_available() else None


@gloo
def test_two_ranks_fine_tune_to_the_model_of_one_process(inputs, tuned, tmp_path):
    output = tmp_path / "out"
    said = under_torchrun("sft", output, of_a_run(inputs, batch_size=2, device=DEVICE))
    assert_close(output / "student", tuned / "student")
    assert said.count("training speed:") == 1


@gloo
def test_two_ranks_warm_up_to_the_student_of_one_process(inputs, tmp_path):
    warm = ("--warmup-epochs", "1", "--stages", "1")
    given = {"eval_seeds": (1,), "max_new_tokens": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("distill", one, *options(inputs, **given), *warm) == 0
    said = under_torchrun("distill", two, [*options(inputs, batch_size=2, device=DEVICE, **given), *warm])
    assert_close(two / "warmup" / "student", one / "warmup" / "student")
    assert_close(two / "student", one / "student")
    assert said.count("warm-up: done") == 1
