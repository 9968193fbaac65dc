"""Chat templates in the shapes that people have, and tokenizers and conversations for them."""

from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.records.samples import Sample

# -- templates ---------------------------------------------------------------------------------------------------------

HEADER = "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
TURNS = "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|eot|>\n' }}{% endfor %}"
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
SHAPES = {  # name: template, how the prompt of "Hi" ends, the response "yes", the token that ends it
    "Phi-3: eos behind the whole text": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|eot|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "Hi<|eot|>\n<|assistant|>\n", "yes<|eot|>", "<|eot|>",
    ),
    "GLM-4: no end of turn": (
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|user|>\nHi<|assistant|>\n", "yes<|end|>", "<|end|>",
    ),
    "Mistral: no header, eos": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        "[INST] Hi [/INST]", " yes<|end|>", "<|end|>",
    ),
    "Zephyr: eos, then a line end": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "Hi<|end|>\n<|assistant|>\n", "yes<|end|>", "<|end|>",
    ),
    "Gemma: another role, stripped": (
        "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<|start|>' + role + '\n' + m['content'] | trim + '<|eot|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}",
        "Hi<|eot|>\n<|start|>model\n", "yes<|eot|>", "<|eot|>",
    ),
    "Llama 3: two line ends in the header": (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}",
        "Hi<|eot|><|start|>assistant\n\n", "yes<|eot|>", "<|eot|>",
    ),
    "Qwen3: an empty block of reasoning before a finished answer": (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|eot|>\n' }}{% endfor %}" + HEADER,
        "Hi<|eot|>\n<|start|>assistant\n", "<think>\n\n</think>\n\nyes<|eot|>", "<|eot|>",
    ),
    "Vicuna: plain text around, eos behind": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "USER: Hi\nASSISTANT:", " yes<|end|>", "<|end|>",
    ),
    "an end of turn in plain text": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "user: Hi</turn>\nassistant: ", "yes</turn><|end|>", "<|end|>",
    ),
    "nothing but line ends": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "user: Hi\n\nassistant: ", "yes<|end|>", "<|end|>",
    ),
    "eos behind the whole text is all there is": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% else %}{{ eos_token }}{% endif %}",
        "user: Hi\nassistant: ", "yes\n<|end|>", "<|end|>",
    ),
    "the header is never asked for": (TURNS, "Hi<|eot|>\n<|start|>assistant\n", "yes<|eot|>", "<|eot|>"),
    "the header is always there": (
        TURNS + "{{ '<|start|>assistant\n' }}", "Hi<|eot|>\n<|start|>assistant\n", "yes<|eot|>", "<|eot|>",
    ),
    "the header is always there, no end of turn": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}{{ '<|assistant|>\n' }}",
        "<|user|>\nHi<|assistant|>\n", "yes<|end|>", "<|end|>",
    ),
    "gpt-oss: a last turn ends otherwise, the channel is the answer's": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|start|>user<|msg|>' + m['content'] + '<|eot|>' }}"
        "{% elif loop.last and not add_generation_prompt %}{{ '<|start|>assistant<|ch|>final<|msg|>' + m['content'] }}"
        "{{ '<|return|>' }}{% else %}{{ '<|start|>assistant<|ch|>final<|msg|>' + m['content'] + '<|eot|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        "Hi<|eot|><|start|>assistant", "<|ch|>final<|msg|>yes<|return|>", "<|return|>",
    ),
    "eos behind the whole text, before the next header too": (
        TURNS + "{{ eos_token }}" + HEADER, "Hi<|eot|>\n<|end|><|start|>assistant\n", "yes<|eot|>", "<|eot|>",
    ),
    "Llama 2: a blank before eos": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        "[INST] Hi [/INST]", " yes <|end|>", "<|end|>",
    ),
    "a default system message": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|start|>system\nYou help.<|eot|>\n' }}{% endif %}"
        + TURNS + HEADER,
        "Hi<|eot|>\n<|start|>assistant\n", "yes<|eot|>", "<|eot|>",
    ),
    "marks around answer and end": (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|eot|>\n' }}{% endgeneration %}{% else %}{{ m['content'] + '<|eot|>\n' }}{% endif %}"
        "{% endfor %}" + HEADER,
        "Hi<|eot|>\n<|start|>assistant\n", "yes<|eot|>", "<|eot|>",
    ),
    "marks behind an empty block of reasoning": (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{{ '<think></think>' }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|eot|>\n' }}{% else %}"
        "{{ m['content'] + '<|eot|>\n' }}{% endif %}{% endfor %}" + HEADER,
        "<|start|>assistant\n<think></think>", "yes<|eot|>", "<|eot|>",
    ),
}  # fmt: skip
QWEN3 = (
    "{%- if messages[0].role == 'system' %}{{- '<|start|>system\n' + messages[0].content + '<|eot|>\n' }}{%- endif %}"
    "{%- set ns = namespace(looking=true, last=messages|length - 1) %}{%- for m in messages[::-1] %}"
    "{%- if ns.looking and m.role == 'user' %}{%- set ns.looking = false %}"
    "{%- set ns.last = messages|length - 1 - loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{%- set content = m.content %}{%- if m.role == 'user' %}{{- '<|start|>user\n' + content + '<|eot|>\n' }}"
    "{%- elif m.role == 'assistant' %}{%- set thought = '' %}{%- if m.reasoning_content is string %}"
    "{%- set thought = m.reasoning_content %}{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- content }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}{%- if (loop.first and content) or not loop.first %}{{- '\n' }}{%- endif %}"
    "{{- '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{%- endfor %}{{- '<|eot|>\n' }}"
    "{%- elif m.role == 'tool' %}{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|eot|>\n' }}{%- endif %}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)


# -- tokenizers --------------------------------------------------------------------------------------------------------


def tokenizer_of(template, *, special=True):
    tokenizer = tiny_tokenizer()
    tokens = ["<|eot|>", "<|return|>", "<|user|>", "<|assistant|>"]
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", *tokens]})
    else:
        tokenizer.add_tokens(tokens)
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece(scheme):
    """A tokenizer that puts a blank before the first word, or before each piece of text."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "▁", "▁b", "▁Hi", "Hi", "b", *map(chr, range(33, 127)), "\n"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "b"), ("H", "i"), ("▁", "Hi")], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


class SlowTokenizer(PreTrainedTokenizer):
    """Every letter a token, in Python: it does not tell which characters a token stands for."""

    def __init__(self, **names):
        self._letters = {chr(i): i for i in range(128)}
        super().__init__(**names)

    @property
    def vocab_size(self):
        return 128

    def get_vocab(self):
        return self._letters | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return self._letters.get(token, 0)

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


# -- conversations -----------------------------------------------------------------------------------------------------

WIDE = {"max_length": 9000, "max_prompt_length": 8000}
TALK = [
    ("one", "yes"),
    ("Hi", "yes"),
    ("a\n\nb", "yes\n\n"),
    ("user", "assistant"),
    ("1", " 2 "),
    ("Hi", "ok.\n"),
    ("e", "n"),
]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sum", "arguments": {"a": 1}}}]}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def calling(number, content=""):
    return {**CALL, "content": content, "tool_calls": [{"function": {"name": "sum", "arguments": {"a": number}}}]}


def sample_of(turns, **given):
    *before, last = turns
    earlier = tuple(i for i, turn in enumerate(before) if turn["role"] == "assistant")
    answer = last if len(last) > 2 else None
    text = last["content"] or "call"
    return Sample(0, 1, tuple(before), (text,), before[-1]["content"], answer=answer, earlier=earlier, **given)


def conversation(pairs=TALK, system=False):
    """A sample whose answers are all trained on."""
    turns = [{"role": "system", "content": "Be brief."}] if system else []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return sample_of(turns)


def answers(tokenizer, sample, **options):
    """Each answer's tokens out of one pass, and each as the last one of its own conversation."""
    whole = SampleEncoder(tokenizer, **options).encode(sample, **WIDE)
    alone = SampleEncoder(tokenizer, train_on="last", **options)
    ends = [sample.up_to(place) for place in sample.earlier]
    last = [alone.encode(one, **WIDE) for one in (*ends, sample)]
    assert [whole.ids[start - 1] for start, _ in whole.spans] == [one.prompt_ids[-1] for one in last]  # the header's
    return [whole.ids[start:end] for start, end in whole.spans], [one.response_ids for one in last]


AGENT = [
    said("system", "Add."), said("user", "1?"), calling(1), said("tool", 'is "1"'), said("assistant", "It is 1."),
    said("user", "2, 3?"), calling(2, "First 2."), said("tool", "2"), calling(33), said("tool", "3"), said("tool", "!"),
    said("assistant", "2, 3."), said("user", "and?"), calling(4),
]  # fmt: skip
