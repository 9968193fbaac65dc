"""Where an answer starts and ends in the text of a chat template: the shapes of templates that people have."""

import pytest
from template_shapes import CALL, HEADER, SHAPES, TURNS, tokenizer_of

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.records.samples import Sample, samples_from
from pocl_fast.system.errors import InputError

LIMITS = {"max_length": 900, "max_prompt_length": 800, "long_prompts": "error", "name": "x"}


def encoded(record, tokenizer):
    """Prompt and response of a record as text, and the encoder."""
    samples = record if isinstance(record, list) else samples_from([record], "x")
    encoder = SampleEncoder(tokenizer)
    [one], _ = encode_all(samples, encoder, **LIMITS)
    return tokenizer.decode(one.prompt_ids), tokenizer.decode(one.response_ids), encoder


@pytest.mark.parametrize("special", [True, False], ids=["special", "added, not special"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_header_is_the_prompts_and_the_end_of_turn_the_responses(name, special):
    template, prompt_end, response, end = SHAPES[name]
    tokenizer = tokenizer_of(template, special=special)
    prompt, answer, encoder = encoded({"prompt": "Hi", "response": "yes"}, tokenizer)
    assert prompt.endswith(prompt_end)
    assert answer == response
    assert tokenizer.convert_ids_to_tokens(encoder.end_id) == end
    assert encoder.end_ids == {tokenizer.eos_token_id, encoder.end_id}


@pytest.mark.parametrize("name", SHAPES)
def test_an_answer_that_is_also_in_the_prompt_or_the_header_is_found_where_it_is(name):
    template, prompt_end, response, _ = SHAPES[name]
    for word in (
        "assistant",
        "user",
        "end",
        "|",
        "Hi",
        "yes yes",
        "a\n\nb",
        "Use <|pad|> or <|eot|> here",
        "<|end|> no",
    ):
        prompt, answer, _ = encoded({"prompt": "Hi", "response": word}, tokenizer_of(template))
        assert prompt.endswith(prompt_end), word
        assert answer == response.replace("yes", word), word


@pytest.mark.parametrize("name", SHAPES)
def test_earlier_answers_are_the_prompts(name):
    template, prompt_end, response, _ = SHAPES[name]
    turns = [("user", "one"), ("assistant", "yes"), ("user", "Hi"), ("assistant", "yes")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    prompt, answer, _ = encoded(record, tokenizer_of(template))
    assert prompt.endswith(prompt_end)
    assert prompt.count("yes") == 1
    assert answer == response


@pytest.mark.parametrize("name", SHAPES)
def test_the_prompt_is_what_a_model_is_asked_with(name):
    """Of a template that looks at add_generation_prompt."""
    tokenizer = tokenizer_of(SHAPES[name][0])
    prompt, _, encoder = encoded({"prompt": "Hi", "response": "yes"}, tokenizer)
    asked, bare = (
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=asks)
        for asks in (True, False)
    )
    if asked != bare and "generation %" not in SHAPES[name][0]:
        assert prompt == asked
    sample = samples_from([{"prompt": "Hi", "response": "something else"}], "x")[0]
    assert tokenizer.decode(encoder.encode_prompt(sample)) == prompt


def test_an_answer_is_as_the_template_strips_it():
    for name in ("Gemma: another role, stripped", "Llama 3: two line ends in the header"):
        _, answer, _ = encoded({"prompt": "Hi", "response": " \n yes\n"}, tokenizer_of(SHAPES[name][0]))
        assert answer == "yes<|eot|>"


TOOL_ENDS = (  # Llama 3.1: another end where a tool is called
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['tool_calls'] %}"
    "{{ m['tool_calls'][0]['function'] | tojson + '<|return|>' }}{% else %}{{ m['content'] + '<|eot|>' }}{% endif %}"
    "{% endfor %}" + HEADER
)


def test_two_ends_in_one_file_are_each_kept_and_both_stop_an_answer():
    tokenizer = tokenizer_of(TOOL_ENDS)
    user = {"role": "user", "content": "Hi"}
    samples = [Sample(0, 1, (user,), ("yes",)), Sample(1, 2, (user,), ("sum",), answer=CALL)]
    encoder = SampleEncoder(tokenizer)
    both, _ = encode_all(samples, encoder, **LIMITS)
    said = [tokenizer.decode(one.response_ids) for one in both]
    assert said == ["yes<|eot|>", '{"name": "sum", "arguments": {"a": 1}}<|return|>']
    assert set(tokenizer.convert_ids_to_tokens(sorted(encoder.end_ids))) == {"<|end|>", "<|eot|>", "<|return|>"}


def test_a_template_that_writes_no_tool_calls_is_refused_where_they_are_all_that_an_answer_has():
    user = {"role": "user", "content": "Hi"}
    with pytest.raises(InputError, match=r"x, line 7: the chat template shows no \"tool_calls\""):
        encoded([Sample(0, 7, (user,), ("sum",), answer=CALL)], tokenizer_of(TURNS + HEADER))


def test_what_a_template_does_not_write_is_counted_with_lines():
    user = {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "yes", "reasoning_content": "because"}
    samples = [Sample(0, 4, (user,), ("yes",), answer=answer), Sample(1, 9, (user,), ("yes",))]
    _, report = encode_all(samples, SampleEncoder(tokenizer_of(TURNS + HEADER)), **LIMITS)
    assert "does not write the reasoning of 1 (line 4)" in report.describe("x")


def test_content_beside_tool_calls_that_the_template_leaves_out_is_counted():
    user = {"role": "user", "content": "Hi"}
    said = {**CALL, "content": 'I "add".'}
    samples = [Sample(0, 3, (user,), ("x",), answer=said), Sample(1, 4, (user,), ("x",), answer=CALL)]
    _, report = encode_all(samples, SampleEncoder(tokenizer_of(TOOL_ENDS)), **LIMITS)
    assert report.describe("x").endswith("does not write the content beside tool calls of 1 (line 3)")
    for write in ("{{ m['content'] }}", "{{ m['content'] | tojson }}"):
        both = TOOL_ENDS.replace("{{ m['tool_calls'][0]", write + "{{ m['tool_calls'][0]")
        _, report = encode_all(samples, SampleEncoder(tokenizer_of(both)), **LIMITS)
        assert report.unwritten == ()


@pytest.mark.parametrize("inside", [False, True], ids=["own field", "in the content"])
def test_reasoning_in_earlier_turns_that_the_template_leaves_out_is_counted_apart(inside):
    thinks = {"role": "assistant", "content": "yes", "reasoning_content": "because"}
    if inside:
        thinks = {"role": "assistant", "content": "<think>\nbecause\n</think>\n\nyes"}
    user = {"role": "user", "content": "Hi"}
    sample = Sample(0, 6, (user, thinks, user), ("no",), answer={"role": "assistant", "content": "no"})
    dropping = TURNS.replace("m['content']", "m['content'].split('</think>')[-1]")
    _, report = encode_all([sample], SampleEncoder(tokenizer_of(dropping + HEADER)), **LIMITS)
    want = "does not write the reasoning in earlier turns of 1 (line 6), as many templates do on purpose"
    assert report.describe("x").endswith(want)
    keeping = TURNS.replace("m['content']", "(m['reasoning_content'] or '') + m['content']")
    _, report = encode_all([sample], SampleEncoder(tokenizer_of(keeping + HEADER)), **LIMITS)
    assert report.unwritten == ()


def marks(answer):
    return (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        + answer
        + "{% else %}{{ m['content'] + '<|eot|>\n' }}{% endif %}{% endfor %}"
        + HEADER
    )


MARKED = {  # what the mark is around: how the answer is written, the response
    "answer, end and line end": (
        "{% generation %}{{ m['content'] + '<|eot|>\n' }}{% endgeneration %}", "yes<|eot|>"
    ),
    "the answer alone": (
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|eot|>\n' }}", "yes<|eot|>"
    ),
    "the answer, a note behind it not": (
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ ' (signed)<|eot|>\n' }}", "yes (signed)<|eot|>"
    ),
    "a part of what ends the turn": (
        "{% generation %}{{ m['content'] + '.' }}{% endgeneration %}{{ ' (signed)<|eot|>\n' }}", "yes.<|end|>"
    ),
    "each of two parts": (
        "{% generation %}{{ 'Well: ' }}{% endgeneration %}{{ '- ' }}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{{ '<|eot|>\n' }}", "Well: - yes<|eot|>"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MARKED)
