"""The prompts of the paper's code, for tokenizers without a chat template."""

from __future__ import annotations

from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.samples import Sample
from pocl_fast.templates.answer_span import Split

# The templates of Stanford Alpaca, as in the code of MiniLLM, DistiLLM and POCL.
NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def split(sample: Sample, where: str) -> Split:
    """The sample's text in two. Raises `BadRecord` for what these templates have no place for."""
    if len(sample.messages) > 1:
        raise BadRecord(
            f"{where}: a conversation of several turns needs a tokenizer with a chat template",
            "the Alpaca template has no place for earlier turns",
        )
    if sample.tools or sample.answer_turn.get("tool_calls"):
        raise BadRecord(
            f"{where}: tools and tool calls need a tokenizer with a chat template",
            "the Alpaca template has no place for tools",
        )
    form = WITH_INPUT if sample.input else NO_INPUT
    prompt = form.format(instruction=sample.instruction, input=sample.input)
    return Split(prompt, sample.references[0], ended=False)
