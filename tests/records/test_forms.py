"""The forms of records: those of TRL, what fits two of them, a file of two, and fields by other names."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer, write_jsonl
from tiny_run import make_inputs, options, run, select
from tiny_run import refusal as refusal_of

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.options.data import DataOptions
from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.samples import read_samples, samples_from
from pocl_fast.settings.configuration import from_options, recorded_config
from pocl_fast.system.errors import InputError
from pocl_fast.training.arguments import PoclConfig

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = [USER, ANSWER]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def samples(*records, **fields):
    return samples_from(records, "data", fields=fields)


def refusal(*records, **fields):
    with pytest.raises(InputError) as error:
        samples(*records, **fields)
    return str(error.value)


# -- prompt and completion ---------------------------------------------------------------------------------------------


def test_of_prompt_and_completion_the_answers_of_the_completion_are_trained_on():
    prompt = [{"role": "system", "content": "s"}, USER, ANSWER, {"role": "user", "content": "r"}]
    completion = [{"role": "assistant", "content": "b"}, USER, {"role": "assistant", "content": "c"}]
    [sample] = samples({"prompt": prompt, "completion": completion})
    assert [*sample.messages, sample.answer_turn] == [*prompt, *completion]
    assert (sample.references, sample.earlier, sample.unused) == (("c",), (4,), ())
    [one] = samples({"prompt": [USER], "completion": [ANSWER, USER], "input": "i", "system": "s"})
    assert [turn["role"] for turn in one.messages] == ["system", "user"]
    assert (one.references, one.earlier) == (("a",), ())
    assert one.unused == ("input", "turns behind the last answer")


# the rows of TRL's page of data set formats
TRL_ROWS = [
    {
        "prompt": [{"role": "user", "content": "What color is the sky?"}],
        "completion": [{"role": "assistant", "content": "It is blue."}],
    },
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, how are you?"}],
        "completion": [{"role": "assistant", "content": "I'm doing great. How can I help you today?"}],
    },
    {
        "messages": [
            {"role": "user", "content": "Hello, how are you?"},
            {"role": "assistant", "content": "I'm doing great. How can I help you today?"},
            {"role": "user", "content": "I'd like to show off how chat templating works!"},
            {"role": "assistant", "content": "Go on."},
        ]
    },
]


@pytest.mark.parametrize("row", TRL_ROWS)
def test_trls_conversations_are_written_as_trl_writes_them(row):
    data_utils = pytest.importorskip("trl.data_utils")
    tokenizer = tiny_tokenizer()
    want = data_utils.apply_chat_template(row, tokenizer)
    [sample] = samples(row)
    encoded = SampleEncoder(tokenizer).encode(sample, max_length=900, max_prompt_length=800)
    whole = want["text"] if "text" in want else want["prompt"] + want["completion"]
    theirs = tokenizer(whole, add_special_tokens=False).input_ids
    assert list(encoded.ids) == theirs[: len(encoded.ids)]
    assert tokenizer.decode(theirs[len(encoded.ids) :]).strip() == ""  # the line's end behind the last turn
    if "prompt" in want:
        assert tokenizer.decode(encoded.prompt_ids) == want["prompt"]


def test_trls_calls_of_tools_keep_their_shape():
    tools = [{"type": "function", "function": {"name": "control_light", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "control_light", "arguments": {"room": "bedroom", "state": "off"}}}
    turns = [
        {"role": "user", "content": "Turn off the light in my bedroom."},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "control_light", "content": "The light is off."},
        {"role": "assistant", "content": "It is off."},
    ]
    for written in (tools, json.dumps(tools)):
        [sample] = samples({"messages": turns, "tools": written})
        assert list(sample.tools) == tools
        assert list(sample.messages) == [turns[0], {**turns[1], "content": ""}, turns[2]]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (
            {"prompt": [USER], "completion": "a"},
            '"prompt" is a list, and "completion" is no list of messages: give both',
        ),
        ({"prompt": [USER], "response": "a"}, '"prompt" is a list, and "response" is no list of messages'),
        ({"prompt": "q", "completion": [ANSWER]}, '"completion" is a list of messages, and the question is text'),
        ({"prompt": "q", "response": [ANSWER]}, '"response" is a list of messages, and the question is text'),
        ({"prompt": [USER], "completion": [USER]}, '"completion" has no turn of the assistant'),
        ({"prompt": [], "completion": [ANSWER]}, "nothing is asked before"),
        ({"prompt": [USER], "completion": []}, '"completion" is no list of messages'),
        ({"prompt": [USER], "completion": [ANSWER], "history": [["h", "i"]]}, 'both "completion" and "history"'),
        ({"prompt": [USER]}, 'field "completion" is missing'),
        ({"prompt": "q"}, 'field "response" is missing'),
        ({"completion": "a"}, 'field "prompt" is missing'),
        ({"query": "q", "response": "a"}, "--fields prompt=FIELD says what else it is called"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "--fields response=chosen trains on the accepted answer"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "--fields completion=chosen trains on"),
        ({"chosen": CHAT, "rejected": CHAT}, "--fields messages=chosen trains on the accepted answer"),
        ({"text": "The sky is blue."}, 'split it into "prompt" and "completion"'),
    ],
)
def test_a_prompt_without_a_completion_of_its_kind_says_what_to_write(record, says):
    assert says in refusal(record)


def test_what_is_said_of_preferences_works():
    [sample] = samples({"prompt": [USER], "chosen": [ANSWER], "rejected": [USER]}, completion="chosen")
    assert (sample.references, sample.unused) == (("a",), ("rejected",))


# -- two forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "both", "forms"),
    [
        (
            {"messages": CHAT, "prompt": "q", "response": "a"},
            '"messages" and "response"',
            "messages and prompt/response",
        ),
        ({"messages": CHAT, "output": "a"}, '"messages" and "output"', "messages and instruction/output"),
        ({"messages": CHAT, "conversations": SHAREGPT}, '"messages" and "conversations"', "messages and conversations"),
        (
            {"conversations": SHAREGPT, "instruction": "q", "output": "a"},
            '"conversations" and "output"',
            "conversations and instruction/output",
        ),
        (
            {"prompt": "q", "completion": "a", "response": "a"},
            '"response" and "completion"',
            "prompt/response and prompt/completion",
        ),
        (
            {"prompt": "q", "instruction": "r", "output": "a"},
            '"prompt" and "instruction"',
            "prompt/output and instruction/output",
        ),
    ],
)
def test_a_record_of_two_forms_names_them(record, both, forms):
    said = refusal(record)
    assert said.startswith("data, record 1: ")
    assert f"both {both} are given: the record fits two forms, {forms}, and only one is read" in said
    chosen = said.rpartition("--fields ")[2].partition("=")[0]
    [sample] = samples(record, **{chosen: chosen})  # what it says works
    assert sample.references == ("a",)
    assert any("beside --fields" in one for one in sample.unused)


def test_an_empty_field_of_another_form_says_nothing():
    assert samples({"messages": CHAT, "output": "", "instruction": ""})[0].references == ("a",)
    assert samples({"prompt": "q", "response": "a", "completion": "", "instruction": ""})[0].references == ("a",)
    assert "is empty" in refusal({"prompt": "q", "response": ""})


FORMS = {
    "prompt/response": {"prompt": "q", "response": "a"},
    "instruction/output": {"instruction": "q", "output": "a"},
    "prompt/completion": {"prompt": "q", "completion": "a"},
    "messages": {"messages": CHAT},
    "conversations": {"conversations": SHAREGPT},
}


@pytest.mark.parametrize("other", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_a_file_of_two_forms_names_both_lines(tmp_path, first, other):
    path = write_jsonl(tmp_path / "a.jsonl", [FORMS[first]] * 6 + [FORMS[other]])
    if first == other:
        assert len(read_samples(path)) == 7
        return
    with pytest.raises(InputError) as error:
        read_samples(path)
    said = f"{path}, line 7 is {other}, but the records before it, from line 1, are {first}"
    assert str(error.value).startswith(said)


# -- other names -------------------------------------------------------------------------------------------------------

RECORDS = [
    {"prompt": "q", "response": ["a", "b"], "context": "c", "system": "s", "history": [["h", "i"]], "note": 1},
    {"instruction": "q", "output": "a", "input": "i"},
    {"prompt": [USER], "completion": CHAT[1:], "tools": [{"name": "f"}]},
    {"messages": CHAT, "system": "s"},
    {"conversations": SHAREGPT},
]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(RECORDS), st.data())
def test_records_by_other_names_are_the_same_samples(record, data):
    mine = [name for name in record if name != "note"]
    chosen = data.draw(st.lists(st.sampled_from(mine), unique=True, min_size=1))
    # names of other forms among them: a column "input" may be the question
    pool = ["question", "Answer", "x.y", "input", "text", "output", "chat", "prompt", "5"]
    names = [name for name in pool if name not in record]
    theirs = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=len(chosen), max_size=len(chosen)))
    fields = dict(zip(chosen, theirs, strict=True))
    renamed = {fields.get(name, name): value for name, value in record.items()}
    assert samples(renamed, renamed, **fields) == samples(record, record)


def test_a_path_leads_into_a_field_and_what_is_beside_it_is_counted():
    record = {
        "q": "q",
        "answers": {"text": ["a", "b"], "answer_start": [3], "none": None},
        "turns": [{"t": "x"}, {"t": "y"}],
    }
    [sample] = samples(record, prompt="q", response="answers.text", context="turns.1.t")
    assert (sample.references, sample.input) == (("a", "b"), "y")
    assert sample.unused == ("answers.answer_start", "turns.0")
    [both] = samples(record, prompt="turns.0.t", response="turns.1.t")
    assert (both.instruction, both.references, both.unused) == ("x", ("y",), ("q", "answers"))
    dotted = {"a.b": "q", "a": {"b": "no"}, "r": "a"}
    assert samples(dotted, prompt="a.b", response="r")[0].instruction == "q"  # a field of that name comes first


def test_what_is_named_is_meant_and_the_records_own_field_is_counted():
    record = {"prompt": "own", "question": "q", "response": "own", "best": "a", "messages": CHAT}
    [sample] = samples(record, prompt="question", response="best")
    assert (sample.instruction, sample.references) == ("q", ("a",))
    assert sample.unused == ("prompt beside --fields", "response beside --fields", "messages beside --fields")


def test_a_name_that_no_field_has_is_refused_at_the_first_record_with_the_fields_there_are():
    said = refusal({"questoin": "q", "answer": "a"}, prompt="question", response="answer")
    assert said == (
        'data, record 1: --fields prompt=question: there is no field "question" (did you mean questoin?); there are'
        " questoin, answer"
    )
    assert "response=answers.text" in refusal({"q": "q", "answers": {"txt": "a"}}, prompt="q", response="answers.text")


def test_an_optional_field_may_be_missing_in_some_records_but_not_in_all():
    one, two = {"q": "q", "a": "a"}, {"q": "q", "a": "a", "ctx": "c"}
    assert [sample.input for sample in samples(one, two, prompt="q", response="a", context="ctx")] == ["", "c"]
    said = refusal(one, one, prompt="q", response="a", context="ctx")
    assert said == 'data: --fields context=ctx: there is no field "ctx"; there are q, a'


def test_errors_name_the_records_own_field():
    said = refusal({"question": "q", "answer": 3}, prompt="question", response="answer")
    assert 'field "response" must be a string, got int' in said
    assert said.endswith('(by --fields "response" is the field "answer")')


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"promt": "q"}, "promt=q: nothing is called 'promt' here (did you mean prompt?); NAME is one of messages, "),
        ({"question": "prompt"}, "question=prompt: nothing is called 'question' here (did you mean prompt=question?)"),
        ({"respnse": "output"}, "respnse=output: nothing is called 'respnse' here (did you mean response?)"),
        ({"prompt": "q", "response": "q"}, 'both prompt and response are "q"'),
        ({"prompt": "q", "instruction": "r", "output": "a"}, "of prompt and instruction a record has one"),
        ({"messages": "m", "response": "a"}, "of messages and response a record has one"),
        ({"prompt": 3}, "prompt=3: expected the name of a field"),
        ({"prompt": ""}, "prompt=: expected the name of a field"),
    ],
)
def test_a_mapping_that_cannot_be_meant_so_is_refused_before_anything_is_read(fields, says, tmp_path):
    def never():
        raise AssertionError
        yield

    with pytest.raises(InputError) as error:
        samples_from(never(), "data", fields=fields)
    assert f"--fields: {says}" in str(error.value)
    with pytest.raises(InputError) as error:
        from_options({"fields": fields})
    assert f"--fields: {says}" in str(error.value)
    with pytest.raises(InputError) as error:
        PoclConfig(str(tmp_path), fields=fields)
    assert "fields" in str(error.value)


def test_words_and_yaml_name_the_same_fields():
    words = from_options({"fields": ["prompt=question", "response=answers.text"]})
    assert words.data == from_options({"fields": {"prompt": "question", "response": "answers.text"}}).data
    assert words.data.fields == {"prompt": "question", "response": "answers.text"}
    more = from_options({"fields": ["context=ctx"]}, words)
    assert more.data.fields == {**words.data.fields, "context": "ctx"}
    assert DataOptions().fields == {}
    with pytest.raises(InputError, match="--fields: prompt is given twice"):
        from_options({"fields": ["prompt=a", "prompt=b"]})
    with pytest.raises(InputError, match="--fields: must be NAME=VALUE, got 'prompt'"):
        from_options({"fields": ["prompt"]})


def test_words_on_the_command_line_name_the_fields_of_both_files_and_a_run_keeps_them(tmp_path, capsys):
    inputs = make_inputs(tmp_path / "inputs", train=3, dev=2)
    told = [{"dialog": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": f"a{n}"}]} for n in range(4)]
    for name in ("train", "dev"):
        write_jsonl(inputs / f"{name}.jsonl", told)
    words = select(options(inputs, max_new_tokens=1), "measure")
    assert run("measure", tmp_path / "out", *words, "--fields", "conversations=dialog") == 0
    assert recorded_config(tmp_path / "out").data.fields == {"conversations": "dialog"}
    assert "train.jsonl: 4 samples\n" in capsys.readouterr().out
    said = refusal_of(capsys, "measure", tmp_path / "other", *words, "--fields", "conversation=dialog")
    assert "--fields: conversation=dialog: nothing is called 'conversation' here (did you mean conversations" in said
    said = refusal_of(capsys, "measure", tmp_path / "other", *words, "--fields", "messages=dialogue")
    assert (
        'train.jsonl, line 1: --fields messages=dialogue: there is no field "dialogue" (did you mean dialog?)' in said
    )


# -- anything ----------------------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 2),
    st.floats(),
    st.sampled_from(["", " ", "q", "\ud83d", "[]", '{"name": "f"}']),
)
KEYS = (
    "role content from value text type name arguments function tool_calls weight train function_call image parameters"
)
ROLES = st.sampled_from(["user", "assistant", "human", "gpt", "system", "tool", "function_call", "observation", "who"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=4),
    max_leaves=8,
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": VALUES}, optional={"tool_calls": VALUES, "weight": VALUES})
    | st.fixed_dictionaries({"from": ROLES, "value": VALUES}, optional={"train": VALUES, "name": VALUES})
    | VALUES,
    max_size=4,
)
FIELDS = ("prompt", "response", "instruction", "output", "completion", "messages", "conversations", "input", "context")


RECORDS_OF_ANYTHING = st.one_of(
    st.fixed_dictionaries({"messages": TURNS}, optional={"system": VALUES, "tools": VALUES, "prompt": VALUES}),
    st.fixed_dictionaries({"conversations": TURNS}, optional={"system": VALUES, "tools": VALUES, "output": VALUES}),
    st.fixed_dictionaries({"prompt": TURNS, "completion": TURNS}, optional={"input": VALUES, "tools": VALUES}),
    st.fixed_dictionaries({"prompt": LEAVES, "response": VALUES}, optional={"history": TURNS, "context": VALUES}),
    st.dictionaries(st.sampled_from([*FIELDS, "images", "id"]), TURNS | VALUES, max_size=5),
)


def refused(record):
    """The error that a record is, if it is one."""
    try:
        samples_from([record], "data")
    except BadRecord as error:
        return error
    return None


@settings(max_examples=150, deadline=None)
@given(RECORDS_OF_ANYTHING)
def test_whatever_a_record_has_it_is_a_sample_or_one_bad_record_of_its_line(record):
    if error := refused(record):
        assert str(error).startswith("data, record 1: ")
        assert error.kind
        return
    first, second = samples_from([record, record], "data")
    assert second == replace(first, index=1, line=2)  # reading changes no record
    assert first.references[0].strip()
    assert all(turn["role"] and isinstance(turn["content"], str) for turn in (*first.messages, first.answer_turn))
    assert all(first.messages[place]["role"] == "assistant" for place in first.earlier)
