"""How long samples are, and what the limits take: one answer in the plan, in the report and by the tokenizer."""

import json
import re

import pytest
from tiny import tiny_tokenizer, write_jsonl
from tiny_run import make_inputs, options, read_json, run, select

from pocl_fast.cli import main

LONGEST, LONGEST_PROMPT = 120, 60


def thinks(length):
    """An answer of so many characters, which are tokens."""
    return f"<think>{'t' * (length - 15)}</think>"


def exchange(question, answer):
    return [{"role": "user", "content": "q" * question}, {"role": "assistant", "content": answer}]


RECORDS = {
    "fits": exchange(3, thinks(20)),
    "is cut": exchange(3, thinks(200)),
    "has a long prompt": exchange(150, thinks(20)),
    "has both": exchange(160, thinks(210)),
    "is not trained on": exchange(3, "no reasoning"),
    "ends earlier": exchange(3, thinks(50)) + exchange(100, thinks(30)),
}


def counted(turns, *, asked=False):
    """The tokens of turns, without what is behind the last one's end."""
    text = tiny_tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=asked)
    return len(tiny_tokenizer()(text.rstrip("\n") if not asked else text, add_special_tokens=False).input_ids)


def recounted(rule):
    """The tokens before the limits, and what each of them takes: samples and tokens."""
    tokens, by_prompt, by_length = 0, [], []
    for name, turns in RECORDS.items():
        if name == "is not trained on":
            continue
        prompt, whole = counted(turns[:1], asked=True), counted(turns)
        tokens += whole
        if prompt > LONGEST_PROMPT and rule == "skip":
            by_prompt.append(whole)
            continue
        if prompt > LONGEST_PROMPT:
            by_prompt.append(prompt - LONGEST_PROMPT)
            whole -= prompt - LONGEST_PROMPT
        kept = counted(turns[:2]) if name == "ends earlier" else min(whole, LONGEST)
        if whole > kept:
            by_length.append(whole - kept)
    return tokens, (len(by_prompt), sum(by_prompt)), (len(by_length), sum(by_length))


@pytest.mark.parametrize("rule", ["skip", "truncate-left"])
def test_plan_report_and_tokenizer_agree_on_what_the_limits_take(tmp_path, capsys, rule):
    inputs, output = make_inputs(tmp_path), tmp_path / "run"
    write_jsonl(inputs / "train.jsonl", [{"messages": turns} for turns in RECORDS.values()])
    limits = {"max_length": LONGEST, "max_prompt_length": LONGEST_PROMPT, "long_prompts": rule, "reasoning": "only"}
    words = options(inputs, dev=inputs / "train.jsonl", stages=1, **limits)
    capsys.readouterr()  # of libraries that were imported for the models
    assert main(["plan", "--json", *words]) == 0
    planned = json.loads(capsys.readouterr().out)["data"]["train"]
    assert run("measure", output, *select(words, "measure")) == 0
    assert run("report", output) == 0
    assert planned["lengths"] == read_json(output / "steps.json")["measure"]["sample_lengths"]

    tokens, by_prompt, by_length = recounted(rule)
    assert counted(RECORDS["ends earlier"][:2]) < LONGEST < counted(RECORDS["ends earlier"])
    assert by_prompt[0] == 2
    assert by_length[0] == (2 if rule == "skip" else 3)
    lengths = planned["lengths"]
    assert lengths["tokens"] == tokens
    assert tuple(lengths["by_prompt_limit"].values()) == by_prompt
    assert tuple(lengths["by_length_limit"].values()) == by_length
    assert planned["tokens"] == tokens - by_prompt[1] - by_length[1]
    assert lengths["samples"]["quantiles"]["100"] == max(map(counted, RECORDS.values()))

    page = re.sub(r"<[^>]+>", " ", (output / "report.html").read_text(encoding="utf-8"))
    assert f"{by_prompt[1]} to --max-prompt-length (2 samples)" in page
    assert f"{by_length[1]} to --max-length ({by_length[0]} samples)" in page
    assert main(["plan", *words]) == 0
    table = capsys.readouterr().out
    assert re.search(rf"lost to --max-prompt-length {LONGEST_PROMPT} +{by_prompt[1]} tokens of 2\n", table)
    assert re.search(rf"lost to --max-length {LONGEST} +{by_length[1]} tokens of {by_length[0]}\n", table)
