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
    if lacking := no_place_for(sample):
        raise BadRecord(f"{where}: {lacking}: take a tokenizer with a chat template, or leave this record out", lacking)
    form = WITH_INPUT if sample.input else NO_INPUT
    prompt = form.format(instruction=sample.instruction, input=sample.input)
    return Split(prompt, sample.references[0], ended=False)


def no_place_for(sample: Sample) -> str:
    """What of a sample these templates do not show, in words; empty where they show all of it."""
    if len(sample.messages) == 1 and not sample.tools and sample.answer is None:
        return ""
    *before, asked = sample.messages
    told = [turn["role"] in ("system", "developer") for turn in before]
    lacking = {
        "tools": bool(sample.tools),
        "system messages": any(told),
        "earlier turns": not all(told),
        "tool calls": any(turn.get("tool_calls") for turn in (*before, asked, sample.answer_turn)),
    }
    what = ", ".join(name for name, has in lacking.items() if has)
    return f"the Alpaca template has no place for {what}" if what else ""
