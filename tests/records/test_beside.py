"""What records say in other shapes, or beside their form: columns of messages, OpenAI's older tools, and labels of
answers that are not to be learnt."""

import json

import datasets
import numpy as np
import pytest
from tiny import write_jsonl

from pocl_fast.records.bad_records import BadRecords
from pocl_fast.records.samples import read_samples, samples_from
from pocl_fast.system.errors import InputError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"properties": {"x": {"type": "string"}}}}
TURNS = [USER, ANSWER, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]


def sample_of(**record):
    [sample] = samples_from([record], "data")
    return sample


def refusal(fields=None, **record):
    with pytest.raises(InputError) as error:
        samples_from([record], "data", fields=fields)
    assert str(error.value).startswith("data, record 1: ")
    return str(error.value)


def columns(turns):
    return {name: [turn[name] for turn in turns] for name in turns[0]}


# -- messages by columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_messages_by_columns_are_the_messages(field):
    want = sample_of(**{field: TURNS})
    for given in (columns(TURNS), json.dumps(columns(TURNS)), {k: np.array(v) for k, v in columns(TURNS).items()}):
        assert sample_of(**{field: given}) == want
    shared = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in TURNS]
    assert sample_of(**{field: columns(shared)}) == want
    assert sample_of(**{field: columns(TURNS) | {"name": [None] * 4, "weight": None}}) == want
    with_weights = sample_of(**{field: columns(TURNS) | {"weight": [None, 0, None, 1]}})
    assert (want.earlier, with_weights.earlier) == ((1,), ())


def test_prompt_and_completion_may_be_columns():
    want = sample_of(prompt=TURNS[:3], completion=TURNS[3:])
    assert sample_of(prompt=columns(TURNS[:3]), completion=columns(TURNS[3:])) == want
    assert sample_of(prompt=columns(TURNS[:3]), completion=TURNS[3:]) == want
    history = sample_of(prompt="r", response="b", history=TURNS[:2])
    assert sample_of(prompt="r", response="b", history=columns(TURNS[:2])) == history


def test_what_datasets_writes_of_its_feature_sequence_is_read(tmp_path):
    texts = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    made = datasets.Dataset.from_list(
        [{"messages": columns(TURNS)}] * 2, features=datasets.Features({"messages": datasets.Sequence(texts)})
    )
    made.to_parquet(tmp_path / "t.parquet")
    made.save_to_disk(tmp_path / "saved")
    want = [(one.messages, one.references, one.earlier) for one in [sample_of(messages=TURNS)] * 2]
    every = samples_from(made, "data"), read_samples(tmp_path / "t.parquet"), read_samples(tmp_path / "saved")
    for samples in every:
        assert [(one.messages, one.references, one.earlier) for one in samples] == want


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ({"role": ["user", "assistant"], "content": ["q"]}, 'their lengths differ ("role" 2, "content" 1): write'),
        ({"role": ["user"], "content": "q"}, '("role" 1, "content" no list)'),
        ({"role": "user", "content": "q"}, "got an object. It is one message: write it in a list"),
        ({"turns": 3}, "must be a list of messages, got an object."),
        ({"role": [], "content": []}, "has no turn of the assistant"),
        ({"who": ["user"], "said": ["q"]}, 'item 0: expected "role" and "content"'),
    ],
)
def test_columns_that_are_no_messages_are_refused_with_what_to_do(messages, says):
    assert says in refusal(messages=messages)


# -- tools by their older name -----------------------------------------------------------------------------------------


def test_openais_older_form_of_tools_is_the_newer_one():
    call = {"name": "f", "arguments": '{"x": "1"}'}
    old = [USER, {"role": "assistant", "content": None, "function_call": call}]
    old += [{"role": "function", "name": "f", "content": "7"}, ANSWER]
    new = [USER, {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}]
    new += [{"role": "tool", "name": "f", "content": "7"}, ANSWER]
    want = sample_of(messages=new, tools=[{"type": "function", "function": FUNCTION}])
    assert want.tools
    assert want.unused == ()
    for functions in ([FUNCTION], json.dumps([FUNCTION]), np.array([FUNCTION])):
        assert sample_of(messages=old, functions=functions) == want
        assert sample_of(messages=old, functions=functions, tools=[]) == want


@pytest.mark.parametrize(
    "functions",
    [["parse", "main"], "def f(): ...", "[not JSON", [{"file": "a.py"}], 3, [{"name": "f", "parameters": ["x"]}]],
)
def test_functions_that_are_no_schemas_are_counted_as_not_read(functions):
    sample = sample_of(messages=TURNS, functions=functions)
    assert (sample.tools, sample.unused) == ((), ("functions",))


def test_tools_by_both_names_and_a_schema_that_is_none_are_refused():
    assert 'both "tools" and "functions" are given' in refusal(messages=TURNS, tools=[FUNCTION], functions=[FUNCTION])
    assert 'field "functions", item 1: expected a schema' in refusal(messages=TURNS, functions=[FUNCTION, 3])


# -- answers that are not to be learnt ---------------------------------------------------------------------------------

FORMS = [
    {"prompt": "q", "completion": "a"},
    {"prompt": [USER], "completion": [ANSWER]},
    {"messages": TURNS},
    {"instruction": "q", "output": "a"},
]


@pytest.mark.parametrize("field", ["label", "kto_tag"])
@pytest.mark.parametrize("record", FORMS, ids=["text", "lists", "messages", "alpaca"])
def test_an_answer_that_is_marked_as_bad_is_refused_and_a_good_one_trained_on(record, field):
    assert sample_of(**record, **{field: True}) == sample_of(**record)
    said = refusal(**record, **{field: False})
    assert f'"{field}" is false, which marks an answer that is not to be learnt' in said
    assert "--bad-records skip" in said
    name = said.partition("--fields ")[2].partition("=")[0]
    [sample] = samples_from([record | {field: False}], "data", fields={name: name})  # what it says works
    assert sample.references == sample_of(**record).references


def test_bad_answers_are_left_out_and_counted_as_a_kind(tmp_path):
    """The rows of TRL's data set of that form."""
    rows = [{"prompt": f"q{i}", "completion": "a", "label": i % 3 > 0} for i in range(6)]
    bad = BadRecords("skip")
    samples = read_samples(write_jsonl(tmp_path / "kto.jsonl", rows), bad=bad)
    assert [sample.messages[0]["content"] for sample in samples] == ["q1", "q2", "q4", "q5"]
    assert bad.counts == (("label false", (1, 4)),)
    assert all(sample.unused == () for sample in samples)


@pytest.mark.parametrize("label", [0, 1, "false", "toxic", 0.0])
def test_a_label_of_another_kind_is_counted_as_not_read(label):
    assert sample_of(prompt="q", response="a", label=label).unused == ("label",)
