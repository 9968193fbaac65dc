"""Which chat template is taken, what it is given, and what is said where it refuses a conversation."""

import pytest
from tiny import CHAT_TEMPLATE, tiny_tokenizer, write_jsonl

from pocl_fast.data.encoding import SampleEncoder, encoder_of
from pocl_fast.data.fitting import encode_all
from pocl_fast.data.stream import SampleStream
from pocl_fast.options.data import DataOptions
from pocl_fast.records.samples import Sample, read_samples, samples_from
from pocl_fast.records.sources import source_of
from pocl_fast.system.errors import InputError
from pocl_fast.templates.chat_template import unused_template

LIMITS = {"max_length": 900, "max_prompt_length": 800, "long_prompts": "error", "name": "train.jsonl"}
REFUSES = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% endfor %}"
)
THINKS = CHAT_TEMPLATE.replace(
    "'<|start|>assistant\n' }}",
    "'<|start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '(off)' }}{% endif %}",
)


def encoder(tmp_path, tokenizer, said=None, **options):
    return encoder_of(tokenizer, DataOptions(**options), tmp_path, [].append if said is None else said.append)


def prompt_of(made, record=None):
    sample = samples_from([record or {"prompt": "a", "response": "b"}], "x")[0]
    return made.tokenizer.decode(made.encode_prompt(sample))


# -- which one ---------------------------------------------------------------------------------------------------------


def named(*names):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {name: f"{name}: " + CHAT_TEMPLATE for name in names}
    return tokenizer


def test_of_several_templates_the_default_one_is_taken_and_tool_use_for_records_with_tools():
    made = SampleEncoder(named("rag", "default", "tool_use"))
    tool = {"type": "function", "function": {"name": "sum", "parameters": {}}}
    plain = Sample(0, 1, ({"role": "user", "content": "a"},), ("b",))
    assert prompt_of(made).startswith("default: ")
    assert made.tokenizer.decode(made.encode_prompt(Sample(0, 1, plain.messages, ("b",), tools=(tool,)))).startswith(
        "tool_use: "
    )


def test_without_a_default_one_a_name_is_asked_for(tmp_path):
    with pytest.raises(InputError, match="none is its default: give --chat-template NAME, one of rag, tool_use"):
        SampleEncoder(named("tool_use", "rag"))
    assert prompt_of(encoder(tmp_path, named("tool_use", "rag"), chat_template="rag")).startswith("rag: ")


