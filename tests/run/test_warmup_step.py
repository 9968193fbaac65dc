"""The warm-up of a run: the student learns the references first, and everything after it starts from that student."""

import os
import shutil
import signal

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import make_inputs, options, read_json, refusal, run, scores_of, select, weights
from tiny_training import before_each_batch, encoded_samples, transformers_loss
from transformers import AutoModelForCausalLM

from pocl_fast.cutting.cut import cut_layers
from pocl_fast.options.run import RunConfig
from pocl_fast.run.warmup_step import warmup_config
from pocl_fast.settings.configuration import from_options, recorded_config
from pocl_fast.training.arguments import PoclConfig
from pocl_fast.training.metrics import read_metrics

WARM = ("--warmup-epochs", "2", "--warmup-learning-rate", "0.003", "--stages", "2")


def of_a_run(inputs):
    return [*options(inputs, eval_seeds=(1,), max_new_tokens=2), *WARM]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def warmed(inputs, tmp_path_factory):
    """A run with a warm-up of 12 steps."""
    output = tmp_path_factory.mktemp("warmed") / "run"
    assert run("distill", output, *of_a_run(inputs)) == 0
    return output


def warmed_weights(output):
    return (output / "warmup" / "student" / "model.safetensors").read_bytes()


def losses(model):
    """transformers' own loss of each training sample."""
    return [transformers_loss(model.eval(), sample) for sample in encoded_samples(24)[1]]


def test_the_student_learns_the_references_and_is_measured_as_it_is_then(inputs, warmed):
    given = cut_layers(AutoModelForCausalLM.from_pretrained(inputs / "teacher"), 2)
    student = AutoModelForCausalLM.from_pretrained(warmed / "warmup" / "student")
    before, after = losses(given), losses(student)
    assert sum(after) < 0.8 * sum(before)
    measured = pq.read_table(warmed / "difficulty.parquet")["cross_entropy"].to_pylist()
    assert measured == pytest.approx(after, rel=1e-4)


def test_the_warm_up_is_a_step_with_files_and_a_stamp_of_its_own(warmed):
    assert sorted(path.name for path in (warmed / "warmup").iterdir()) == ["checkpoints", "metrics.jsonl", "student"]
    assert not list((warmed / "warmup" / "checkpoints").glob("checkpoint-*"))
    records = read_metrics(warmed / "warmup" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 5, 6, 10, 12]  # 2 passes of 6 steps
    assert all("divergence" not in record for record in records)
    rates = [record["learning_rate"] for record in records]
    assert rates[0] == pytest.approx(0.003, rel=0.02)
    assert rates[-1] < 0.1 * rates[0]  # one cosine over both passes
    stamp = read_json(warmed / "steps.json")["warmup"]
    assert (stamp["done"], stamp["steps"], stamp["samples"]) == (True, 12, 24)
    assert (stamp["made_from"]["warmup_epochs"], stamp["made_from"]["warmup_learning_rate"]) == (2, 0.003)
    assert "learning_rate" not in stamp["made_from"]  # which the warm-up does not read then


def test_the_student_is_scored_as_given_warmed_up_and_trained(warmed):
    known = scores_of(warmed)
    assert set(known) == {"before", "warmed", "after", "teacher"}
    assert known["warmed"]["cross_entropy"] < known["before"]["cross_entropy"]
    assert (warmed / "scores" / "dev-warmed.parquet").is_file()


def test_report_and_closing_table_show_the_warm_up(warmed, inputs, capsys):
    capsys.readouterr()
    assert run("distill", warmed, *of_a_run(inputs)) == 0
    said = capsys.readouterr().out
    assert said.count("warmup: already done") == 1
    assert "before        warmed up            after          teacher" in said
    assert "warm-up: 12 steps of supervised fine-tuning on 24 training samples" in said
    page = (warmed / "report.html").read_text(encoding="utf-8")
    assert "warmed up" in page
    assert "warm-up: 12 steps" in page


