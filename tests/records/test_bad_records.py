"""Bad records: each is an error of its own line, or is left out, counted by what is wrong, and changes nothing else."""

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE, arithmetic, tiny_tokenizer, write_jsonl
from tiny_run import make_inputs, options, refusal, run

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.sample_set import read_set
from pocl_fast.data.stream import SampleStream
from pocl_fast.options.data import DataOptions
from pocl_fast.records.bad_records import BadRecord, BadRecords
from pocl_fast.records.samples import read_samples, samples_from
from pocl_fast.records.sources import source_of
from pocl_fast.system.errors import InputError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
LIMITS = {"max_length": 900, "max_prompt_length": 800}
# a line that is bad -> what is counted
BAD = {
    "{not json": "not JSON",
    '{"instruction": "a", "instruction": "b", "output": "c"}': "not JSON",
    "[1, 2]": "no object",
    '{"question": "a"}': "no known field",
    '{"instruction": "a"}': "a missing field",
    '{"instruction": "a", "output": " "}': "empty text",
    '{"instruction": "a", "output": []}': "empty text",
    '{"instruction": "a", "output": 3}': "not text",
    '{"instruction": "a", "output": "\\ud83d"}': "half a character",
    '{"instruction": "a", "output": "b", "image": "x.png"}': "an image",
    '{"instruction": "a", "output": "b", "videos": ["x"]}': "a video",
    '{"instruction": "a", "output": "b", "response": "b"}': "two forms",
    '{"prompt": "a", "response": "b"}': "another form than the first",
    '{"messages": []}': "no assistant turn",
    '{"messages": [{"role": "user", "content": "q"}]}': "no assistant turn",
    '{"messages": [{"role": "assistant", "content": "q"}]}': "no question",
    '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}':
        "no turn to train on",
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': "an image",
    '{"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}': "a part of type tool_use",
    '{"messages": [{"role": "user", "content": [{"type": "file"}]}]}': "a part that is no text",
    '{"messages": [3]}': "not a message",
    '{"messages": 3}': "not a list of messages",
    '{"messages": [{"role": "user", "content": "q"}, {"role": "human", "content": "a"}]}': "two names of a role",
    '{"messages": [{"role": "assistant", "tool_calls": [{}]}]}': "not a tool call",
    '{"instruction": "a", "output": "b", "tools": [3]}': "not a tool",
    '{"instruction": "a", "output": "b", "tools": ' + "[" * 800 + "]" * 800 + "}": "nested too deeply",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_an_error_or_counted_by_what_is_wrong(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, arithmetic(2))) + f"\n{line}\n")
    with pytest.raises(BadRecord) as error:
        read_samples(path)
    assert str(error.value).startswith(f"{path}, line 3")
    bad = BadRecords("skip")
    assert len(read_samples(path, bad=bad)) == 2
    assert bad.counts == ((BAD[line], (3,)),)


LINES = sorted(line for line, kind in BAD.items() if kind != "nested too deeply")  # that depends on who calls


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.lists(st.one_of(st.sampled_from(LINES), st.integers(0, 30)), min_size=1, max_size=12))
def test_what_is_left_is_what_a_file_without_the_bad_lines_gives(tmp_path_factory, lines):
    folder, good = tmp_path_factory.mktemp("bad"), [one for one in lines if isinstance(one, int)]
    known = arithmetic(31)
    path = folder / "a.jsonl"
    assume(not str(lines[0]).startswith("["))  # that would be a file of one array
    path.write_text("".join(f"{json.dumps(known[one]) if isinstance(one, int) else one}\n" for one in lines))
    mixed = [one for one in lines if isinstance(one, int) or BAD[one] == "another form than the first"]
    assume(mixed and isinstance(mixed[0], int) and len(mixed) <= 2 * len(good))  # else the first is the odd one
    bad = BadRecords("skip")
    read = read_samples(path, bad=bad)
    want = samples_from([known[one] for one in good], "x")
    assert [replace(sample, line=0) for sample in read] == [replace(sample, line=0, unit="line") for sample in want]
    assert [sample.line for sample in read] == [n for n, one in enumerate(lines, 1) if isinstance(one, int)]
    counted = {line: kind for kind, numbers in bad.counts for line in numbers}
    assert counted == {n: BAD[one] for n, one in enumerate(lines, 1) if not isinstance(one, int)}


def test_records_in_memory_are_left_out_alike():
    bad = BadRecords("skip")
    assert len(samples_from([*arithmetic(2), "a text", {"prompt": "q"}], "data", bad=bad)) == 2
    assert bad.counts == (("no object", (3,)), ("a missing field", (4,)))


