"""The layers of a run's student: chosen once, the same in every step, and written down."""

import json

import pytest
import torch
from ranks import gloo
from tiny import arithmetic, save_tiny, tiny_model, tiny_tokenizer, write_jsonl
from tiny_run import make_inputs, options, read_json, refusal, run, select
from transformers import AutoModelForCausalLM

from pocl_fast.cutting import layer_choice
from pocl_fast.records import files
from pocl_fast.run.steps import open_run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A teacher whose first and last layers add nothing, and samples."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), train=16, dev=4)
    teacher = tiny_model(layers=4)
    for layer in (0, 3):
        teacher.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        teacher.model.layers[layer].mlp.down_proj.weight.data.zero_()
    teacher.save_pretrained(folder / "teacher")
    return folder


@pytest.fixture
def measures(monkeypatch):
    """The numbers of samples on which layers were measured, a number each time."""
    counts, measure = [], layer_choice.block_influence

    def counting(source, layers, samples):
        counts.append([one.index for one in samples])
        return measure(source, layers, samples)

    monkeypatch.setattr(layer_choice, "block_influence", counting)
    return counts


def words_of(inputs, command="distill", **changed):
    given = options(inputs, **{"layer_choice": "importance", "stages": 2, "max_new_tokens": 2} | changed)
    return given if command == "distill" else select(given, command)


def test_all_steps_of_a_run_cut_the_layers_that_were_chosen_once(inputs, measures, tmp_path, capsys):
    output = tmp_path / "out"
    assert run("measure", output, *words_of(inputs, "measure")) == 0
    assert run("rank", output, *words_of(inputs, "rank")) == 0
    assert run("train", output, *words_of(inputs, "train", learning_rate=1e-9)) == 0
    assert run("distill", output, *words_of(inputs, learning_rate=1e-9)) == 0
    assert len(measures) == 1
    said = capsys.readouterr().out
    assert said.count("student: 2 of 4 layers; even (0, 3): held-out CE ") == 1
    assert "taken: importance" in said
    assert read_json(output / "layers.json")["layers"] == [1, 2]
    assert read_json(output / "student" / "layers.json")["layers"] == [1, 2]
    trained = AutoModelForCausalLM.from_pretrained(output / "student")
    teacher = AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    for new, old in enumerate((1, 2)):
        torch.testing.assert_close(trained.model.layers[new].state_dict(), teacher.model.layers[old].state_dict())
    assert "The student has 2 of 4 layers: 1, 2" in (output / "report.html").read_text()


def test_a_run_from_a_large_file_measures_its_first_samples_whether_it_is_streamed_or_not(
    inputs, measures, tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "LARGE", 1)
    monkeypatch.setattr("pocl_fast.run.cut_student.SAMPLES", 4)
    assert run("measure", tmp_path / "streamed", *words_of(inputs, "measure")) == 0
    open_run(tmp_path / "streamed", {}).context.student()
    read = open_run(tmp_path / "read", from_words(inputs)).context
    assert len(read.train_file.encoded) == 16
    read.student()
    assert measures == [[0, 2, 4, 6]] * 2
    streamed, whole = (read_json(tmp_path / name / "layers.json") for name in ("streamed", "read"))
    assert streamed == whole


def test_held_out_samples_choose_no_layers_of_a_run_that_streams_its_file(inputs, measures, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", 1)
    words = from_words(inputs, dev={}, held_out=1)
    run = open_run(tmp_path / "out", words)
    run.context.student()
    [used] = measures
    [held_out] = {one.index for one in run.context.dev_set.encoded}
    every = {one.index for one in run.context.train_set.encoded}
    assert every == set(range(16)) - {held_out}
    assert set(used) < every


def from_words(inputs, **changed):
    return {
        "teacher": str(inputs / "teacher"), "student_layers": 2, "layer_choice": "importance",
        "train": str(inputs / "train.jsonl"), "dev": str(inputs / "dev.jsonl"), "max_length": 96,
        "max_prompt_length": 80, "max_new_tokens": 2, "generation_batch_size": 8, "precision": "fp32", "device": "cpu",
        "eval_seeds": [10, 20],
    } | changed  # fmt: skip


def test_layers_chosen_by_other_samples_are_another_run(inputs, measures, tmp_path, capsys):
    output, other = tmp_path / "out", write_jsonl(tmp_path / "other.jsonl", arithmetic(10, start=40))
    words = words_of(inputs, "evaluate")
    open_run(output, from_words(inputs)).evaluate("before")
    assert len(measures) == 1
    said = refusal(capsys, "evaluate", output, *words_of(inputs, "evaluate", train=other))
    assert "its step 'evaluate-before' was made with other input (train data: was" in said
    said = refusal(capsys, "evaluate", output, *words, "--layer-choice", "even")
    assert "layer_choice: was importance, now even" in said
    assert run("measure", output, *words_of(inputs, "measure", train=other)) == 0
    assert len(measures) == 2


def test_an_evaluation_of_chosen_layers_needs_the_training_samples(inputs, tmp_path, capsys):
    said = refusal(capsys, "evaluate", tmp_path / "out", *words_of(inputs, "evaluate", train=None))
    assert "--train (for --layer-choice importance) is missing" in said


def test_a_choice_without_student_layers_is_refused_before_data_is_read(inputs, tmp_path, capsys):
    for command in ("distill", "plan", "measure"):
        words = words_of(inputs, command, student_layers=None, student=inputs / "teacher", train="nowhere.jsonl")
        said = refusal(capsys, command, tmp_path / "out", *words)
        assert "--layer-choice importance says which layers a cut student keeps: give --student-layers too" in said


def _layers_of_a_run(output, options):
    """The first weights of the student's layers, and how often this rank measured."""
    measured, measure = [], layer_choice.block_influence
    layer_choice.block_influence = lambda *given: measured.append(1) or measure(*given)
    try:
        student = open_run(output, options).context.student().model
    finally:
        layer_choice.block_influence = measure
    return [layer.mlp.up_proj.weight[0, 0].item() for layer in student.model.layers], len(measured)


@gloo
def test_every_rank_cuts_the_layers_that_the_first_one_measures(inputs, two_ranks, tmp_path):
    (first, once), (second, never) = two_ranks(_layers_of_a_run, tmp_path / "out", from_words(inputs))
    assert first == second
    assert (once, never) == (1, 0)
    assert read_json(tmp_path / "out" / "layers.json")["layers"] == [1, 2]


def test_a_student_given_by_name_is_cut_by_importance_too(inputs, measures, tmp_path):
    save_tiny(tmp_path / "whole", layers=3, seed=1)
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    student = open_run(tmp_path / "out", from_words(inputs, student=str(tmp_path / "whole"))).context.student()
    assert len(student.model.model.layers) == 2
    assert json.loads((tmp_path / "out" / "layers.json").read_text())["made_from"]["of"] == 3


def test_a_plan_says_that_it_plans_with_the_even_layers(inputs, measures, tmp_path, capsys):
    assert run("plan", tmp_path / "out", *words_of(inputs)) == 0
    assert "--layer-choice importance: planned with the even layers" in capsys.readouterr().out
    assert measures == []