# of the 12 batches of the warm-up: the first, one within a pass, the last; and one of the training that follows
@pytest.mark.parametrize("batch", [1, 8, 12, 15])
def test_a_run_killed_in_its_warm_up_ends_with_the_bits_of_one_that_was_not(inputs, warmed, tmp_path, batch):
    def kill(number, *_):
        if number == batch:
            os.kill(os.getpid(), signal.SIGINT)

    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        before_each_batch(patch, kill)
        assert run("distill", output, *of_a_run(inputs)) == 130
    assert read_json(output / "steps.json")["warmup"]["done"] == (batch > 12)
    assert run("distill", output, *of_a_run(inputs)) == 0
    assert warmed_weights(output) == warmed_weights(warmed)
    assert weights(output) == weights(warmed)


def test_steps_alone_warm_up_once_and_give_the_same(inputs, warmed, tmp_path):
    output, words = tmp_path / "out", of_a_run(inputs)
    assert run("measure", output, *select(words, "measure")) == 0
    assert run("rank", output, *select(words, "rank")) == 0
    assert run("train", output, *select(words, "train")) == 0
    assert warmed_weights(output) == warmed_weights(warmed)
    assert weights(output) == weights(warmed)


def test_a_number_of_steps_instead_of_passes(inputs, tmp_path):
    output, words = tmp_path / "out", options(inputs, epochs_per_stage=None)
    assert run("measure", output, *select(words, "measure"), "--warmup-steps", "3", "--learning-rate", "2e-3") == 0
    records = read_metrics(output / "warmup" / "metrics.jsonl")
    assert records[-1]["step"] == 3
    assert records[0]["learning_rate"] == pytest.approx(2e-3, rel=0.3)  # the run's own


def test_adapters_are_warmed_up_and_merged_before_the_student_is_measured(inputs, tmp_path):
    output = tmp_path / "out"
    words = [*of_a_run(inputs), "--lora-rank", "2", "--lora-targets", "q_proj", "up_proj"]
    assert run("distill", output, *words) == 0
    student = load_file(output / "warmup" / "student" / "model.safetensors")
    given = dict(cut_layers(AutoModelForCausalLM.from_pretrained(inputs / "teacher"), 2).state_dict())
    changed = {name for name, value in student.items() if not torch.equal(value, given[name])}
    assert changed
    assert all("q_proj" in name or "up_proj" in name for name in changed)
    base = read_json(output / "student" / "adapter_config.json")["base_model_name_or_path"]
    assert base == str(output / "student" / "base")  # the warmed-up student is nowhere else that stays


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--warmup-epochs", "1", "--warmup-steps", "5"), "--warmup-epochs 1 and --warmup-steps 5 both say how long"),
        (("--warmup-learning-rate", "1e-3"), "--warmup-learning-rate is for a warm-up: give --warmup-epochs"),
        (("--warmup-epochs", "-1"), "--warmup-epochs must be at least 1, got -1"),
        (("--warmup-steps", "0"), "--warmup-steps must be at least 1, got 0"),
        (("--warmup-epochs", "1", "--warmup-learning-rate", "-1"), "--warmup-learning-rate must be above 0, got -1"),
    ],
)
@pytest.mark.parametrize("command", ["distill", "measure", "plan"])
def test_a_warm_up_that_cannot_be_is_one_message_before_anything_runs(inputs, tmp_path, capsys, command, words, says):
    given = select(options(inputs), command)
    said = refusal(capsys, command, tmp_path / "out", *given, *words)
    assert says in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "warmup").exists()


def test_a_warm_up_on_no_samples_is_refused(inputs, tmp_path, capsys):
    (tmp_path / "none.jsonl").write_text("")
    said = refusal(capsys, "distill", tmp_path / "out", *options(inputs, train=tmp_path / "none.jsonl"), *WARM)
    assert "none.jsonl" in said
    assert len(said.strip().splitlines()) == 1


def test_a_run_that_was_made_without_a_warm_up_is_not_warmed_up_later(inputs, tmp_path, capsys):
    output, words = tmp_path / "out", select(options(inputs), "measure")
    assert run("measure", output, *words) == 0
    said = refusal(capsys, "measure", output, *words, "--warmup-epochs", "1")
    assert "holds a run without a warm-up: its step 'measure' was made from the student as it was given" in said
    assert not (output / "warmup").exists()
    assert run("measure", output, *words, "--warmup-epochs", "1", "--restart") == 0
    assert (output / "warmup" / "student").is_dir()