def test_where_every_record_is_bad_their_kinds_are_said_and_the_first_of_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{\n' * 6)
    with pytest.raises(InputError) as error:
        read_samples(path, bad=BadRecords("skip"))
    assert str(error.value).startswith(
        f"{path}: no record is left, 12 bad records left out: a missing field 6 (lines 1, 3, 5, 7, 9, ...), not JSON 6"
        f' (lines 2, 4, 6, 8, 10, ...); the first: {path}, line 1: field "response" is missing'
    )


def test_where_most_records_are_not_of_the_first_ones_form_that_one_is_named():
    records = [{"messages": [USER, ANSWER]}, *arithmetic(3)]
    with pytest.raises(InputError, match=r"data: 3 records were left out as not of the form of the first, messages"):
        samples_from(records, "data", bad=BadRecords("skip"))


# -- through the tokens ------------------------------------------------------------------------------------------------

REFUSES = "{% for m in messages %}{% if m['content'] == 'no' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"


def conversations():
    told = [[USER, ANSWER], [{**USER, "content": "no"}, ANSWER], [USER, {**ANSWER, "tool_calls": [{"name": "f"}]}]]
    return [{"messages": turns, "id": 1} for turns in (*told, [USER], [USER, ANSWER, USER])]


def test_what_the_template_refuses_is_left_out_and_said_with_the_rest(tmp_path):
    path, tokenizer = write_jsonl(tmp_path / "a.jsonl", conversations()), tiny_tokenizer()
    tokenizer.chat_template = REFUSES + CHAT_TEMPLATE
    chosen = DataOptions(**LIMITS, bad_records="skip")
    data, report = read_set(path, SampleEncoder(tokenizer), chosen, "x")
    assert [(one.index, data.samples[one.index].line) for one in data.encoded] == [(0, 1), (3, 5)]
    said = report.describe("x")
    assert said.startswith(
        "x: 2 samples; 3 bad records left out: the template refuses it 1 (line 2), tool calls are not shown 1 (line 3),"
        " no assistant turn 1 (line 4)"
    )
    assert said.endswith("turns behind the last answer cut of 1 record")
    stream = SampleStream(source_of(path), SampleEncoder(tokenizer), chosen)
    assert stream.check().samples == 2
    assert stream.check().bad == report.bad
    assert [row for rows in stream for row in rows] == [(data.samples[one.index], one) for one in data.encoded]
    for strict in (DataOptions(**LIMITS), DataOptions(**LIMITS, template="chat")):
        with pytest.raises(BadRecord, match="line 4"):
            read_set(path, SampleEncoder(tokenizer), strict, "x")


def test_where_the_template_refuses_all_that_is_an_error(tmp_path):
    path, tokenizer = write_jsonl(tmp_path / "a.jsonl", conversations()[1:3]), tiny_tokenizer()
    tokenizer.chat_template = REFUSES + CHAT_TEMPLATE
    chosen = DataOptions(**LIMITS, bad_records="skip")
    for read in (
        lambda: read_set(path, SampleEncoder(tokenizer), chosen, "x"),
        SampleStream(source_of(path), SampleEncoder(tokenizer), chosen).check,
    ):
        with pytest.raises(InputError, match=r"no record is left, 2 bad records left out: .* the first: .*line 1: the"):
            read()


def test_the_longest_prompt_is_looked_for_among_those_that_the_template_takes(tmp_path):
    records = [*conversations()[:2], {"messages": [{**USER, "content": "long " * 30}, ANSWER]}]
    path, tokenizer = write_jsonl(tmp_path / "a.jsonl", records), tiny_tokenizer()
    tokenizer.chat_template = REFUSES + CHAT_TEMPLATE
    with pytest.raises(InputError, match=r"1 of 3 prompts are over --max-prompt-length 60 tokens \(line 3"):
        read_set(path, SampleEncoder(tokenizer), DataOptions(max_prompt_length=60, bad_records="skip"), "x")


def test_a_run_with_bad_records_left_out_is_the_run_without_them(tmp_path, capsys):
    inputs = make_inputs(tmp_path / "inputs", train=8, dev=3)
    words = options(inputs, stages=2, eval_seeds=1)
    assert run("distill", tmp_path / "clean", *words) == 0
    lines = (inputs / "train.jsonl").read_text().splitlines()
    (inputs / "train.jsonl").write_text("\n".join([*lines[:3], "{", *lines[3:], '{"prompt": "a"}']) + "\n")
    said = refusal(capsys, "distill", tmp_path / "strict", *words)
    assert "train.jsonl, line 4: not JSON" in said
    assert run("distill", tmp_path / "skipping", *words, "--bad-records", "skip") == 0
    assert "8 samples; 2 bad records left out: not JSON 1 (line 4), a missing field 1" in capsys.readouterr().out
    for name in ("difficulty.parquet", "curriculum.json", "student/model.safetensors"):
        assert (tmp_path / "skipping" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()
