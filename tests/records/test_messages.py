"""Conversations, their tools and what a record says besides: how they come into a sample, and what is refused."""

import json

import pytest

from pocl_fast.records.samples import samples_from
from pocl_fast.system.errors import InputError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}


def sample_of(**record):
    [sample] = samples_from([record], "data")
    return sample


def told(sample):
    return [(turn["role"], turn["content"]) for turn in sample.messages]


def refusal(**record):
    with pytest.raises(InputError) as error:
        sample_of(**record)
    assert str(error.value).startswith("data, record 1: ")
    return str(error.value)


@pytest.mark.parametrize("question", [{"prompt": "q", "response": "a"}, {"instruction": "q", "output": "a"}])
@pytest.mark.parametrize(
    "history",
    [
        [["h", "i"]],
        (("h", "i"),),
        '[["h", "i"]]',
        [{"role": "user", "content": "h"}, {"role": "assistant", "content": "i"}],
    ],
)
def test_system_and_history_are_turns_before_the_question(question, history):
    sample = sample_of(system="s", history=history, **question)
    assert told(sample) == [("system", "s"), ("user", "h"), ("assistant", "i"), ("user", "q")]
    assert (sample.references, sample.instruction, sample.unused) == (("a",), "q", ())


def test_context_goes_where_input_goes():
    forms = [
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "response": "a"},
        {"instruction": "q", "response": "a"},
    ]
    for form in forms:  # the last one with context is Dolly's
        samples = [
            sample_of(**form, input="i"),
            sample_of(**form, context="i"),
            sample_of(**form, context="i", input=" "),
        ]
        assert [(told(one), one.instruction, one.input) for one in samples] == [([("user", "q\n\ni")], "q", "i")] * 3


def test_a_system_field_beside_messages_is_their_first_turn():
    turns = [("system", "s"), ("user", "q")]
    assert told(sample_of(system="s", messages=[USER, ANSWER])) == turns
    assert told(sample_of(system="s", messages=[{"role": "system", "content": "s"}, USER, ANSWER])) == turns
    both = refusal(system="s", messages=[{"role": "system", "content": "t"}, USER, ANSWER])
    assert '"system" and the system message in "messages" differ' in both


RING: list = []
RING.append(RING)
NAN = float("nan")


@pytest.mark.parametrize("none", [None, NAN])
@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "response": "a"},
        {"instruction": "q", "output": "a"},
        {"messages": [USER, ANSWER]},
    ],
)
def test_a_null_field_is_an_absent_field(record, none):
    every = (
        "messages",
        "prompt",
        "response",
        "instruction",
        "input",
        "output",
        "system",
        "history",
        "tools",
        "context",
    )
    filled = dict.fromkeys((*every, "images", "id"), none) | record
    assert sample_of(**filled) == sample_of(**record)


def test_null_fields_of_messages_and_tools_are_absent_as_arrow_fills_them():
    message = {"tool_calls": None, "reasoning_content": None, "tool_call_id": None, "name": None}
    call = {**CALL, "id": None, "function": {"name": "f", "arguments": {"x": "1"}, "strict": None}}
    messages = [{**USER, **message}, {**ANSWER, **message, "tool_calls": [call]}]
    parameters = {"properties": {"x": {"type": "string"}, "y": None}}
    tools = [{"type": "function", "function": {"name": "f", "description": None, "parameters": parameters}}]
    sample = sample_of(messages=messages, tools=tools)
    assert sample.messages == (USER,)
    assert sample.answer == {**ANSWER, "tool_calls": [CALL]}
    assert sample.tools == (SCHEMA,)


def test_every_field_of_a_message_reaches_the_template():
    messages = [
        {"role": "developer", "content": "d"},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "7"}], "reasoning_content": "why"},
        {"role": "tool", "content": "", "tool_call_id": "7", "name": "f"},
        {"role": "assistant", "content": "a", "reasoning_content": "so", "thinking": "own"},
    ]
    sample = sample_of(messages=messages)
    assert list(sample.messages) == [*messages[:2], {**messages[2], "content": ""}, messages[3]]
    assert sample.answer_turn == messages[4]
    assert sample.references == ("a",)