def test_a_warm_up_that_is_taken_away_leaves_nothing(inputs, warmed, tmp_path, capsys):
    output, words = shutil.copytree(warmed, tmp_path / "copy"), [*of_a_run(inputs)[: -len(WARM)], "--stages", "2"]
    without = [*words, "--warmup-epochs", "None", "--warmup-learning-rate", "None"]
    assert "warmed-up student: was" in refusal(capsys, "distill", output, *without)
    (output / "difficulty.parquet").unlink()  # so that nothing says what it was measured by
    assert "holds a run with a warm-up, and these options have none" in refusal(capsys, "distill", output, *without)
    assert (output / "warmup" / "student").is_dir()
    assert run("distill", output, *without, "--restart") == 0
    assert not (output / "warmup").exists()
    assert not list((output / "scores").glob("*-warmed.parquet"))
    assert {"warmup", "evaluate-warmed"}.isdisjoint(read_json(output / "steps.json"))
    assert set(scores_of(output)) == {"before", "after", "teacher"}
    assert run("distill", tmp_path / "new", *words) == 0
    assert weights(output) == weights(tmp_path / "new")


def test_an_order_that_is_not_measured_stays_when_its_warm_up_is_taken_away(inputs, tmp_path):
    words = [*options(inputs, eval_seeds=(1,), max_new_tokens=2), "--curriculum", "none"]
    assert run("distill", tmp_path / "out", *words, "--warmup-steps", "2") == 0
    assert run("distill", tmp_path / "out", *words, "--warmup-steps", "None", "--restart") == 0
    assert not (tmp_path / "out" / "warmup").exists()
    assert (tmp_path / "out" / "curriculum.json").is_file()


def test_an_order_that_is_not_measured_may_be_made_before_the_warm_up(inputs, tmp_path):
    words = [*options(inputs, eval_seeds=(1,), max_new_tokens=2), "--curriculum", "random"]
    assert run("rank", tmp_path / "out", *select(words, "rank"), "--curriculum", "random") == 0
    order = (tmp_path / "out" / "curriculum.json").read_bytes()
    assert run("train", tmp_path / "out", *select(words, "train"), "--warmup-steps", "2") == 0
    assert (tmp_path / "out" / "curriculum.json").read_bytes() == order
    assert (tmp_path / "out" / "warmup" / "student").is_dir()


def test_answers_of_a_teacher_of_another_length_are_another_warm_up(inputs, tmp_path, capsys):
    output, words = tmp_path / "out", [*select(of_a_run(inputs), "measure"), "--data-source", "teacher"]
    assert run("measure", output, *words) == 0
    said = refusal(capsys, "measure", output, *words, "--max-new-tokens", "3")
    assert "its step 'warmup' was made with other input (max_new_tokens: was 2, now 3)" in said


def test_a_warm_up_is_not_called_a_control(inputs, tmp_path, capsys):
    assert run("measure", tmp_path / "out", *select(of_a_run(inputs), "measure")) == 0
    assert "curriculum none" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [(("--warmup-epochs", "3"), "warmup_epochs: was 2, now 3"), (("--seed", "1"), "seed: was 42, now 1")],
)
def test_another_warm_up_in_the_same_folder_is_refused(inputs, warmed, tmp_path, capsys, words, says):
    output = shutil.copytree(warmed, tmp_path / "copy")
    said = refusal(capsys, "distill", output, *of_a_run(inputs), *words)
    assert "its step 'warmup' was made with other input" in said
    assert says in said


def test_the_learning_rates_warm_up_is_another_thing(tmp_path):
    config = from_options({"warmup_epochs": 2, "learning_rate": 1e-3, "set": {"warmup_steps": 7, "optim": "sgd"}})
    training = PoclConfig.of_run(config, tmp_path)
    assert (training.get_warmup_steps(100), training.optim) == (7, "sgd")
    warming = PoclConfig.of_run(warmup_config(config), tmp_path)
    assert (warming.get_warmup_steps(100), warming.optim, warming.learning_rate) == (0, "sgd", 1e-3)
    assert from_options({"warmup_steps": 5}).trainer.set == {}


def test_the_recorded_options_say_what_the_warm_up_was(warmed):
    assert recorded_config(warmed).warmup.warmup_epochs == 2
    assert RunConfig().warmup.warmup_epochs is None
