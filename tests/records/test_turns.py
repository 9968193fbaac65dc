"""Conversations as data sets write them: who speaks, which turns are answers, and what of them is trained on."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_fast.records.samples import samples_from
from pocl_fast.system.errors import InputError

CALL = {"name": "f", "arguments": {"x": "1"}}


def sample_of(**record):
    [sample] = samples_from([record], "data")
    return sample


def refusal(**record):
    with pytest.raises(InputError) as error:
        sample_of(**record)
    assert str(error.value).startswith("data, record 1: ")
    return str(error.value)


def turns(*said, **fields):
    """Messages of "u" (user), "a" (assistant) and "s" (system), each with its place as its text; fields by place."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    written = [{"role": roles[one], "content": f"{place}"} for place, one in enumerate("".join(said))]
    for place, more in fields.items():
        written[int(place[1:])] |= more
    return written


def sharegpt(messages, names):
    return [{"from": names[one["role"]], "value": one["content"]} for one in messages]


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: not text.isspace())
spoken = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), words), min_size=2, max_size=9)
conversations = spoken.map(lambda said: [{"role": role, "content": text} for role, text in said]).filter(
    lambda messages: any(one["role"] == "assistant" for one in messages[1:])
)


@settings(max_examples=60, deadline=None)
@given(conversations, st.sampled_from(["human", "user", "Human"]), st.sampled_from(["gpt", "chatgpt", "bing", "GPT"]))
def test_a_conversation_of_sharegpt_is_the_one_of_messages(messages, user, assistant):
    want = sample_of(messages=messages)
    other = sharegpt(messages, {"user": user, "assistant": assistant})
    renamed = [{"role": one["from"], "content": one["value"]} for one in other]
    for same in (messages, other, renamed, json.dumps(other)):
        assert sample_of(conversations=same) == sample_of(messages=same) == want


@settings(max_examples=60, deadline=None)
@given(conversations)
def test_every_answer_before_the_last_is_an_earlier_one_and_ends_a_sample_of_its_own(messages):
    sample = sample_of(messages=messages)
    places = [place for place, one in enumerate(messages) if one["role"] == "assistant"]
    assert sample.earlier == tuple(places[:-1])
    assert [*sample.messages, sample.answer_turn] == messages[: places[-1] + 1]
    assert sample.unused == (() if places[-1] == len(messages) - 1 else ("turns behind the last answer",))
    for place in filter(None, sample.earlier):  # one at place 0 answers nothing
        assert sample.up_to(place) == sample_of(messages=messages[: place + 1])


def test_a_sample_ends_with_none_but_its_earlier_answers():
    sample = sample_of(messages=turns("suaua"))
    for place in (0, 1, 3, 4):
        with pytest.raises(ValueError, match=rf"messages\[{place}\] is none of the earlier answers \(2,\)"):
            sample.up_to(place)


def test_a_sample_up_to_an_earlier_answer_has_all_of_that_answer():
    calling = {"content": "", "reasoning_content": "why", "tool_calls": [CALL]}
    sample = sample_of(messages=turns("uaua", _1=calling), tools=[{"name": "f"}], id=7)
    before = sample.up_to(1)
    assert (before.references, before.instruction) == (('{"name": "f", "arguments": {"x": "1"}}',), "0")
    assert before.answer_turn == {
        "role": "assistant",
        **calling,
        "tool_calls": [{"type": "function", "function": CALL}],
    }
    assert (before.tools, before.line, before.earlier, before.unused) == (sample.tools, 1, (), ())


def test_a_greeting_before_any_question_is_kept():
    sample = sample_of(conversations=sharegpt(turns("aua"), {"user": "human", "assistant": "gpt"}))
    assert [one["role"] for one in sample.messages] == ["assistant", "user"]
    assert sample.earlier == (0,)
    assert sample.up_to(0).messages == ()


