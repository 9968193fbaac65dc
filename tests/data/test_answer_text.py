"""What of a model's answer is compared with a reference."""

import pytest
from tiny import tiny_tokenizer

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.records.samples import samples_from

END = "<|end|>"
HEADER = "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"


def template(answer, header=HEADER):
    """Turns whose last answer is written so."""
    return (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
        + answer
        + "{% else %}{{ m['content'] }}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
        + header
    )


PLAIN = template("{{ m['content'] }}")
EMPTY = template("{{ '<think>\n\n</think>\n\n' + m['content'] }}")
BRACKETS = template("{{ '[THINK]' + (m['reasoning_content'] or '') + '[/THINK]' + m['content'] }}")
CHANNELS = template(  # gpt-oss
    "{% if m['reasoning_content'] %}{{ '<|ch|>analysis<|msg|>' + m['reasoning_content'] + '<|over|>' }}{% endif %}"
    "{{ '<|ch|>final<|msg|>' + m['content'] }}"
)
OPENED = template("{{ m['content'] }}", HEADER.replace("assistant\n", "assistant\n<think>\n"))
SCRATCH = template("{{ '<scratch></scratch>' + m['content'] }}")


def read(chat, said, reference="Lima", *, special=False):
    tokenizer = tiny_tokenizer()
    tokens = ["<think>", "</think>", "<|ch|>", "<|msg|>", "<|over|>"]
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", *tokens]})
    else:
        tokenizer.add_tokens(tokens)
    tokenizer.chat_template = chat
    ids = tokenizer(said, add_special_tokens=False).input_ids
    return SampleEncoder(tokenizer).answer_texts([ids], [[reference]])[0]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("chat", "said"),
    [
        (PLAIN, "Lima"),
        (PLAIN, "<think>\nPeru's capital.\n</think>\n\nLima"),  # a reasoning model whose template shows no tags
        (EMPTY, "<think>\n\n</think>\n\nLima"),
        (EMPTY, "<think></think>Lima"),
        (EMPTY, " <think>\nPeru's capital.\n</think>\n\nLima\n"),
        (EMPTY, "Lima"),
        (BRACKETS, "[THINK][/THINK]Lima"),
        (BRACKETS, "[THINK]Peru's.[/THINK]Lima"),
        (SCRATCH, "<scratch></scratch>Lima"),
        (CHANNELS, "<|ch|>final<|msg|>Lima"),
        (CHANNELS, "<|ch|>analysis<|msg|>Peru's.<|over|><|ch|>final<|msg|>Lima"),
        (OPENED, "Peru's capital.\n</think>\n\nLima"),
        (OPENED, "\n</think>\n\nLima"),
    ],
)
def test_reasoning_and_what_the_template_writes_is_not_compared(chat, said, special):
    assert read(chat, said, special=special) == "Lima"


@pytest.mark.parametrize(
    "said",
    [
        "Close it with </think> here",
        "The tag <think> opens and </think> closes",
        "<think>\nPeru's capital, and then",  # cut before the block's end: there is no answer yet
        "no tags at all",
    ],
)
def test_tags_that_are_no_block_before_the_answer_stay(said):
    assert read(EMPTY, said) == said.strip()


def test_reasoning_is_compared_where_the_reference_has_it():
    said = "<think>\nPeru's.\n</think>\n\nLima"
    assert read(PLAIN, said, reference=said) == said


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    "reference",
    [
        "<think>\nPeru's.\n</think>\n\nLima",
        "<think>Peru's.</think>Lima",
        "<think> Peru's. </think> Lima",
        "Peru's.\n</think>\n\nLima",
        "<think>\n</think>\nLima",
    ],
)
@pytest.mark.parametrize("chat", [PLAIN, EMPTY, OPENED])
def test_a_student_that_says_what_it_was_trained_on_is_read_as_its_reference(chat, reference, special):
    tokenizer = tiny_tokenizer()
    tags = ["<think>", "</think>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", *(tags if special else [])]})
    tokenizer.chat_template = chat
    encoder = SampleEncoder(tokenizer)
    [sample] = samples_from([{"prompt": "Hi", "response": reference}], "x")
    one = encoder.encode(sample, max_length=900, max_prompt_length=800)
    assert one.response_ids[-1] == encoder.end_id
    [text] = encoder.answer_texts([one.response_ids[:-1]], [[reference]])
    assert text == reference
    [wrong] = encoder.answer_texts([tokenizer("Chile's.</think>Lima").input_ids], [[reference]])
    assert wrong != reference


def test_an_end_of_turn_in_plain_text_is_not_compared():
    chat = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</turn>\n' }}{% endfor %}"
    chat += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    assert read(chat, "Lima</turn>") == "Lima"
    assert read(chat, "Lima</turn>\nuser: and of Chile?") == "Lima"  # nothing stopped it there


@pytest.mark.parametrize("header", ["<{}>", "[{}]"])
@pytest.mark.parametrize("role", ["assistant", "model", "bot"])
@pytest.mark.parametrize("asked", [True, False], ids=["asked for", "always there"])
def test_a_header_in_brackets_opens_no_reasoning(header, role, asked):
    opens, closes = header.format(role), header.format("/" + role)
    prompt = f"{{{{ '{opens}' }}}}"
    chat = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        f"{{{{ '{opens}' + m['content'] + '{closes}' }}}}"
        "{% else %}{{ '<user>' + m['content'] + '</user>' }}{% endif %}{% endfor %}"
    )
    chat += f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}" if asked else ""
    assert read(chat, "Lima" + closes) == "Lima"
    assert read(chat, f"Peru. {closes}") == "Peru."
    assert read(chat, "<think>\nPeru's.\n</think>\n\nLima" + closes) == "Lima"


def test_without_a_chat_template_the_text_is_all():
    tokenizer = tiny_tokenizer(chat=False)
    ids = [tokenizer(text).input_ids for text in (" Lima\n", "a <|pad|> b", "")]
    assert SampleEncoder(tokenizer).answer_texts(ids) == ["Lima", "a  b", ""]