def test_a_template_may_be_a_file_and_is_the_tokenizers_afterwards(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("own: " + CHAT_TEMPLATE)
    tokenizer = tiny_tokenizer(chat=False)
    assert prompt_of(encoder(tmp_path, tokenizer, chat_template=str(file))).startswith("own: ")
    assert tokenizer.chat_template == "own: " + CHAT_TEMPLATE


def test_a_template_that_is_not_there_or_no_jinja_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--chat-template defualt: .*it has default, rag.*did you mean default"):
        encoder(tmp_path, named("default", "rag"), chat_template="defualt")
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}\n{{ m['content' }}\n{% endfor %}")
    with pytest.raises(InputError, match="is no jinja: line 2: "):
        encoder(tmp_path, tiny_tokenizer(), chat_template=str(tmp_path / "bad.jinja"))


@pytest.mark.parametrize(
    "given", [{"chat_template": "default"}, {"chat_template_kwargs": {"a": 1}}, {"system_prompt": "Be brief."}]
)
def test_the_alpaca_template_has_no_place_for_a_chat_templates_options(tmp_path, given):
    [option] = given
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')}: --template alpaca has no place for it"):
        encoder(tmp_path, tiny_tokenizer(), template="alpaca", **given)
    if option != "chat_template":
        with pytest.raises(InputError, match="the tokenizer has no chat template"):
            encoder(tmp_path, tiny_tokenizer(chat=False), **given)


def test_that_a_teachers_template_is_not_used_is_said(tmp_path):
    base = encoder(tmp_path, tiny_tokenizer(chat=False))
    assert "the teacher's chat template is not used" in unused_template(base.chat, "auto", tiny_tokenizer())
    assert unused_template(base.chat, "alpaca", tiny_tokenizer()) is None  # asked for
    assert unused_template(base.chat, "auto", tiny_tokenizer(chat=False)) is None
    assert unused_template(encoder(tmp_path, tiny_tokenizer()).chat, "auto", tiny_tokenizer()) is None


def test_that_a_teachers_other_template_is_not_used_is_said_once_it_writes_another_text(tmp_path):
    theirs = tiny_tokenizer()
    theirs.chat_template = theirs.chat_template.replace("assistant", "bot")
    base = encoder(tmp_path, tiny_tokenizer()).chat
    said = unused_template(base, "auto", theirs)
    assert said.startswith("student and teacher have different chat templates: the student's is used for both")
    assert unused_template(base, "chat", theirs) == said
    assert unused_template(base, "auto", theirs, "mine.jinja") is None  # chosen
    assert unused_template(base, "auto", tiny_tokenizer(chat=False)) is None
    theirs.chat_template = "{# the same text #}" + tiny_tokenizer().chat_template
    assert unused_template(base, "auto", theirs) is None
    theirs.chat_template = "{{ raise_exception('no') }}"
    assert unused_template(base, "auto", theirs) == said


# -- what it is given --------------------------------------------------------------------------------------------------


def test_variables_reach_the_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKS
    assert prompt_of(encoder(tmp_path, tokenizer)).endswith("assistant\n")
    made = encoder(tmp_path, tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert prompt_of(made).endswith("assistant\n(off)")


def test_a_variable_that_the_template_does_not_read_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKS
    with pytest.raises(
        InputError, match=r"enable_thinkng: .*did you mean enable_thinking\?\); it reads enable_thinking"
    ):
        encoder(tmp_path, tokenizer, chat_template_kwargs={"enable_thinkng": False})
    with pytest.raises(InputError, match="messages: the chat template has no such variable to be given"):
        encoder(tmp_path, tokenizer, chat_template_kwargs={"messages": []})
    with pytest.raises(InputError, match="reads no variables: leave --chat-template-kwargs out"):
        encoder(tmp_path, tiny_tokenizer(), chat_template_kwargs={"enable_thinking": False})


def test_the_system_prompt_is_of_conversations_without_one(tmp_path):
    made = encoder(tmp_path, tiny_tokenizer(), system_prompt="Be brief.")
    assert prompt_of(made).startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user\na")
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    assert "Be brief." not in prompt_of(made, {"messages": turns})


def test_a_template_for_content_in_parts_is_given_parts():
    tokenizer = tiny_tokenizer()
    parts = "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}" + parts + "{{ '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
    )
    [one], _ = encode_all(samples_from([{"prompt": "Hi", "response": "yes"}], "x"), SampleEncoder(tokenizer), **LIMITS)
    assert tokenizer.decode(one.prompt_ids) == "<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(one.response_ids) == "yes<|end|>"


# -- what it refuses ---------------------------------------------------------------------------------------------------

FAULTS = {
    "raise_exception": (REFUSES, "refuses it: no system here"),
    "an undefined name": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ x.y }}{% endif %}{% endfor %}",
        "UndefinedError: 'x' is undefined",
    ),
    "a sum of text and none": (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['name'] + none }}{% endif %}", "fails on it",
    ),
    "a quotient": ("{% if messages[0]['role'] == 'system' %}{{ 1 / 0 }}{% endif %}", "ZeroDivisionError"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_template_refuses_is_said_with_file_and_line(tmp_path, fault):
    start, words = FAULTS[fault]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = start + CHAT_TEMPLATE
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    path = write_jsonl(tmp_path / "train.jsonl", [{"messages": turns[1:]}, {"messages": turns}])
    where = r"train\.jsonl, line 2: the chat template "
    with pytest.raises(InputError, match=where + f".*{words}"):
        encode_all(read_samples(path), SampleEncoder(tokenizer), **LIMITS)
    with pytest.raises(InputError, match=where + f".*{words}"):
        SampleStream(
            source_of(path), SampleEncoder(tokenizer), DataOptions(max_length=900, max_prompt_length=800)
        ).check()


def test_a_template_that_refuses_the_system_prompt_says_whose_it_is(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = REFUSES + CHAT_TEMPLATE
    made = encoder(tmp_path, tokenizer, system_prompt="Be brief.")
    with pytest.raises(InputError, match=r"record 1: .*no system here \(the system message is --system-prompt's\)"):
        prompt_of(made)


def test_a_template_that_refuses_an_order_of_turns():
    tokenizer = tiny_tokenizer()
    order = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    )
    tokenizer.chat_template = order + CHAT_TEMPLATE
    turns = [{"role": role, "content": "a"} for role in ("user", "user", "assistant")]
    with pytest.raises(InputError, match=r"train\.jsonl, record 1: the chat template refuses it: roles must"):
        encode_all(samples_from([{"messages": turns}], "x"), SampleEncoder(tokenizer), **LIMITS)
