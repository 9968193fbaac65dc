"""What a run's steps share: which models and samples are loaded, and where they lie."""

import shutil

import pyarrow.parquet as pq
import pytest
from tiny import CHAT_TEMPLATE, arithmetic, tiny_tokenizer, write_jsonl
from tiny_run import make_inputs, options, refusal, run, select

from pocl_fast.curriculum.stages import Curriculum
from pocl_fast.models import loading
from pocl_fast.run.context import RunContext
from pocl_fast.run_directory.directory import RunDirectory
from pocl_fast.settings.configuration import from_options, recorded_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def context(inputs, tmp_path):
    """Makes the context of a run on these inputs with the options given; `said` has what it prints."""

    def make(**changed):
        given = {"teacher": str(inputs / "teacher"), "train": inputs / "train.jsonl", "dev": inputs / "dev.jsonl"}
        given |= {"device": "cpu", "precision": "fp32", "max_length": 96, "max_prompt_length": 80}
        made = RunContext(RunDirectory(tmp_path / "out"), from_options(given | changed), said.append)
        made.said = said
        return made

    said = []
    return make


@pytest.fixture
def loads(monkeypatch):
    """What `load_model` is asked for: sources, and arguments by name."""
    asked, load = [], loading.load_model

    def recorded(source, **given):
        asked.append((source, given))
        return load(source, **given)

    monkeypatch.setattr(loading, "load_model", recorded)
    return asked


def test_a_student_cut_from_the_teacher_shares_its_loading(context, loads, inputs):
    run_context = context(student_layers=2)
    student, teacher = run_context.student().model, run_context.teacher_model()
    assert [source for source, _ in loads] == [str(inputs / "teacher")]
    assert student.config.num_hidden_layers == 2
    assert teacher.config.num_hidden_layers == 4
    assert student.lm_head.weight.data_ptr() != teacher.lm_head.weight.data_ptr()


# a teacher that is spread lies in parts, and one on a device of its own is not where the student is to run
@pytest.mark.parametrize("place", ["spread", "cpu"])
def test_a_student_lies_on_the_runs_device_wherever_the_teacher_lies(context, loads, place):
    run_context = context(student_layers=2, teacher_device=place)
    run_context.student()
    [(_, given)] = loads
    assert given["device"] == run_context.device
    assert "placement" not in given
    run_context.teacher_model()
    assert len(loads) == 2


def test_a_model_that_is_taken_is_loaded_anew_when_asked_for_again(context):
    run_context = context(student_layers=2)
    student = run_context.student().model
    assert run_context.student().model is student
    assert run_context.take_student().model is student
    assert run_context.student().model is not student


@pytest.mark.parametrize("trusted", [True, False])
def test_the_trained_student_runs_its_own_code_where_that_is_trusted(context, loads, inputs, tmp_path, trusted):
    shutil.copytree(inputs / "teacher", tmp_path / "out" / "student")
    (tmp_path / "out" / "config.yaml").write_text("")
    context(student_layers=2, trust_remote_code=trusted).trained_student()
    assert [given["trust_remote_code"] for _, given in loads] == [trusted]


def test_lines_about_a_model_name_it(context):
    run_context = context(student_layers=2)
    run_context.student()
    run_context.take_cached_teacher()
    about = [line for line in run_context.said if "attends to packed rows" in line]
    assert [line.split(":")[0] for line in about] == ["student", "teacher"]


def test_the_files_are_read_once(context, inputs):
    run_context = context(student_layers=2)
    assert not run_context.train_file_is_loaded
    assert run_context.train_set is run_context.train_set
    assert run_context.train_file_is_loaded
    assert run_context.said == [f"{inputs / 'train.jsonl'}: 24 samples"]


