"""The train step: the student that it leaves, and the data that it refuses."""

import shutil

import torch
from safetensors.torch import load_file
from tiny import arithmetic, write_jsonl
from tiny_run import options, refusal, run, scores_of, select
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_the_student_loads_with_transformers_and_has_the_weights_of_the_last_stage(finished):
    inputs, output = finished
    student = AutoModelForCausalLM.from_pretrained(output / "student")
    assert student.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(output / "student").chat_template
    last = load_file(output / "checkpoints" / "stage-4-best-16.safetensors")
    assert all(torch.equal(student.state_dict()[name], tensor) for name, tensor in last.items())
    teacher = AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    assert not torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)


def test_train_refuses_data_that_was_not_measured(copied, capsys, tmp_path):
    inputs, output = copied
    shutil.rmtree(output / "student")  # so that training is to be done again
    other = write_jsonl(tmp_path / "other.jsonl", arithmetic(24, start=1))
    said = refusal(capsys, "train", output, *select(options(inputs, train=other), "train"))
    assert "'measure', which 'train' builds on, was made with other input (train data: was " in said
    few = write_jsonl(tmp_path / "few.jsonl", arithmetic(20))
    (output / "steps.json").unlink()
    said = refusal(capsys, "train", output, *select(options(inputs, train=few), "train"))
    assert f"curriculum.json lists sample 20, which --train {few} does not have" in said


def test_a_restarted_training_takes_the_old_students_scores_away(copied):
    inputs, output = copied
    assert run("train", output, *select(options(inputs, learning_rate=0.01), "train"), "--restart") == 0
    assert sorted(scores_of(output)) == ["before", "teacher"]
    assert not (output / "scores" / "dev-after.parquet").exists()


def test_with_alpha_1_everywhere_the_teacher_is_not_run(finished, tmp_path, capsys):
    inputs, output = finished[0], tmp_path / "out"
    words = options(inputs, stages=1, alpha=(1.0,), eval_seeds=(1,), max_new_tokens=2)
    assert run("distill", output, *words) == 0
    said = capsys.readouterr().out
    assert "alpha 1 in every stage: no teacher is used" in said
    assert "KD" not in said
    assert not (output / "teacher_cache").exists()
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "divergence between student and" not in page