def test_answers_move_with_a_system_message_before_them():
    sample = sample_of(system="s", messages=turns("uauaua"))
    assert (sample.messages[0]["role"], sample.earlier) == ("system", (2, 4))
    assert sample_of(messages=turns("suauaua")).earlier == (2, 4)
    assert sample_of(system="s", prompt="q", response="a", history=[["h", "i"], ["j", "k"]]).earlier == (2, 4)
    assert sample_of(prompt="q", response="a", history=turns("uaua", _1={"weight": 0})).earlier == (3,)


# -- which turns are trained on ----------------------------------------------------------------------------------------


# as OpenAI writes it, as axolotl and ms-swift do, as Arrow makes numbers of a column with nulls
@pytest.mark.parametrize(
    ("off", "on"),
    [({"weight": 0}, {"weight": 1}), ({"train": False}, {"train": True}), ({"loss": False}, {"loss": True})],
)
@pytest.mark.parametrize("form", [lambda value: value, float])
def test_a_turn_that_is_switched_off_is_no_answer(off, on, form):
    off, on = ({name: form(value) for name, value in one.items()} for one in (off, on))
    sample = sample_of(messages=turns("uauaua", _1=off, _3=on, _5=on, _0=off))
    assert (sample.earlier, sample.references, sample.unused) == ((3,), ("5",), ())
    assert list(sample.messages) == turns("uauau")  # the switches are obeyed, and no template is given them
    last = sample_of(messages=turns("uauaua", _1=on, _5=off))
    assert (last.earlier, last.references, len(last.messages)) == ((1,), ("3",), 3)
    assert last.unused == ("turns behind the last answer",)


def test_what_a_user_says_is_not_trained_on_and_a_wish_for_it_is_not_hidden():
    sample = sample_of(messages=turns("ua", _0={"weight": 1, "train": True}))
    assert sample.messages[0] == {
        **turns("u")[0],
        "weight": 1,
        "train": True,
    }  # the template shows it, or it is counted


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}])
def test_a_conversation_without_a_turn_to_train_on_is_refused(switch):
    assert "one not to be trained on" in refusal(messages=turns("uaua", _1=switch, _3=switch))
    assert "one not to be trained on" in refusal(prompt=turns("ua"), completion=turns("a", _0=switch))


@pytest.mark.parametrize(
    ("switch", "says"),
    [
        ({"weight": 0.5}, '"weight" must be 0 or 1, got 0.5'),
        ({"weight": 2}, '"weight" must be 0 or 1, got 2'),
        ({"weight": "0"}, "\"weight\" must be 0 or 1, got '0'"),
        ({"train": "false"}, "\"train\" must be true or false, got 'false'"),
        ({"train": [False]}, '"train" must be true or false, got [False]'),
        ({"weight": 1, "train": False}, "weight and train contradict each other"),
    ],
)
def test_a_switch_that_is_neither_on_nor_off_is_refused(switch, says):
    said = refusal(messages=turns("uaua", _1=switch))
    assert f'field "messages", item 1: {says}' in said


# -- calls in ShareGPT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["function_call", "tool_call", "FUNCTION_CALL"])
@pytest.mark.parametrize("result", ["observation", "tool", "tool_response"])
@pytest.mark.parametrize(
    "value", [CALL, [CALL], {**CALL, "arguments": '{"x": "1"}'}, {"name": "f", "parameters": {"x": "1"}}]
)
def test_a_call_and_its_result_are_those_of_messages(who, result, value):
    schema = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    sample = sample_of(
        conversations=[
            {"from": "human", "value": "q"},
            {"from": who, "value": json.dumps(value)},
            {"from": result, "value": "1"},
            {"from": "gpt", "value": "a"},
        ],
        system="s",
        tools=json.dumps([schema]),
    )
    assert list(sample.messages) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "1"},
    ]
    assert (sample.earlier, sample.references) == ((2,), ("a",))
    assert sample.tools == ({"type": "function", "function": schema},)