def test_skipped_and_cut_samples_are_counted_and_left_out_or_kept(finished, tmp_path, capsys):
    inputs, _ = finished
    records = arithmetic(12)
    records[3]["instruction"] = "long " * 30
    records[5]["output"] = "b" * 200
    train = write_jsonl(tmp_path / "train.jsonl", records)
    output = tmp_path / "out"
    assert run("distill", output, *options(inputs, train=train, long_prompts="skip", stages=2)) == 0
    said = capsys.readouterr().out
    assert f"{train}: 11 samples; 1 skipped for a prompt over the limit (line 4);" in said
    assert "1 response cut to the length limit (line 6)" in said
    index = pq.read_table(output / "difficulty.parquet")["index"].to_pylist()
    assert index == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert sorted(Curriculum.load(output / "curriculum.json").order.tolist()) == index


# -- chat templates ----------------------------------------------------------------------------------------------------


def test_words_on_the_command_line_are_variables_of_the_template(inputs, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(inputs / "teacher", teacher)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "({{ tone }}, {{ depth + 1 }}, {{ short }}, {{ last }})" + CHAT_TEMPLATE
    tokenizer.save_pretrained(teacher)
    words = select(options(inputs, teacher=teacher, max_new_tokens=1, max_length=200, max_prompt_length=160), "measure")
    words += ["--chat-template-kwargs", "tone=very warm", "depth=2", "--chat-template-kwargs=short=false"]
    words += ["--chat_template_kwargs", 'last=["a", null]', "--system-prompt", "Be brief."]
    assert run("measure", tmp_path / "out", *words) == 0
    config = recorded_config(tmp_path / "out").data
    assert config.chat_template_kwargs == {"tone": "very warm", "depth": 2, "short": False, "last": ["a", None]}
    made = RunContext(RunDirectory(tmp_path / "other"), recorded_config(tmp_path / "out"))
    prompt = made.tokenizer.decode(made.train_set.encoded[0].prompt_ids)
    assert prompt.startswith("(very warm, 3, False, ['a', None])<|start|>system\nBe brief.<|end|>")


def test_words_that_are_no_variables_are_refused(inputs, tmp_path, capsys):
    words = select(options(inputs), "measure")
    for given, says in (
        (["enable_thinking"], "must be NAME=VALUE, got 'enable_thinking'"),
        (
            ["enable_thinking=false"],
            "--chat-template-kwargs enable_thinking: the chat template reads no variables: leave",
        ),
        ([], "--chat-template-kwargs needs NAME=VALUE words"),
    ):
        said = refusal(capsys, "measure", tmp_path / "out", *words, "--chat-template-kwargs", *given)
        assert says in said


def test_another_chat_template_is_another_run(inputs, tmp_path, capsys):
    own = tmp_path / "own.jinja"
    own.write_text("one: " + CHAT_TEMPLATE)
    words = [
        *select(options(inputs, max_new_tokens=1, max_length=200, max_prompt_length=160), "measure"),
        "--chat-template",
        str(own),
    ]
    assert run("measure", tmp_path / "out", *words) == 0
    assert run("measure", tmp_path / "out", *words) == 0
    own.write_text("two: " + CHAT_TEMPLATE)
    assert "chat_template: was" in refusal(capsys, "measure", tmp_path / "out", *words)
    assert "system_prompt: was" in refusal(capsys, "measure", tmp_path / "out", *words, "--system-prompt", "Hi")


def test_that_the_teachers_chat_template_is_not_used_is_said_once(context, inputs, tmp_path):
    shutil.copytree(inputs / "teacher", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    made = context(student=str(tmp_path / "base"))
    made.check_vocabularies()
    made.check_vocabularies()
    [line] = made.said
    assert "the teacher's chat template is not used" in line
    assert made.encoder.template == "alpaca"


def test_a_base_student_may_be_asked_in_the_teachers_chat_template(context, inputs, tmp_path):
    shutil.copytree(inputs / "teacher", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    file = inputs / "teacher" / "chat_template.jinja"
    made = context(student=str(tmp_path / "base"), chat_template=str(file))
    made.check_vocabularies()
    assert made.said == []
    assert made.encoder.template == "chat"