def test_a_response_ends_where_its_mark_ends_or_with_the_end_of_turn_right_behind_the_answer(name):
    written, response = MARKED[name]
    assert encoded({"prompt": "Hi", "response": "yes"}, tokenizer_of(marks(written)))[1] == response


# -- prompts that open a block of reasoning ----------------------------------------------------------------------------

LAST_PART = "{{ '<|start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1] + '<|eot|>\n' }}"
OPENS = "{% if add_generation_prompt %}{{ '<|start|>assistant\n<think>\n' }}{% endif %}"
OPENING = {
    "DeepSeek-R1: no reasoning in finished answers": "{% for m in messages %}" + LAST_PART + "{% endfor %}" + OPENS,
    "the block is opened and never closed": (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{{ '<think>\n' }}"
        "{% endif %}{{ m['content'] + '<|eot|>\n' }}{% endfor %}" + OPENS
    ),
    "Qwen3-Thinking: opened and closed": (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{{ '<think>\n' }}"
        "{% if '</think>' in m['content'] %}"
        "{{ m['content'].split('</think>')[0].split('<think>')[-1].strip() }}{% endif %}"
        "{{ '\n</think>\n\n' + m['content'].split('</think>')[-1].strip() }}{% else %}{{ m['content'] }}{% endif %}"
        "{{ '<|eot|>\n' }}{% endfor %}" + OPENS
    ),
}  # fmt: skip


