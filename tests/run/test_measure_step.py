"""`pocl-fast measure` by several processes, by killed ones, and for signals that are added later."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from forked import Forked
from ranks import gloo
from tiny import arithmetic, tiny_tokenizer, write_jsonl
from tiny_run import make_inputs, options, refusal, run, select

from pocl_fast.answers import engine
from pocl_fast.curriculum.stages import Curriculum
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.options.run import RunData
from pocl_fast.records import files
from pocl_fast.run import measure_step

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
QUIET = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
# A command whose answers take their time or fail: RANK_FAILS names the rank, SECONDS is what a batch takes.
SLOWED = """
import os, sys, time
from pocl_fast import cli
from pocl_fast.answers import engine
from pocl_fast.system.errors import InputError

generate = engine.generate

def slowed(*arguments, **options):
    time.sleep(float(os.environ.get("SECONDS", 0)))
    if os.environ.get("RANK", "0") == os.environ.get("RANK_FAILS"):
        raise InputError("this rank's samples are wrong")
    return generate(*arguments, **options)

engine.generate = slowed
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The options of a measurement of 12 batches."""
    inputs = make_inputs(tmp_path_factory.mktemp("inputs"))
    return select(options(inputs, generation_batch_size=2, measure_temperature=1.0), "measure")


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The table of one process."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run("measure", output, *words) == 0
    return pq.read_table(output / "difficulty.parquet")


def same(output, whole):
    """Whether a run's table is that one; its losses to fp32's rounding, which the number of threads may change."""
    table = pq.read_table(output / "difficulty.parquet")
    losses = [one["cross_entropy"].to_numpy() for one in (table, whole)]
    return table.drop("cross_entropy").equals(whole.drop("cross_entropy")) and np.allclose(*losses, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def slowed(tmp_path_factory):
    path = tmp_path_factory.mktemp("slowed") / "slowed.py"
    path.write_text(SLOWED)
    return str(path)


@gloo
@pytest.mark.full  # test_distill_under_torchrun_makes_the_student_of_one_process would show it too
def test_under_torchrun_two_processes_make_the_table_of_one(words, whole, tmp_path):
    command = [*TORCHRUN, "-m", "pocl_fast.cli", "measure", "--output", str(tmp_path / "run"), *words]
    done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "run", whole)
    assert done.stdout.count("24 training samples, ROUGE-L") == 1
    assert run("measure", tmp_path / "run", *words) == 0  # its stamps are those of one process
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock", "config.yaml", "difficulty.parquet", "layers.json", "steps.json",
    ]  # fmt: skip


@gloo
def test_an_error_of_one_rank_ends_all_and_is_said_and_one_process_goes_on(words, whole, slowed, tmp_path):
    command = [*TORCHRUN, slowed, "measure", "--output", str(tmp_path / "run"), *words]
    start = time.monotonic()
    environment = os.environ | QUIET | {"RANK_FAILS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pocl-fast measure: this rank's samples are wrong (rank 1)" in done.stderr
    assert time.monotonic() - start < 60
    assert len(list((tmp_path / "run").rglob("*.parquet"))) in range(1, 7)  # of the other's share
    assert run("measure", tmp_path / "run", *words) == 0
    assert same(tmp_path / "run", whole)


def test_a_command_killed_again_and_again_ends_in_the_same_table(words, whole, tmp_path):
    output, seen = tmp_path / "run", 0
    while seen < 9:
        process = Forked(SLOWED, "measure", "--output", str(output), *words, environment={"SECONDS": "0.05"})
        before, seen = seen, 0
        while seen < before + 3:
            assert process.poll() is None
            time.sleep(0.01)
            seen = len(list(output.rglob("*.parquet")))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run("measure", output, *words) == 0
    assert same(output, whole)


def test_a_signal_of_the_teacher_s_is_added_without_asking_the_student_again(words, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    assert run("measure", output, *words) == 0
    assert run("rank", output) == 0
    before = (output / "difficulty.parquet").stat().st_mtime_ns

    def no_answers(*_, **__):
        raise AssertionError("the student answered again")

    monkeypatch.setattr(engine, "generate", no_answers)
    signals = ("--signals", "mean_kl")
    assert run("measure", output, *words, *signals) == 0
    assert "measure-teacher: the teacher's cross-entropy is " in capsys.readouterr().out
    assert (output / "difficulty.parquet").stat().st_mtime_ns == before
    divergence = pq.read_table(output / "teacher_scores.parquet")["mean_kl"].to_numpy()
    assert run("rank", output, *signals, "--restart") == 0
    assert Curriculum.load(output / "curriculum.json").order.tolist() == divergence.argsort(kind="stable").tolist()
    written = (output / "teacher_scores.parquet").stat().st_mtime_ns
    assert run("measure", output, *words, "--signals", "cross_entropy_gap") == 0  # which the table has
    assert (output / "teacher_scores.parquet").stat().st_mtime_ns == written
    said = refusal(capsys, "measure", output, *words, *signals, "--teacher-quantization", "8bit")
    assert "its step 'measure-teacher' was made with other input (teacher_quantization: was none, now 8bit)" in said
    monkeypatch.undo()
    assert run("measure", output, *words, "--signals", "rouge_l", "--student-layers", "3", "--restart") == 0
    assert not (output / "teacher_scores.parquet").exists()  # of another student
    assert not (output / "curriculum.json").exists()


def test_sampled_answers_are_made_from_their_temperature_and_seed(words, whole, tmp_path, capsys):
    output = tmp_path / "run"
    assert run("measure", output, *words, "--measure-seed", "1") == 0
    assert not same(output, whole)
    assert "measure_seed: was 1, now 2" in refusal(capsys, "measure", output, *words, "--measure-seed", "2")
    said = refusal(capsys, "measure", output, *words, "--measure-seed", "1", "--measure-temperature", "0")
    assert "measure_temperature: was 1.0, now 0.0" in said


def test_an_interrupted_measure_goes_on_and_keeps_its_finished_parts(finished, tmp_path, monkeypatch, capsys):
    inputs, whole = finished
    output, generate, asked = tmp_path / "out", engine.generate, []

    def interrupted(model, prompts, **kwargs):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return generate(model, prompts, **kwargs)

    monkeypatch.setattr(engine, "generate", interrupted)
    words = select(options(inputs), "measure")
    assert run("measure", output, *words) == 130
    assert "run the same command to resume" in capsys.readouterr().err
    assert asked == [8]
    assert [p.name for p in (output / "difficulty.parts" / "000000").iterdir()] == ["000000.parquet"]

    def counted(model, prompts, **kwargs):
        asked.append(len(prompts))
        return generate(model, prompts, **kwargs)

    monkeypatch.setattr(engine, "generate", counted)
    assert run("measure", output, *words) == 0
    assert asked == [8, 8, 8]
    assert (output / "difficulty.parquet").read_bytes() == (whole / "difficulty.parquet").read_bytes()
    assert not (output / "difficulty.parts").exists()


def test_copies_in_a_file_that_is_read_in_pieces_are_counted(finished, tmp_path, monkeypatch, capsys):
    inputs, _ = finished
    monkeypatch.setattr(files, "LARGE", 0)
    train = write_jsonl(tmp_path / "train.jsonl", [*arithmetic(4), *arithmetic(3)])
    assert run("measure", tmp_path / "out", *select(options(inputs, train=train, max_new_tokens=1), "measure")) == 0
    assert capsys.readouterr().out.count(f"{train}: 3 of 7 samples are copies of others") == 1


def _ends_before_the_first_answer(path):
    """The tokens that end an answer, on this rank, once the pieces are about to be read."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (  # another end where a tool is called
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['tool_calls'] %}"
        "{{ m['tool_calls'] | tojson + '<|pad|>' }}{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
    )
    encoder = SampleEncoder(tokenizer)
    data = RunData(train=str(path), max_length=300, max_prompt_length=200)
    nothing = {"say": lambda _: None, "check_stream": lambda _: None, "reports": {}}
    context = SimpleNamespace(config=SimpleNamespace(data=data), encoder=encoder, train_file_is_loaded=False, **nothing)
    before, files.LARGE = files.LARGE, 0
    try:
        measure_step.train_pieces(context)
    finally:
        files.LARGE = before
    return sorted(tokenizer.convert_ids_to_tokens(sorted(encoder.end_ids)))


@gloo
def test_ranks_that_read_a_file_in_pieces_stop_answers_at_the_same_tokens(tmp_path, three_ranks):
    user = {"role": "user", "content": "q"}
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    answers = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    path = write_jsonl(tmp_path / "train.jsonl", [{"messages": [user, answer]} for answer in answers])
    assert three_ranks(_ends_before_the_first_answer, path) == [["<|end|>", "<|pad|>"]] * 3
