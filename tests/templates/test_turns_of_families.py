"""Earlier answers in templates that write the same turn in two ways: asked or finished, last or not."""

import pytest
from test_answer_span import tokenizer_of

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.records.samples import samples_from

WIDE = {"max_length": 9000, "max_prompt_length": 8000}
TOOLS = [{"type": "function", "function": {"name": "sum", "description": "Adds.", "parameters": {}}}]


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def calling(number, content=""):
    return said(
        "assistant", content, tool_calls=[{"type": "function", "function": {"name": "sum", "arguments": number}}]
    )


AGENT = [
    said("user", "1?"), calling({"a": 1}), said("tool", "one"), said("assistant", "It is 1."),
    said("user", "2?"), calling({"a": 2}, "So:"), said("tool", "two"), said("assistant", "Two."),
]  # fmt: skip
PLAIN = [said("user", "a"), said("assistant", "yes"), said("user", "b"), said("assistant", "no")]


def texts(template, turns, tools=()):
    """The answers that are trained on, and how many are left out."""
    tokenizer = tokenizer_of(template)
    encoder = SampleEncoder(tokenizer)
    [sample] = samples_from([{"messages": turns, "tools": list(tools)} if tools else {"messages": turns}], "x")
    one = encoder.encode(sample, **WIDE)
    left = sum(count for _, count, _ in encoder.choice.take_notes())
    return [tokenizer.decode(one.ids[start:end]) for start, end in one.spans], left


def template(history, asked):
    """Answers of the last exchange have `history[1]` before them, others `history[0]`; a prompt ends with `asked`."""
    return (
        "{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{{ '" + history[1] + "' if loop.index0 > ns.last else '" + history[0] + "' }}"
        "{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}{{ '\n' if m.content }}"
        "{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}{{ '<|eot|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\n" + asked + "' }}{% endif %}"
    ).replace("\n", "\\n")


EMPTY = "<think>\n\n</think>\n\n"
FAMILIES = {
    "Qwen3.5, not thinking: the block is of the last exchange": (("", EMPTY), EMPTY),
    "Qwen3.5, thinking: the prompt opens what is closed in the last exchange": (("", EMPTY), "<think>\n"),
    "Nemotron 3: the prompt opens another block than the template writes": (("<think></think>",) * 2, "<think>\n"),
    "MiniMax, DeepSeek: the prompt alone has a block": (("", ""), "<think>\n"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_earlier_answers_and_calls_are_trained_on_without_the_empty_block_before_them(name):
    found, left = texts(template(*FAMILIES[name]), AGENT, TOOLS)
    assert left == 0
    bare = [one.partition("</think>")[2].lstrip() if "</think>" in one else one for one in found]
    calls = [f'<call>{{"name": "sum", "arguments": {{"a": {n}}}}}</call><|eot|>' for n in (1, 2)]
    assert bare == [calls[0], "It is 1.<|eot|>", "So:\n" + calls[1], "Two.<|eot|>"]
    assert found[:2] == bare[:2]
    assert texts(template(*FAMILIES[name]), PLAIN)[0][0] == "yes<|eot|>"


MISTRAL = (
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and m == asked[-1] %}{{ '<|start|>' + (tools | tojson) + '<|user|>' }}"
    "{% endif %}{{ '[INST]' + m.content + '[/INST]' }}{% elif m.tool_calls %}"
    "{{ '[CALL]' + (m.tool_calls[0].function | tojson) + eos_token }}{% elif m.role == 'tool' %}"
    "{{ '[RESULT]' + m.content + '[/RESULT]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_a_call_before_the_question_that_the_tools_are_written_at_is_trained_on():
    turns = [*AGENT[:4], said("user", "2?"), said("assistant", "Two.")]
    call = '[CALL]{"name": "sum", "arguments": {"a": 1}}<|end|>'
    assert texts(MISTRAL, turns, TOOLS) == ([call, "It is 1.<|end|>", "Two.<|end|>"], 0)


HARMONY = (  # what is said before a call is written only while no final answer follows
    "{% for m in messages %}{% if m.tool_calls %}{% set ns = namespace(final=false) %}"
    "{% for later in messages[loop.index:] %}{% if later.role == 'assistant' and not later.tool_calls %}"
    "{% set ns.final = true %}{% endif %}{% endfor %}{% if m.content and not ns.final %}"
    "{{ '<|start|>assistant<|user|>' + m.content + '<|eot|>' }}{% endif %}<|start|>assistant"
    "GEN1{{ ' to=sum<|user|>' + (m.tool_calls[0].function.arguments | tojson) + '<|return|>' }}GEN2"
    "{% elif m.role == 'assistant' %}<|start|>assistant"
    "GEN1{{ '<|assistant|>' + m.content + ('<|return|>' if loop.last else '<|eot|>') }}GEN2"
    "{% else %}{{ '<|start|>' + m.role + '<|user|>' + m.content + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.mark.parametrize("marks", [("", ""), ("{% generation %}", "{% endgeneration %}")], ids=["plain", "marked"])
def test_a_prompt_that_is_other_text_than_the_whole_conversation_keeps_every_answer_whole(marks):
    text = HARMONY.replace("GEN1", marks[0]).replace("GEN2", marks[1])
    found, left = texts(text, AGENT, TOOLS)
    assert left == 0
    assert found[0] == ' to=sum<|user|>{"a": 1}<|return|>'
    assert found[1].startswith("<|assistant|>It is 1.")
    assert found[2].endswith(' to=sum<|user|>{"a": 2}<|return|>')
    assert found[3] == "<|assistant|>Two.<|return|>"