@pytest.mark.parametrize("answer", ["Lima", "<think>\nPeru...\n</think>\n\nLima"])
@pytest.mark.parametrize("name", OPENING)
def test_a_block_of_reasoning_that_the_prompt_opens_is_closed_once(name, answer):
    prompt, said, encoder = encoded({"prompt": "Hi", "response": answer}, tokenizer_of(OPENING[name]))
    assert prompt.endswith("<|start|>assistant\n<think>\n")
    assert (prompt + said).count("<think>") == (prompt + said).count("</think>") == 1
    assert said.endswith("</think>\n\nLima<|eot|>")
    assert ("Peru" in said) == ("Peru" in answer)
    ids = encoder.tokenizer(said.removesuffix("<|eot|>"), add_special_tokens=False).input_ids
    assert encoder.answer_texts([ids], [["Lima"]]) == ["Lima"]


def test_a_prompt_with_an_empty_block_gets_the_answer_alone():
    template = OPENING["DeepSeek-R1: no reasoning in finished answers"].replace(
        OPENS, OPENS.replace("<think>\n", "<think>\n\n</think>\n\n")
    )
    for answer in ("Lima", "<think>\nPeru\n</think>\n\nLima"):
        prompt, said, _ = encoded({"prompt": "Hi", "response": answer}, tokenizer_of(template))
        assert prompt.endswith("<think>\n\n</think>\n\n")
        assert said == "Lima<|eot|>"


def test_a_role_in_brackets_opens_no_reasoning():
    template = "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] + '<|eot|>\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
    prompt, said, _ = encoded({"prompt": "Hi", "response": "yes"}, tokenizer_of(template))
    assert (prompt, said) == ("<user>\nHi<|eot|>\n<assistant>\n", "yes<|eot|>")


OLD_LLAMA_3 = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
)


@pytest.mark.parametrize("end", ["{{ '<|start|>assistant\n\n' }}", ""], ids=["always there", "never asked for"])
@pytest.mark.parametrize("answer", ["yes", "\nyes", "\n\nyes", "\n\n\nyes", " yes\n"])
def test_blanks_of_a_header_are_not_those_of_an_answer_that_is_stripped(end, answer):
    prompt, said, _ = encoded({"prompt": "Hi", "response": answer}, tokenizer_of(OLD_LLAMA_3 + end))
    assert (prompt, said) == ("<|start|>user\n\nHi<|eot|><|start|>assistant\n\n", "yes<|eot|>")
