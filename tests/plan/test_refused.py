"""What `pocl-fast plan` refuses: all that `distill` does before its first step, in the same words."""

import json

import pytest
from tiny import save_tiny, tiny_tokenizer, write_jsonl
from tiny_run import make_inputs, options, refusal

from pocl_fast.run import checks


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Those of a run, a model of another vocabulary, and files of which something is wrong."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    of_others = save_tiny(folder / "other") / "tokenizer.json"
    known = json.loads(of_others.read_text(encoding="utf-8"))
    vocabulary = known["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    of_others.write_text(json.dumps(known), encoding="utf-8")
    write_jsonl(folder / "bad.jsonl", [{"instruction": "1+1?"}])
    write_jsonl(folder / "long.jsonl", [{"prompt": "7" * 90, "response": "3"}] * 3)
    write_jsonl(folder / "two.jsonl", [{"prompt": question, "response": "3"} for question in "12"])
    return folder


WRONG = {
    "no data": {"train": None},
    "data that is not there": {"train": "nowhere.jsonl"},
    "a record without an answer": {"train": "bad.jsonl"},
    "held-out records without an answer": {"dev": "bad.jsonl"},
    "a long prompt": {"train": "long.jsonl"},
    "limits": {"max_prompt_length": 96},
    "a short limit": {"max_prompt_length": 10},
    "a field that is not there": {"fields": "prompt=question"},
    "more layers than there are": {"student_layers": 9},
    "more stages than samples": {"stages": 99},
    "stages of few samples": {"train": "two.jsonl", "stages": 3},
    "a signal": {"signals": "beauty"},
    "an optimizer": {"set": "optim=none_such"},
    "adapters of no rank": {"lora_rank": 0},
    "a device": {"device": "cuda:7"},
    "the teacher's device": {"teacher_device": "cuda:7"},
    "an engine that is not installed": {"generation_engine": "vllm"},
    "a top-k": {"cache_mode": "topk", "cache_top_k": 999},
    "another vocabulary": {"student": "other", "student_layers": None},
    "reasoning of the teacher": {"reasoning": "only", "data_source": "teacher"},
    # of two faults, the same comes first
    "stages and a vocabulary": {"student": "other", "student_layers": None, "stages": 99},
    "stages and layers": {"student_layers": 9, "stages": 99},
    "stages and a top-k": {"cache_mode": "topk", "cache_top_k": 999, "stages": 99},
}
FILES = ("train", "dev", "student")


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_as_distill_says_it(inputs, tmp_path, capsys, wrong, monkeypatch):
    def no_step(*_):
        raise AssertionError("a step has begun")

    monkeypatch.setattr("pocl_fast.run.steps.measure_step", no_step)
    wrong = {name: inputs / value if name in FILES and value else value for name, value in wrong.items()}
    words = options(inputs, **wrong)
    said = refusal(capsys, "plan", tmp_path / "a", *words)
    assert not (tmp_path / "a").exists()
    assert said.replace("pocl-fast plan", "") == refusal(capsys, "distill", tmp_path / "b", *words).replace(
        "pocl-fast distill", ""
    )
    assert said.startswith("pocl-fast plan: ")


def test_a_check_that_is_added_is_one_of_both(inputs, tmp_path, capsys, monkeypatch):
    """There is one list of them."""
    from pocl_fast.system.errors import InputError

    def refuses(_):
        raise InputError("not on Sundays")

    monkeypatch.setattr(checks, "trainer_arguments", refuses)
    for command in ("plan", "distill"):
        said = refusal(capsys, command, tmp_path / command, *options(inputs))
        assert said == f"pocl-fast {command}: not on Sundays\n"


def test_a_plan_of_one_model_refuses_what_is_wrong_with_it_and_the_data(inputs, tmp_path, capsys):
    """Where a run would ask for the other model first."""
    alone = {"teacher": None, "student_layers": None, "student": inputs / "teacher", "dev": None}
    assert "stages" in refusal(capsys, "plan", tmp_path / "a", *options(inputs, **alone, stages=99))
    few = save_tiny(tmp_path / "few", vocab_size=257)
    tiny_tokenizer().save_pretrained(few)
    said = refusal(capsys, "plan", tmp_path / "a", *options(inputs, **alone | {"student": few}))
    assert "257" in said


def test_without_any_model_it_says_that_a_tokenizer_is_needed(inputs, tmp_path, capsys):
    said = refusal(capsys, "plan", tmp_path / "out", *options(inputs, teacher=None, student_layers=None))
    assert "give --teacher or --student: their tokenizer says how long the samples are" in said
