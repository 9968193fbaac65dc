"""The examples run as they are, and so does every block of code in README.md: on tiny models here, for seconds."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import arithmetic, save_tiny, tiny_model, tiny_tokenizer

from pocl_fast.cli import main
from pocl_fast.records.samples import read_samples

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
TINY = {
    "teacher": "TEACHER", "student-layers": 2, "max-length": 160, "max-prompt-length": 128, "max-new-tokens": 4,
    "epochs-per-stage": 1, "eval-seeds": 10, "device": "cpu", "precision": "fp32",
}  # fmt: skip


@pytest.fixture
def tiny_teacher(tmp_path):
    return save_tiny(tmp_path / "teacher", layers=6)


def tiny_options(teacher: Path) -> list[str]:
    return [word for name, value in (TINY | {"teacher": teacher}).items() for word in (f"--{name}", str(value))]


def run_example(name: str, *words: str, monkeypatch: Any, capfd: Any) -> str:
    """What an example prints; the bundled model is a tiny one."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import smollm2

    monkeypatch.setattr(smollm2, "load_smollm2", lambda: (tiny_model(layers=20), tiny_tokenizer()))
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return str(capfd.readouterr().out)


@pytest.mark.full  # dequantises 135M weights: half of this file's time
def test_the_examples_load_the_bundled_model(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import smollm2

    model, tokenizer = smollm2.load_smollm2()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_a_cut_model_has_its_own_copies_of_the_first_and_the_last_layer_and_answers(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import smollm2

    model = tiny_model(layers=7)
    student = smollm2.cut(model, 2)
    for mine, theirs in ((0, 0), (1, 6)):
        kept, original = student.model.layers[mine].mlp.up_proj.weight, model.model.layers[theirs].mlp.up_proj.weight
        assert kept.equal(original)
        assert kept.data_ptr() != original.data_ptr()
    ids = torch.tensor([[1, 2, 3]])
    with_cache = student.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    without = student.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert with_cache.equal(without)


def test_distilling_your_own_data_leaves_a_student_and_shows_answers(tmp_path, tiny_teacher, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    said = run_example(
        "distil_your_own_data.py", *tiny_options(tiny_teacher), "--stages", "2", monkeypatch=monkeypatch, capfd=capfd
    )
    assert (tmp_path / "runs/your-own-data/student/model.safetensors").is_file()
    assert said.count("  before: ") == said.count("  after: ") == 3
    assert "What is zero plus zero?   (accepted: zero, 0)" in said


def test_the_losses_in_a_plain_loop_give_both_students_the_same_figures(monkeypatch, capfd):
    said = run_example("losses_in_a_plain_loop.py", "--steps", "4", monkeypatch=monkeypatch, capfd=capfd)
    dense, linear = (
        [line.removeprefix(name).strip() for line in said.splitlines() if line.startswith(name)]
        for name in ("student, distillation_loss", "student, linear loss")
    )
    assert dense == linear
    assert len(dense) == 4


def test_the_second_student_of_a_cached_teacher_does_not_run_it(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = run_example("one_teacher_cache_two_students.py", "--steps", "6", monkeypatch=monkeypatch, capfd=capfd)
    runs = {line.split()[0]: int(line.split()[-1]) for line in said.splitlines() if re.match(r"\d+ layers ", line)}
    assert runs == {"6": 6, "10": 0}  # one pass over 36 samples in batches of 6, then none


def test_the_trainer_with_lora_saves_the_adapters_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = run_example("trainer_with_lora.py", "--steps", "2", monkeypatch=monkeypatch, capfd=capfd)
    assert "adapter_model.safetensors" in said
    assert "model.safetensors (" not in said.replace("adapter_model.safetensors (", "")


# -- README.md ------------------------------------------------------------------------------------------------------


def blocks(language: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_python_in_the_readme_runs(tmp_path, tiny_teacher, monkeypatch):
    """One after the other, in one namespace, as a reader pastes them; "bundled" is a tiny model."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    found = blocks("python")
    assert len(found) >= 2
    for block in found:
        exec(block.replace('"bundled"', repr(str(tiny_teacher))), names)
    assert (tmp_path / "out/student/model.safetensors").is_file()


def test_the_python_in_the_page_on_losses_runs():
    names: dict[str, Any] = {}
    for block in blocks("python", "docs/losses.md"):
        exec(block, names)
    assert names["hidden"].grad.abs().sum() > 0


def test_the_samples_in_the_readme_are_read(tmp_path):
    (shown,) = blocks("json")
    path = tmp_path / "samples.jsonl"
    for line in shown.splitlines():  # a form each, and a file has one
        path.write_text(line, encoding="utf-8")
        assert len(read_samples(path)) == 1
    assert len({frozenset(json.loads(line)) for line in shown.splitlines()}) == 4


def test_the_commands_in_the_readme_run(tmp_path, tiny_teacher, monkeypatch):
    """Each `pocl-fast` command on tiny files; what it names by a capital letter or a file name is put in its place."""
    monkeypatch.chdir(tmp_path)
    turns = [
        [{"from": "human", "value": one["instruction"]}, {"from": "gpt", "value": one["output"]}]
        for one in arithmetic(12)
    ]
    (tmp_path / "sharegpt.json").write_text(json.dumps([{"conversations": one} for one in turns]), encoding="utf-8")
    commands = [
        shlex.split(line.split("#")[0])
        for block in blocks("bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("pocl-fast ")
    ]
    assert {words[1] for words in commands} >= {"distill", "plan", "inspect"}
    for words in commands:
        given = [str(tiny_teacher) if word == "bundled" else word for word in words[1:]]
        others = {"distill": tiny_options(tiny_teacher), "plan": ["--student-layers", "2"]}
        assert main([*given, *others.get(words[1], [])]) == 0
    assert (tmp_path / "run/report.html").is_file()


def test_the_make_targets_in_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(blocks("bash"))))
    assert {"demo", "test"} <= named <= targets
