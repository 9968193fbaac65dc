"""What no model is told: fields are counted in one line, and what changes the question is refused where a template has
no place for it."""

import pytest
from tiny import CHAT_TEMPLATE, arithmetic, tiny_tokenizer, write_jsonl

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.data.stream import SampleStream
from pocl_fast.options.data import DataOptions
from pocl_fast.records.samples import samples_from
from pocl_fast.records.sources import source_of
from pocl_fast.system.errors import InputError
from pocl_fast.templates.chat_template import ChatTemplate
from pocl_fast.templates.unused_fields import UnusedFields

LIMITS = {"max_length": 900, "max_prompt_length": 800, "long_prompts": "error"}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALLING = {**ANSWER, "tool_calls": [{"name": "f", "arguments": {}}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
WHOLE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
    "{% if m.reasoning_content %}{{ m.reasoning_content }}{% endif %}{{ m['content'] }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}{{ '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def report_of(*records, template=CHAT_TEMPLATE):
    tokenizer = tiny_tokenizer(chat=template is not None)
    tokenizer.chat_template = template
    _, report = encode_all(samples_from(records, "data"), SampleEncoder(tokenizer), name="data", **LIMITS)
    return report.describe("data")


def refusal(*records, template=CHAT_TEMPLATE):
    with pytest.raises(InputError) as error:
        report_of(*records, template=template)
    return str(error.value)


def test_fields_that_are_not_read_are_counted_in_the_sets_line():
    records = [{**one, "id": n} for n, one in enumerate(arithmetic(4))]
    records[2] |= {"source": "web", "inptu": "x"}
    said = report_of(*records)
    assert said.endswith("; fields not used: id (4 records), source (1 record), inptu (1 record; did you mean input?)")
    assert said.count("\n") == 0
    assert report_of(*arithmetic(4)) == "data: 4 samples"


def test_a_stream_counts_the_same_fields(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{**one, "id": 7} for one in arithmetic(5)])
    stream = SampleStream(
        source_of(path), SampleEncoder(tiny_tokenizer()), DataOptions(max_length=96, max_prompt_length=80)
    )
    assert stream.check().describe("x") == "x: 5 samples; fields not used: id (5 records)"


def test_fields_of_messages_that_the_template_does_not_show_are_counted():
    one = {"messages": [{**USER, "score": 0}, {**ANSWER, "reasoning_content": "why", "score": 1}]}
    said = report_of(one, one)
    scores = "score of user messages (%s), score of assistant messages (%s)"
    assert said.endswith(
        scores % (("2 records",) * 2) + "; the template does not write the reasoning of 2 (records 1, 2)"
    )
    assert report_of(one, template=WHOLE).endswith("fields not used: " + scores % (("1 record",) * 2))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_reasoning_that_no_template_writes_is_counted_under_each_of_its_names(field, template):
    said = report_of({"messages": [USER, {**ANSWER, field: "because"}]}, template=template)
    assert said.endswith("; the template does not write the reasoning of 1 (record 1)")
    assert "fields not used" not in said


@pytest.mark.parametrize("opens", ["<think>", "[THINK]"])
def test_reasoning_that_the_template_takes_out_of_earlier_answers_is_counted_whatever_its_tags(opens):
    closes = opens[0] + "/" + opens[1:]
    written = "{{ '" + opens + "' + m.reasoning_content + '" + closes + "' if m.reasoning_content }}"
    content = "{{ m['content'] if loop.last else m['content'].split('" + closes + "')[-1] }}"
    template = WHOLE.replace("{{ m['content'] }}", written + content).replace(
        "{% if m.reasoning_content %}{{ m.reasoning_content }}{% endif %}", ""
    )
    thought = {**ANSWER, "content": f"{opens}because of it{closes}yes, it is so"}
    said = report_of({"messages": [USER, thought, USER, thought]}, template=template)
    assert "reasoning in earlier turns" in said
    assert "the reasoning of" not in said


def test_a_field_is_shown_where_the_template_prints_it_for_that_role_not_where_it_names_it():
    template = WHOLE.replace("{{ m['content'] }}", "{% if m.role == 'tool' %}{{ m.name }}{% endif %}{{ m['content'] }}")
    template = "{% for t in tools or [] %}{{ t.function.name ~ t.weight }}{% endfor %}" + template
    tool = {"role": "tool", "name": "f", "content": "1"}
    record = {"messages": [{**USER, "name": "Ada", "weight": 1}, CALLING, tool, ANSWER], "tools": TOOLS}
    said = report_of(record, record, template=template)
    assert said.endswith("not used: name of user messages (2 records), weight of user messages (2 records)")


def test_an_empty_field_says_nothing():
    record = {"messages": [{**USER, "name": None, "weight": ""}, ANSWER]}
    assert report_of(record) == "data: 1 samples"


def test_a_field_is_looked_at_once_a_role(monkeypatch):
    written = []
    render = ChatTemplate.render

    def counting(self, messages, tools=(), *, prompt):
        written.append(messages)
        return render(self, messages, tools, prompt=prompt)

    records = [{"messages": [{**USER, "name": "Ada"}, {**ANSWER, "name": "Bo"}]}] * 5
    tokenizer = tiny_tokenizer()
    fields = UnusedFields(SampleEncoder(tokenizer), "data")
    monkeypatch.setattr(ChatTemplate, "render", counting)
    for sample in samples_from(records, "data"):
        fields.see(sample)
    assert len(written) == 4  # with and without, of each role
    assert fields.counts == (("name of user messages", 5), ("name of assistant messages", 5))


@pytest.mark.parametrize(
    "template",
    [
        WHOLE,
        "{# tools #}{% set ns = namespace(t=tools) %}{{ ns.t | tojson }}{% for m in messages %}"
        "{% for key, value in m.items() %}{{ key ~ value }}{% endfor %}{% endfor %}",
    ],
)
def test_tools_and_calls_that_a_template_shows_are_taken(template):
    assert report_of({"messages": [USER, CALLING], "tools": TOOLS}, template=template) == "data: 1 samples"


@pytest.mark.parametrize(
    ("record", "template", "says"),
    [
        ({"prompt": "q", "response": "a", "tools": TOOLS}, CHAT_TEMPLATE, 'the chat template shows no "tools"'),
        # named in a comment and in plain text alone
        ({"prompt": "q", "response": "a", "tools": TOOLS}, "{# tools #}tools:" + CHAT_TEMPLATE, 'shows no "tools"'),
        ({"messages": [USER, CALLING]}, CHAT_TEMPLATE, 'the chat template shows no "tool_calls"'),
        ({"messages": [USER, CALLING, USER, ANSWER]}, CHAT_TEMPLATE, 'the chat template shows no "tool_calls"'),
        (
            {"system": "s", "prompt": "q", "response": "a"},
            CHAT_TEMPLATE.replace("messages %}", "messages if m['role'] != 'system' %}"),
            'the chat template shows no messages of the role "system"',
        ),
        (
            {"messages": [USER, ANSWER, {"role": "tool", "content": "r"}, ANSWER]},
            CHAT_TEMPLATE.replace("messages %}", "messages if m['role'] in ('user', 'assistant') %}"),
            'the chat template shows no messages of the role "tool"',
        ),
        ({"system": "s", "prompt": "q", "response": "a"}, None, "the Alpaca template has no place for system"),
        ({"history": [["h", "i"]], "prompt": "q", "response": "a"}, None, "no place for earlier turns"),
        ({"prompt": "q", "response": "a", "tools": TOOLS}, None, "the Alpaca template has no place for tools"),
        ({"messages": [USER, CALLING]}, None, "the Alpaca template has no place for tool calls"),
    ],
)
def test_what_changes_the_question_and_has_no_place_is_refused_with_its_line(record, template, says):
    plain = {"messages": [USER, ANSWER]} if "messages" in record else {"prompt": "q", "response": "a"}
    said = refusal(plain, record, template=template)
    assert said.startswith("data, record 2: ")
    assert says in said


def test_the_alpaca_template_takes_a_conversation_of_one_turn_and_counts_the_rest():
    record = {"messages": [USER, {**ANSWER, "reasoning_content": "why"}]}
    assert report_of(record, template=None).endswith("; the template does not write the reasoning of 1 (record 1)")


LAST_ONLY = (
    "{{ '<|start|>user\n' + (messages | selectattr('role', 'equalto', 'user') | list)[-1].content + '<|end|>\n' }}"
    "{% if messages[-1].role == 'assistant' %}{{ '<|start|>assistant\n' + messages[-1].content + '<|end|>\n' }}"
    "{% elif add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
WINDOW = "{% if messages | length > 3 %}{% set messages = messages[-3:] %}{% endif %}" + CHAT_TEMPLATE
CUT = CHAT_TEMPLATE.replace("m['content']", "(m['content'] if m['role'] != 'user' else m['content'][:40])")
NO_QUESTION = CHAT_TEMPLATE.replace("messages %}", "messages if m['role'] != 'user' %}")


@pytest.mark.parametrize("earlier", ["u", "a longer question of an earlier turn"])
@pytest.mark.parametrize("template", [LAST_ONLY, WINDOW])
def test_earlier_turns_that_the_template_leaves_out_are_counted_with_lines(template, earlier):
    record = {"messages": [{**USER, "content": earlier}, *(ANSWER, USER) * 2, ANSWER]}
    said = report_of({"messages": [USER, ANSWER]}, record, record, template=template)
    assert said == "data: 3 samples; the template does not write the earlier turns of 2 (records 2, 3)"


@pytest.mark.parametrize("question", ["a", "q?", "a question of some more words"])
def test_a_question_that_the_template_leaves_out_is_refused(question):
    said = refusal({"prompt": question, "response": "a"}, template=NO_QUESTION)
    assert said.startswith("data, record 1: the chat template leaves the question out")


def test_a_question_that_the_template_cuts_is_refused():
    assert "or a part of it" in refusal({"prompt": "a word " * 8, "response": "a"}, template=CUT)


@pytest.mark.parametrize("filter", ["upper", "tojson", "trim", "replace('q', 'Q')"])
def test_turns_that_the_template_rewrites_are_not_left_out(filter):
    written = CHAT_TEMPLATE.replace("m['content']", f"(m['content'] if loop.last else m['content'] | {filter})")
    record = {"messages": [{**USER, "content": ' a "q"\n\t and more of it '}, ANSWER, USER, ANSWER]}
    assert "the template does not write" not in report_of(record, template=written)


def test_a_question_beside_messages_is_named_without_a_hint_to_itself():
    said = report_of({"messages": [USER, ANSWER], "input": "i"})
    assert said.endswith('fields not used: input (1 record; not read beside "messages")')