@pytest.mark.parametrize("value", ["f(x=1)", "[]", "3", '"f"', '{"x": 1}', '[{"name": "f"}, 3]'])
def test_a_call_that_is_none_is_refused(value):
    said = refusal(conversations=[{"from": "human", "value": "q"}, {"from": "function_call", "value": value}])
    assert 'field "conversations", item 1' in said
    assert "is text that is not JSON" in said or "expected " in said


@pytest.mark.parametrize("names", [("gpt", "chatgpt"), ("gpt", "assistant"), ("gpt", "GPT"), ("bing", "bard")])
def test_two_names_of_one_role_are_refused_for_they_may_be_two_who_speak(names):
    told = [{"from": "human", "value": "q"}, {"from": names[0], "value": "a"}, {"from": names[1], "value": "b"}]
    assert f'item 2: "{names[0]}" and "{names[1]}" in one conversation' in refusal(conversations=told)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", '"value" must be a non-empty string'),
        (3, '"value" must be text'),
        ("\ud83d", '"value" has half of'),
        ([{"type": ["x"]}], '"value", part 0 is of type'),
        (None, 'expected "role" and "content" (or "from" and "value"); it has'),
    ],
)
def test_what_is_wrong_with_a_value_is_said_of_the_value(value, says):
    said = refusal(conversations=[{"from": "human", "value": value}, {"from": "gpt", "value": "a"}])
    assert 'field "conversations", item 0' in said
    assert says in said


def test_who_is_not_known_goes_to_the_template():
    told = [{"from": "narrator", "value": "n"}, {"from": "gpt", "value": "a"}]
    assert sample_of(conversations=told).messages == ({"role": "narrator", "content": "n"},)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_parts_of_openais_responses_are_text():
    asked = {"role": "user", "content": [{"type": "input_text", "text": "q"}]}
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []}]}
    sample = sample_of(messages=[asked, said])
    assert (sample.messages[0]["content"], sample.references) == ("q", ("a",))


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (
            {"type": "tool_use", "name": "f", "input": {}},
            'of type "tool_use": write the call into the message\'s "tool_calls"',
        ),
        (
            {"type": "tool_result", "content": "1"},
            'of type "tool_result": write the result as a message of the role "tool"',
        ),
        ({"type": "thinking", "thinking": "t"}, 'of type "thinking": write it into the message\'s "reasoning_content"'),
        ({"type": "input_image", "image_url": "x"}, "the models here read text alone"),
        ({"type": "text", "text": "q", "image": "x.png"}, 'is of type "image", and the models here read text alone'),
        ({"type": "image"}, 'is of type "image"'),
        ({"type": "file", "file": {}}, 'is of type "file"'),
    ],
)
def test_a_part_that_is_no_text_is_refused_by_its_name_with_where_it_goes(part, says):
    assert says in refusal(messages=[{"role": "user", "content": [part]}, *turns("a")])


def test_anthropics_schemas_are_refused_with_what_to_write():
    said = refusal(messages=turns("ua"), tools=[{"name": "f", "input_schema": {}}])
    assert 'write its "input_schema" as "parameters"' in said


def test_numpy_arrays_are_lists():
    numpy, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    asked = [{"role": "user", "content": numpy.array(["q"], dtype=object)}, *turns("a")]
    frame = pandas.DataFrame({"messages": [numpy.array(asked, dtype=object)]})
    [sample] = samples_from(frame.to_dict("records"), "data")
    assert (sample.messages[0]["content"], sample.references) == ("q", ("0",))
    assert sample_of(prompt="q", response="a", history=numpy.array([["h", "i"], ["j", "k"]], dtype=object)).earlier == (
        1,
        3,
    )
    assert 'write it as text: "42"' in refusal(prompt="q", response=numpy.int64(42))
    assert sample_of(prompt="q", response=numpy.array(["a", "b"], dtype=object)).references == ("a", "b")
