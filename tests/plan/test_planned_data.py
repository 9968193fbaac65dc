"""What a plan says of the data: records, samples, tokens and what was left out, by the tokenizer and by `distill`."""

import itertools
import json
from dataclasses import fields

from tiny import write_jsonl
from tiny_plan import planned, text
from tiny_run import options

from pocl_fast.data.answer_choice import ENDS_EARLIER, STRIPPED
from pocl_fast.data.control_text import KeptAsText
from pocl_fast.data.length_report import LengthReport
from pocl_fast.data.long_prompts import Shortenings
from pocl_fast.models import loading
from pocl_fast.plan.data_plan import NAMES, report_parts
from pocl_fast.templates.decisions import Note


def test_tokens_and_what_was_cut_are_those_of_the_tokenizer(inputs, tmp_path, capsys):
    tokenizer = loading.load_tokenizer(str(inputs / "teacher"))
    records = [{"prompt": "7" * n, "response": "3" * (2 * n)} for n in (1, 2, 3, 4, 5, 40, 200)]
    write_jsonl(tmp_path / "train.jsonl", records)
    words = options(inputs, train=tmp_path / "train.jsonl", long_prompts="skip", stages=1)
    data = planned(capsys, *words)["data"]["train"]

    def size(prompt, response=""):
        said = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True) + response
        return len(tokenizer(text, add_special_tokens=False).input_ids) + bool(response)  # and the end of turn

    whole = [size(r["prompt"], r["response"]) for r in records]
    prompts = [size(r["prompt"]) for r in records]
    fit = [(n, p) for n, p in zip(whole, prompts, strict=True) if p <= 80]
    assert data["samples"] == len(fit) < data["records"] == 7
    assert data["tokens"] == sum(min(n, 96) for n, _ in fit)
    assert data["supervised_tokens"] == sum(min(n, 96) - p for n, p in fit)
    cut = [n - 96 for n, _ in fit if n > 96]
    lengths = data["lengths"]
    assert lengths["by_length_limit"] == {"samples": len(cut), "tokens": sum(cut)}
    gone = [n for n, p in zip(whole, prompts, strict=True) if p > 80]
    assert lengths["by_prompt_limit"] == {"samples": len(gone), "tokens": sum(gone)}
    assert (lengths["prompts"]["limit"], lengths["samples"]["limit"]) == (80, 96)
    assert len(cut) == len(gone) == 1
    assert data["report"] == {"skipped": 1, "truncated": 1}
    assert (lengths["prompts"]["quantiles"]["100"], lengths["samples"]["quantiles"]["100"]) == (
        max(prompts),
        max(whole),
    )
    assert data["answers"]["100"] == max(min(n, 96) - p for n, p in fit)


def test_what_is_left_out_and_what_a_limit_takes_is_counted_by_record(inputs, tmp_path, capsys):
    """A character is a token."""

    def said(*texts):
        roles = itertools.cycle(("user", "assistant"))
        return {"messages": [{"role": role, "content": content} for role, content in zip(roles, texts, strict=False)]}

    records = [
        said("1", "2"),
        said("1"),  # no answer
        said("<|end|>", "2"),  # a control token
        said("1", "2" * 200),  # cut
        said("7" * 40, "3", "7" * 40, "3"),  # the first exchange goes
        said("8" * 300, "2"),  # its beginning goes
    ]
    given = {"train": tmp_path / "train.jsonl", "bad_records": "skip", "long_prompts": "truncate-left", "stages": 1}
    given["train_on"] = "last"
    write_jsonl(given["train"], records)
    data = planned(capsys, *options(inputs, **given))["data"]["train"]
    assert (data["records"], data["samples"], data["held_out"]) == (6, 5, 0)
    report = data["report"]
    assert sum(report.pop("bad").values()) == 1
    assert report == {"shortened": 2, "turns_dropped": 2, "questions_cut": 1, "truncated": 1, "control": 1}
    words = options(inputs, **given | {"max_length": 511, "max_prompt_length": 510})
    whole = planned(capsys, *words)["data"]["train"]
    taken = [data["lengths"][name] for name in ("by_prompt_limit", "by_length_limit")]
    assert whole["tokens"] - data["tokens"] == sum(one["tokens"] for one in taken)
    assert [one["samples"] for one in taken] == [2, 1]
    shown = text(capsys, *options(inputs, **given))
    assert "  prompts shortened to the limit               2\n" in shown
    assert f"  lost to --max-prompt-length 80               {taken[0]['tokens']} tokens of 2\n" in shown


def test_every_part_of_a_report_has_a_name_and_is_counted():
    """So that a part that is added later is shown too."""
    report = LengthReport(
        9,
        skipped=(1, 2),
        truncated=(3,),
        unused=(("tools", 4),),
        unwritten=(("names", (5, 6)),),
        untrained=(7,),
        notes=(Note(STRIPPED, 3, (8,)), Note(ENDS_EARLIER, 5, (9, 10))),
        bad=(("not JSON", (11, 12)),),
        control=KeptAsText((13,), "<|end|>"),
        shortened=Shortenings((14, 15), turns=6, cut=1),
    )
    empty = LengthReport(9)
    known = {field.name for field in fields(LengthReport)} - {"samples", "unit", "before"}
    assert all(getattr(report, name) != getattr(empty, name) for name in known)
    parts = report_parts(report)
    assert parts.keys() == NAMES.keys()
    assert parts["notes"] == {
        "answers from which reasoning was taken out": 3,
        "conversations that end earlier for --max-length": 2,
        "answers left out so": 5,
    }
    assert parts["bad"] == {"not JSON": 2}
    assert parts["unwritten"] == {"names": 2}
    assert report_parts(empty) == {}


def test_samples_are_held_out_of_the_file_as_distill_does(inputs, capsys):
    plan = planned(capsys, *options(inputs, dev=None))
    train, dev = plan["data"]["train"], plan["data"]["dev"]
    assert dev["samples"] == dev["records"] == train["held_out"] == 2
    assert train["records"] == train["samples"] + 2 == 24
    assert plan["steps"]["stages"][-1]["samples"] == 22
    assert sum(train["lengths"]["samples"]["counts"]) == 24  # of the file
    assert dev["lengths"] is None
    assert train["lengths"]["by_prompt_limit"]["tokens"] == 0
    said = text(capsys, *options(inputs, dev=None))
    assert "held out to evaluate with                    2\n" in said
    assert "missing" not in said


def test_what_is_counted_is_shown_as_a_number(inputs, tmp_path, capsys):
    lines = (inputs / "train.jsonl").read_text().splitlines()
    marked = {"instruction": "2+2?", "output": "4<|end|>"}
    write_jsonl(tmp_path / "marked.jsonl", [json.loads(line) for line in lines] + [marked])
    words = options(inputs, train=tmp_path / "marked.jsonl")
    assert planned(capsys, *words)["data"]["train"]["report"] == {"control": 1}
    assert "samples with control tokens kept as text     1\n" in text(capsys, *words)
