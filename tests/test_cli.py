"""The command line: its help, and that everything wrong is one clear message and exit status 2."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from tiny import arithmetic, save_tiny, tiny_model, tiny_tokenizer, write_jsonl
from tiny_run import make_inputs, options, refusal, run, select
from tokenizers import AddedToken

from pocl_fast import __version__
from pocl_fast.cli import COMMANDS, main
from pocl_fast.options.declaring import flag
from pocl_fast.options.presets import PRESETS
from pocl_fast.options.run import RunConfig
from pocl_fast.settings.configuration import from_options


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def listed_options(shown):
    """Option -> its text, from what --help shows."""
    parts = re.split(r"^ {1,3}(?:-h, )?(--[a-z][a-z-]+)", shown.replace("│", " "), flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_option_of_the_command_with_a_text(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    texts = listed_options(capsys.readouterr().out)
    expected = {"--help"} | {"--" + f.name for f in fields(COMMANDS[command].step) if "Positional" not in str(f.type)}
    for group in COMMANDS[command].groups:
        options = fields(getattr(RunConfig(), group))
        expected |= {flag(option) for option in options if option.name not in COMMANDS[command].unread}
    assert set(texts) == expected
    for name, text in texts.items():
        assert len(text.split()) > 5, name


def test_without_a_command_and_with_help_the_commands_are_listed(capsys):
    assert main([]) == 2
    first = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == first
    assert [line.split()[0] for line in first.splitlines()[2:]] == list(COMMANDS)


def test_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pocl-fast {__version__}\n"


def test_an_unknown_command_is_named(capsys):
    assert main(["destil"]) == 2
    assert "no command 'destil' (did you mean distill?)" in capsys.readouterr().err


def test_options_stand_behind_the_command(capsys):
    assert main(["--train", "data.jsonl", "distill"]) == 2
    assert "--train stands before the command\n\nusage: pocl-fast COMMAND [options]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--batchsize", "3"), "--batch-size"),
        (("--batch-size", "three"), "three"),
        (("--divergence", "kl"), "forward_kl"),
    ],
)
def test_an_option_that_cannot_be_read_is_named(tmp_path, capsys, words, says):
    assert says in refusal(capsys, "distill", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_missing_output_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["distill"])
    assert stop.value.code == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"eval_seeds": (-1,)}, "--eval-seeds, value 1, must be at least 0 and below 2147483648, got -1"),
        ({"stages": 25}, "24 samples cannot fill 25 stages"),
        ({"temperature": (0, 2)}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": (1, 2, 3)}, "one for each of 4 stages, got 3 values"),
        ({"alpha": (0.3, 1.5)}, "alpha must be within 0 to 1, got 1.1"),
        ({"max_length": 80}, "--max-prompt-length (80) must be at least 1 and below --max-length (80)"),
        (
            {"max_prompt_length": 20},
            "24 of 24 prompts are over --max-prompt-length 20 tokens (lines 1, 2, 3, 4, 5, ...",
        ),
        ({"student_layers": None}, "give --student, or --student-layers to cut one from the teacher"),
        ({"teacher": None}, "--teacher"),
        ({"train": None}, "--train is missing"),
        ({"train": "nowhere.jsonl"}, "cannot read nowhere.jsonl: No such file or directory"),
        ({"teacher": "/nowhere/model"}, "no such model folder: /nowhere/model"),
        ({"teacher": "nowhere.gguf"}, "no such GGUF file: nowhere.gguf"),
        ({"device": "tpu9"}, "device tpu9: not a device that torch knows"),
        ({"teacher_device": "nosuch"}, "teacher_device nosuch: not a device that torch knows"),
        ({"student_layers": 5}, "--student-layers 5: the model to cut from has 4 layers"),
    ],
)
def test_an_option_that_does_not_fit_is_said_before_anything_is_computed(inputs, tmp_path, capsys, changed, says):
    output = tmp_path / "out"
    said = refusal(capsys, "distill", output, *options(inputs, **changed))
    assert says in said
    assert said.count("\n") == 1
    assert not (output / "difficulty.parquet").exists()
    assert not (output / "difficulty.parts").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no sample"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n', ", line 2: not JSON"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', ', line 2: field "response" is missing'),
        ('{"prompt": " ", "response": "b"}\n', ', line 1: field "prompt" is empty'),
    ],
)
@pytest.mark.parametrize("which", ["train", "dev"])
def test_bad_data_is_one_message_with_file_and_line(inputs, tmp_path, capsys, which, text, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    said = refusal(capsys, "distill", tmp_path / "out", *options(inputs, **{which: path}))
    assert said.startswith(f"pocl-fast distill: {path}")
    assert says in said
    assert said.count("\n") == 1


def test_a_long_prompt_is_named_with_its_line_or_left_out_when_asked(inputs, tmp_path, capsys):
    records = arithmetic(4)
    records[2]["instruction"] = "x" * 100
    train = write_jsonl(tmp_path / "train.jsonl", records)
    words = select(options(inputs, train=train), "measure")
    said = refusal(capsys, "measure", tmp_path / "out", *words)
    assert f"{train}: 1 of 4 prompts are over --max-prompt-length 80 tokens (line 3; the longest has " in said
    assert "--long-prompts skip" in said
    assert run("measure", tmp_path / "out", *words, "--long-prompts", "skip") == 0
    assert "3 samples; 1 skipped for a prompt over the limit (line 3)" in capsys.readouterr().out


def test_folders_that_are_no_model_are_said_to_be_none(inputs, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    said = refusal(capsys, "distill", tmp_path / "out", *options(inputs, teacher=empty))
    assert f"{empty} is a folder without a config.json, so not a saved model" in said
    (empty / "config.json").write_text("{}")
    said = refusal(capsys, "distill", tmp_path / "out", *options(inputs, teacher=empty))
    assert f"cannot load the tokenizer '{empty}'" in said


def test_damaged_and_missing_weights_are_one_message(inputs, tmp_path, capsys):
    folder = shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    said = refusal(capsys, "distill", tmp_path / "out", *options(inputs, teacher=folder))
    assert f"cannot load the model '{folder}'" in said
    (folder / "model.safetensors").unlink()
    said = refusal(capsys, "distill", tmp_path / "out", *options(inputs, teacher=folder))
    assert f"cannot load the model '{folder}'" in said
    (folder / "model.safetensors").write_bytes(whole)  # repaired: what failed before does not bind
    assert run("measure", tmp_path / "out", *select(options(inputs, teacher=folder), "measure")) == 0


@pytest.mark.parametrize("command", ["distill", "train"])
def test_another_vocabulary_is_refused_before_anything_is_computed(inputs, finished, tmp_path, capsys, command):
    tokenizer = tiny_tokenizer()
    other = tmp_path / "other"
    tiny_model(layers=4).save_pretrained(other)
    tokenizer.save_pretrained(other)
    text = (other / "tokenizer.json").read_text()  # two tokens change places in it
    first, second = (f'"{token}": {i},' for token, i in (("!", 0), ('\\"', 1)))
    assert first in text
    assert second in text
    (other / "tokenizer.json").write_text(text.replace(first, '"!": 1,').replace(second, '"\\"": 0,'))
    output = tmp_path / "out"
    words = options(inputs, student=inputs / "teacher")
    if command == "train":
        for step in ("measure", "rank"):
            assert run(step, output, *select(words, step)) == 0
    words = select(options(inputs, student=inputs / "teacher", teacher=other), command)
    said = refusal(capsys, command, output, *words)
    assert (
        "student and teacher have different vocabularies (259 and 259 tokens): token 0 is '!' for the student" in said
    )
    assert not (output / "checkpoints").exists()


def test_a_teacher_with_entries_added_at_the_end_is_distilled_from(inputs, tmp_path):
    padded = save_tiny(tmp_path / "padded", layers=4, vocab_size=264)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|extra|>", special=True)])
    tokenizer.save_pretrained(padded)
    words = options(inputs, student=inputs / "teacher", teacher=padded, stages=1)
    assert run("distill", tmp_path / "out", *words) == 0


def test_an_output_that_is_a_file_or_holds_other_things_is_left_alone(inputs, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    said = refusal(capsys, "distill", tmp_path / "file", *options(inputs))
    assert f"--output {tmp_path / 'file'} is a file; give a folder" in said
    said = refusal(capsys, "distill", tmp_path / "file" / "below", *options(inputs))
    assert "cannot write to --output" in said
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "thesis.txt").write_text("mine")
    said = refusal(capsys, "distill", tmp_path / "things", *options(inputs))
    assert "holds other files and is not a run; give a new or an empty folder" in said
    assert [p.name for p in (tmp_path / "things").iterdir()] == ["thesis.txt"]


def test_two_processes_never_work_in_one_run(inputs, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    with open(output / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process holds it
        said = refusal(capsys, "measure", output, *select(options(inputs), "measure"))
        assert f"another pocl-fast is working in {output}" in said
    assert run("measure", output, *select(options(inputs), "measure")) == 0


@pytest.mark.parametrize("command", ["rank", "train", "report"])
def test_a_step_on_no_run_says_what_to_start_with_and_makes_nothing(tmp_path, capsys, command):
    said = refusal(capsys, command, tmp_path / "out")
    assert f"--output {tmp_path / 'out'} holds no run yet; start one with `pocl-fast distill` or `measure`" in said
    assert not (tmp_path / "out").exists()


def test_a_step_before_its_time_names_the_step_that_is_missing(inputs, tmp_path, capsys):
    output = tmp_path / "out"
    assert run("measure", output, *select(options(inputs), "measure")) == 0
    said = refusal(capsys, "train", output, *select(options(inputs), "train"))
    assert f"curriculum.json is not there: run `pocl-fast rank --output {output}` first" in said
    (output / "difficulty.parquet").unlink()
    said = refusal(capsys, "rank", output)
    assert f"difficulty.parquet is not there: run `pocl-fast measure --output {output}` first" in said


def test_a_preset_takes_the_place_of_the_defaults_and_options_win_over_it(inputs, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "pocl_fast.run.steps.open_run", lambda output, given, restart: seen.append(given) or Stub(output)
    )
    (tmp_path / "more.yaml").write_text("rrf_k: 30")
    given = options(inputs, preset="paper", alpha=0.5, config=tmp_path / "more.yaml")
    assert run("distill", tmp_path / "out", *given) == 0
    wanted = PRESETS["paper"] | {"alpha": [0.5], "rrf_k": 30.0, "max_length": 96, "max_prompt_length": 80}
    wanted |= {"epochs_per_stage": 1, "per_device_train_batch_size": 4}  # of `options`
    wanted["batch_size"] = wanted.pop("per_device_train_batch_size")
    assert {name: value for name, value in seen[0].items() if name in wanted} == wanted
    assert "paper" in refusal(capsys, "distill", tmp_path / "other", *options(inputs, preset="pape"))


def test_the_demo_runs_the_bundled_teacher_on_the_bundled_samples(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "pocl_fast.run.steps.open_run", lambda output, given, restart: seen.append(given) or Stub(output)
    )
    assert run("demo", tmp_path / "out") == 0
    config = from_options(seen[0])
    assert (config.models.teacher, config.models.student_layers) == ("bundled", 6)
    train, dev = Path(config.data.train), Path(config.data.dev["dev"])
    assert (train.name, dev.name) == ("demo.train.jsonl", "demo.dev.jsonl")
    assert train.is_file()
    assert config.stages.epochs_per_stage == 1


class Stub:
    """A run whose steps are done."""

    def __init__(self, output):
        self.path = output

    def distill(self):
        self.path.mkdir()
        (self.path / "steps.json").write_text("{}")


def test_a_command_prints_no_line_of_a_library_that_it_imports(inputs):
    """DeepSpeed, of a machine without a GPU, on stdout when accelerate imports it: a process of its own."""
    pytest.importorskip("deepspeed")
    given = options(inputs, dev=None, set="max_steps=5")  # which has libraries imported before all else
    words = [sys.executable, "-m", "pocl_fast.cli", "plan", "--json", *given]
    said = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout)["steps"]["steps"] == 5
    assert said.stderr == ""


@pytest.mark.parametrize(("command", "says"), [("plan", None), ("distill", "run the same command to resume")])
def test_a_command_ends_quietly_once_nothing_reads_its_output(inputs, tmp_path, command, says):
    """As under `| head -1`; only what can be resumed says so."""
    given = options(inputs, output=tmp_path / "run")
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "pocl_fast.cli", command, *given]
    ended = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert ended.returncode == 128 + signal.SIGPIPE
    assert "BrokenPipe" not in ended.stderr
    assert ended.stderr == "" if says is None else says in ended.stderr