def test_content_in_parts_is_the_text_of_its_parts():
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "1", "image_url": None}, "2", {"text": "3"}]
    sample = sample_of(messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": [{"text": "a"}]}])
    assert (told(sample), sample.references) == ([("user", "q123")], ("a",))


@pytest.mark.parametrize("form", [lambda given: given, json.dumps])
def test_tools_and_calls_may_be_json_text(form):
    spelt = {"type": "function", "function": {"name": "f", "arguments": form({"x": "1"})}}
    sample = sample_of(messages=[USER, {**ANSWER, "tool_calls": form([spelt])}], tools=form([SCHEMA]))
    assert sample.tools == (SCHEMA,)
    assert sample.answer["tool_calls"] == [CALL]
    assert sample_of(prompt="q", response="a", tools=[form(SCHEMA)]).tools == (SCHEMA,)


@pytest.mark.parametrize(
    "call", [CALL, {"name": "f", "arguments": {"x": "1"}}, {"name": "f", "arguments": '{"x": "1"}'}]
)
def test_an_answer_may_be_tool_calls_alone(call):
    sample = sample_of(messages=[USER, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert sample.references == ('{"name": "f", "arguments": {"x": "1"}}',)
    assert sample.answer_turn["content"] == ""
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": "1"}'}}
    assert sample_of(messages=[USER, old]).answer_turn["tool_calls"] == [CALL]


def test_fields_that_say_something_and_are_not_read_are_named():
    sample = sample_of(prompt="q", response="a", id=0, note="n", empty="", none=None, some=[], flag=False)
    assert sample.unused == ("id", "note", "flag")
    assert sample_of(messages=[USER, ANSWER], prompt="q", prompt_id="7").unused == ("prompt", "prompt_id")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "q", "response": 42}, 'field "response" must be a string, got int; write it as text: "42"'),
        ({"prompt": "q", "response": True}, 'field "response" must be a string, got bool'),
        ({"prompt": 4.5, "response": "a"}, 'field "prompt" must be a string, got float; write it as text: "4.5"'),
        ({"prompt": "q", "response": float("inf")}, 'field "response" must be a string, got float'),
        ({"prompt": "q", "response": ["a", None]}, 'field "response", item 1 must be a string, got null'),
        ({"prompt": "q", "response": ""}, 'field "response" is empty: give it text, or leave it out'),
        ({"prompt": "q", "response": ["a", " "]}, 'field "response", item 1 is empty: give it text, or leave it out'),
        ({"prompt": "q", "response": []}, 'field "response" is an empty list: give it an answer'),
        ({"prompt": "q", "response": "a", "x\ud800": 1}, "the name of a field has half of a surrogate pair"),
        (
            {"prompt": "q", "response": "a", "system": "s", "history": [{"role": "system", "content": "t"}, USER]},
            '"system" and the system message in "history" differ',
        ),
        ({"prompt": "q", "response": {"text": "a"}}, 'field "response" must be a string, got dict'),
        ({"prompt": "q", "response": "a", "output": "b"}, 'both "response" and "output" are given'),
        ({"prompt": "q", "instruction": "q", "output": "b"}, 'both "prompt" and "instruction" are given'),
        ({"prompt": "q", "response": "a", "instruction": "q", "output": "a"}, 'both "response" and "output" are given'),
        ({"prompt": "q", "response": "a", "input": "i", "context": "c"}, 'both "input" and "context" are given'),
        ({"messages": [USER, ANSWER], "response": "a"}, 'both "messages" and "response" are given'),
        ({"messages": [USER, ANSWER], "output": "a"}, 'both "messages" and "output" are given'),
        ({"messages": [USER, ANSWER], "history": [["a", "b"]]}, 'both "messages" and "history" are given'),
        ({"prompt": "q", "reponse": "a"}, '(did you mean response instead of "reponse"?)'),
        ({"intruction": "q", "output": "a"}, '(did you mean instruction instead of "intruction"?)'),
        ({"message": [USER, ANSWER]}, '(did you mean messages instead of "message"?)'),
        ({"prompt": "q", "response": "a", "images": ["x.png"]}, 'field "images" is part of the question'),
        ({"messages": [USER, ANSWER], "audio": "x.wav"}, 'field "audio" is part of the question'),
        ({"prompt": "q", "response": "a", "system": 3}, 'field "system" must be a string, got int'),
        ({"prompt": "q", "response": "a", "system": " "}, 'field "system" is empty'),
        ({"prompt": "q", "response": "a", "history": "h"}, 'field "history" is text that is not JSON'),
        ({"prompt": "q", "response": "a", "history": {"q": "a"}}, 'field "history" must be a list'),
        ({"prompt": "q", "response": "a", "history": [["h"]]}, 'field "history", item 0: expected [question, answer]'),
        (
            {"prompt": "q", "response": "a", "history": [["h", None]]},
            'field "history", item 0 must be a string, got null',
        ),
        ({"prompt": "q", "response": "a", "tools": "f"}, 'field "tools" is text that is not JSON'),
        ({"prompt": "q", "response": "a", "tools": SCHEMA}, 'field "tools" must be a list of schemas'),
        (
            {"prompt": "q", "response": "a", "tools": [3]},
            'field "tools", item 0: expected a schema (an object), got int',
        ),
    ],
)
def test_a_record_that_cannot_be_meant_so_is_refused_by_its_field(record, says):
    assert says in refusal(**record)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("a text", 'expected "role" and "content", got str'),
        ({"role": "user", "contnt": "q"}, "(did you mean content?)"),
        ({"role": "human", "content": "q"}, '"user" and "human" in one conversation may be one who speaks or two'),
        ({"role": "User", "content": "q"}, '"user" and "User" in one conversation'),
        ({"role": "user", "from": "human", "content": "q"}, 'both "role" and "from" are given'),
        ({"from": "user", "content": "q", "value": "r"}, 'both "content" and "value" are given'),
        ({"role": "us\ud800r", "content": "q"}, '"role" has half of a surrogate pair'),
        ({**USER, "note\ud800": 1}, "half of a surrogate pair"),
        ({**USER, "note": RING}, "cannot be written as JSON (Circular reference detected)"),
        ({**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"x": 1, "x": 2}'}]}, 'the field "x" is named twice'),
        ({"role": None, "content": "q"}, 'expected "role" and "content"'),
        ({"role": "user", "content": None}, 'expected "role" and "content"'),
        ({"role": "user", "content": "  "}, '"content" must be a non-empty string'),
        ({"role": "assistant", "content": ""}, '"content" must be a non-empty string'),
        ({"role": "user", "content": 3}, '"content" must be text, or a list of parts that are text; got int'),
        ({"role": "user", "content": {"text": "q"}}, '"content" must be text'),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, 'part 0 is of type "image_url"'),
        ({"role": "user", "content": [{"text": "q"}, {"type": "input_audio"}]}, 'part 1 is of type "input_audio"'),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, 'part 0: "text" must be text, got null'),
        ({"role": "user", "content": [3]}, 'part 0: expected {"type": "text"'),
        ({"role": "user", "content": []}, '"content" must be a non-empty string'),
        ({**ANSWER, "reasoning_content": 3}, '"reasoning_content" must be text, got int'),
        ({**ANSWER, "tool_calls": "f(x)"}, '"tool_calls" is text that is not JSON'),
        ({**ANSWER, "tool_calls": CALL}, '"tool_calls" must be a list of calls'),
        ({**ANSWER, "tool_calls": [{"id": "7"}]}, 'call 0: expected {"function": {"name", "arguments"}}'),
        ({**ANSWER, "tool_calls": [{"name": "f", "arguments": "x=1"}]}, "call 0, arguments is text that is not JSON"),
        ({**ANSWER, "tool_calls": [{"name": "f", "arguments": [1]}]}, "call 0: arguments must be an object"),
    ],
)
def test_a_message_that_is_none_is_refused_by_its_place(message, says):
    said = refusal(messages=[USER, message, USER, ANSWER])
    assert 'field "messages", item 1' in said
    assert says in said


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "no turn of the assistant, which is what is trained on; it is empty"),
        ("[]", "it is empty"),
        ([USER, USER], "no turn of the assistant, which is what is trained on; those who speak are user"),
        ([USER, {"role": "expert", "content": "a"}], "those who speak are user, expert"),
        ([ANSWER], "at least a user and an assistant message"),
        ([ANSWER, USER], "at least a user and an assistant message"),
        ("a text", "is text that is not JSON"),
        (3, "must be a list of messages, got int"),
    ],
)
def test_a_conversation_has_an_answer_of_the_assistant(messages, says):
    assert says in refusal(messages=messages)


@pytest.mark.parametrize("arguments", [None, NAN, "", " ", {}, "{}"])
def test_a_call_without_arguments_has_none(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    for calls in ([call], json.dumps([call])):
        sample = sample_of(messages=[USER, {**ANSWER, "tool_calls": calls}])
        assert sample.answer["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_arguments_keep_their_nulls_as_text_and_as_an_object():
    given = {"x": None, "y": [None, {"z": None}]}
    for arguments in (given, json.dumps(given)):
        sample = sample_of(messages=[USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": arguments}]}])
        assert sample.answer["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": given}}]


def test_a_system_message_that_history_repeats_is_there_once():
    system = {"role": "system", "content": "s"}
    sample = sample_of(prompt="q", response="a", system="s", history=[system, USER, ANSWER])
    assert told(sample) == [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "q")]


def test_pandas_na_is_absent():
    pandas = pytest.importorskip("pandas")
    for none in (pandas.NA, pandas.NaT):
        sample = sample_of(prompt="q", response="a", input=none, system=none, note=none, messages=none)
        assert sample == sample_of(prompt="q", response="a")
