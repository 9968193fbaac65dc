"""`pocl-fast inspect`: what it prints of a record, and that it loads no model and writes nothing unasked."""

import re
import shutil

import pytest
from tiny import tiny_tokenizer, write_jsonl
from tiny_inspection import RECORDS, inspect
from tiny_run import run

from pocl_fast.cli import main
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.inspection.inspected import Inspector
from pocl_fast.inspection.terminal import as_text
from pocl_fast.options.run import RunData
from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.sources import source_of


def part(said, kind):
    """What is printed of a kind, without the signs around and between tokens."""
    found = re.search(rf"^\[{kind}\]\n(.*?)\n(?=\n|\[)", said, re.MULTILINE | re.DOTALL)
    return re.sub("[·⟦⟧\n]", "", found[1]).replace("␣", " ").replace("⏎", "\n")


def value(said, name):
    return re.search(rf"^{name} +(.*)$", said, re.MULTILINE)[1]


def test_a_record_is_shown_by_prompt_and_answer_without_weights_and_nothing_is_written(folder, capsys):
    before = sorted(folder.rglob("*"))
    said = inspect(folder, capsys)
    assert said.startswith(f"{folder / 'train.jsonl'}, line 1\n")
    answer = tiny_tokenizer()("yes 😀\nor no<|end|>").input_ids
    assert part(said, "prompt").endswith("\n<|start|>assistant\n")
    assert part(said, "supervised") == "yes 😀\nor no<|end|>"
    assert value(said, "supervised") == f"{len(answer)} tokens"
    assert value(said, "end of answer") == "<|end|> (id 258)"
    assert value(said, "template") == "the tokenizer's chat template 'default'"
    assert value(said, "note") == "fields not used: id (1 record)"
    assert "\ufffd" not in said
    assert sorted(folder.rglob("*")) == before


def test_the_alpaca_template_and_the_turns_of_a_conversation_are_named(folder, capsys):
    said = inspect(folder, capsys, "--template", "alpaca")
    assert value(said, "template") == "the Alpaca template of the paper's code"
    assert part(said, "prompt").endswith("### Response:\n")
    said = inspect(folder, capsys, "--line", 3, "--train-on", "last")
    assert value(said, "trained on") == "the last of 4 turns"
    assert part(said, "supervised") == "b<|end|>"


def test_ids_list_each_token_with_its_place(folder, capsys):
    said = inspect(folder, capsys, "--line", 2, "--ids")
    rows = [line.split() for line in said.splitlines() if re.match(r" +\d+ +\d+  ", line)]
    ids = tiny_tokenizer()("<|start|>user\nSay it<|end|>\n<|start|>assistant\nok<|end|>").input_ids
    assert [(int(row[0]), int(row[1])) for row in rows] == list(enumerate(ids))
    assert [row[2] for row in rows][-3:] == ["supervised"] * 3


def test_what_the_limits_cut_is_shown_as_cut(folder, capsys):
    most = int(value(inspect(folder, capsys), "kept").split()[0]) - 5
    said = inspect(folder, capsys, "--max-length", most, "--max-prompt-length", most - 1)
    assert part(said, "supervised") + part(said, "cut") == "yes 😀\nor no<|end|>"
    assert (value(said, "cut"), part(said, "cut")) == ("5 tokens", "r no<|end|>")
    assert value(said, "kept").startswith(f"{most} tokens (--max-length {most}, ")
    assert value(said, "end of answer") == "none: the answer is cut before its end"
    assert f"--max-length {most} cuts 5 tokens off the end" in said


@pytest.mark.parametrize(("policy", "does"), [("error", "a run stops before it begins"), ("skip", "it is left out")])
def test_a_sample_with_a_long_prompt_is_shown_with_the_reason(folder, capsys, policy, does):
    said = inspect(folder, capsys, "--max-prompt-length", 20, "--long-prompts", policy)
    assert re.search(
        rf"^not trained on: its prompt has \d+ tokens, over --max-prompt-length 20: {does} "
        rf"\(--long-prompts {policy}\)$",
        said,
        re.MULTILINE,
    )
    assert value(said, "supervised") == "0 tokens"
    assert part(said, "cut").endswith("or no<|end|>")


def test_a_bad_record_is_shown_where_a_run_leaves_it_out(folder, monkeypatch):
    def bad(*_, **__):
        raise BadRecord("train.jsonl, line 2: it is none", "no record")

    monkeypatch.setattr("pocl_fast.inspection.inspected.iter_samples", bad)
    source, encoder = source_of(folder / "train.jsonl"), SampleEncoder(tiny_tokenizer())
    seen = Inspector(source, encoder, RunData(bad_records="skip")).look((2, {"x": "é"}))
    assert (seen.left_out, seen.record) == ("train.jsonl, line 2: it is none (--bad-records skip)", '{"x": "é"}')
    assert '{"x": "é"}' in as_text(seen, colours=False, wide=80)
    with pytest.raises(BadRecord, match="it is none"):
        Inspector(source, encoder, RunData()).look((2, {}))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--line", 4), "--line 4: FILE has no such line, its 3 records end with line 3"),
        (("--line", 0), "--line 0: FILE has no record there; the next to it are 1"),
        (("--count", 0), "--count must be at least 1, got 0"),
        (("--train", "nowhere.jsonl"), "cannot read nowhere.jsonl: No such file or directory"),
        (("--model", "/nowhere/model"), "no such model folder: /nowhere/model"),
        (("--output", "/nowhere"), "--output /nowhere holds no run"),
        (("--html", "/nowhere/page.html"), "--html /nowhere/page.html: there is no folder /nowhere"),
        (("--max-length", 8), "--max-prompt-length (256) must be at least 1 and below --max-length (8)"),
    ],
)
def test_what_is_wrong_is_one_message(folder, capsys, words, says):
    said = inspect(folder, capsys, *words, status=2)
    assert says.replace("FILE", str(folder / "train.jsonl")) in said
    assert said.count("\n") == 1


def test_a_bad_file_a_bad_record_and_a_refusing_template_are_a_runs_errors(folder, capsys, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    assert ', line 1: field "response" is missing' in inspect(tmp_path, capsys, status=2, train="bad.jsonl")
    assert ", line 2: not JSON" in inspect(tmp_path, capsys, "--line", 2, status=2, train="bad.jsonl")
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no such talk') }}")
    words = ("--chat-template", tmp_path / "t.jinja")
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    assert ", line 1: the chat template refuses it: no such talk" in inspect(tmp_path, capsys, *words, status=2)
    assert main(["inspect", "--train", str(tmp_path / "train.jsonl")]) == 2
    assert "give --model" in capsys.readouterr().err
    assert main(["inspect", "--model", str(tmp_path / "model")]) == 2
    assert "--train is missing" in capsys.readouterr().err


def test_the_options_of_a_run_and_of_a_file_are_taken(folder, finished, capsys, tmp_path):
    inputs, output = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    capsys.readouterr()
    assert run("inspect", output, "--line", "7", "--count", "2") == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if ".jsonl, line " in line] == [
        f"{inputs / 'train.jsonl'}, line {number}" for number in (7, 8)
    ]
    assert "(--max-length 96, --max-prompt-length 80)" in said
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    (tmp_path / "c.yaml").write_text(f"train: {folder / 'train.jsonl'}\nteacher: {folder / 'model'}\nmax_length: 300\n")
    assert main(["inspect", "--config", str(tmp_path / "c.yaml")]) == 0
    assert "(--max-length 300, " in capsys.readouterr().out


# -- conversations, and what options and limits take of them --------------------------------------------------------


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


TURNS = [turn("system", "s"), *(turn(role, f"{role[0]}{n}" * n) for n in (1, 2, 3) for role in ("user", "assistant"))]


def written(turns):
    """The tiny template's text of some turns."""
    return "".join(f"<|start|>{one['role']}\n{one['content']}<|end|>\n" for one in turns)


@pytest.fixture
def seen(folder, capsys, tmp_path):
    """What is printed of one record; by the options that are given."""

    def shown(record, *words):
        write_jsonl(tmp_path / "train.jsonl", [record])
        capsys.readouterr()
        assert (
            main(["inspect", "--train", str(tmp_path / "train.jsonl"), "--model", str(folder / "model"), *words]) == 0
        )
        return capsys.readouterr().out

    return shown


def parts(said):
    """Kinds and texts, in order."""
    found = re.findall(r"^\[(\w+)\]\n(.*?)\n(?=\n|\[)", said, re.MULTILINE | re.DOTALL)
    return [(kind, re.sub("[·⟦⟧\n]", "", text).replace("␣", " ").replace("⏎", "\n")) for kind, text in found]


ASKS = "<|start|>assistant\n"


def test_each_answer_is_shown_as_trained_on_with_its_end_and_what_is_between_as_read_along(seen):
    said = seen({"messages": TURNS})
    between = [f"\n{written(TURNS[place : place + 1])}{ASKS}" for place in (3, 5)]
    assert parts(said) == [
        ("prompt", written(TURNS[:2]) + ASKS),
        ("supervised", "a1<|end|>"),
        ("context", between[0]),
        ("supervised", "a2a2<|end|>"),
        ("context", between[1]),
        ("supervised", "a3a3a3<|end|>"),
    ]
    assert value(said, "trained on") == "turns 3, 5, 7 of 7"
    assert value(said, "end of answer") == "<|end|> (id 258)"


def test_a_conversation_over_the_limit_shows_what_was_cut_and_which_turns_went(seen):
    upto = len(tiny_tokenizer()(written(TURNS[:5])).input_ids)  # the third question begins there
    said = seen({"messages": TURNS}, "--max-length", str(upto + 5), "--max-prompt-length", "60")
    assert parts(said)[-1] == ("cut", f"\n{written(TURNS[5:])}".rstrip("\n"))
    assert value(said, "trained on") == "turns 3, 5 of 7"
    gone = len(tiny_tokenizer()(f"\n{written(TURNS[5:])}".rstrip("\n")).input_ids)
    assert value(said, "note") == f"--max-length {upto + 5} cuts {gone} tokens off the end: turns 6, 7"


def test_a_prompt_that_is_shortened_shows_the_turns_and_the_beginning_that_went(seen):
    left = [TURNS[0], turn("user", "u3")]
    most = len(tiny_tokenizer()(written(left) + ASKS).input_ids)
    words = ("--train-on", "last", "--long-prompts", "truncate-left", "--max-prompt-length", str(most))
    said = seen({"messages": TURNS}, *words)
    kept = [text for kind, text in parts(said) if kind == "prompt"]
    assert "".join(kept) == written(left) + ASKS
    whole = "".join(text for _, text in parts(said))
    assert whole == written(TURNS).rstrip("\n")
    cut = value(said, "cut")
    assert value(said, "note") == (
        f"--long-prompts truncate-left takes {cut} out of the prompt: turns 2 to 5 and the beginning of what is asked"
    )
    assert value(said, "trained on") == "the last of 7 turns"


def test_what_no_rule_makes_short_enough_is_shown_with_the_reason(seen):
    said = seen({"messages": TURNS}, "--long-prompts", "truncate-left", "--max-prompt-length", "9")
    assert "over it even with one sign left of its question: a run stops before it begins" in said
    assert [kind for kind, _ in parts(said)] == ["cut"]
    assert "trained on  " not in said


def test_a_control_token_in_text_is_shown_as_text_and_said(seen):
    said = seen({"prompt": "Is <|end|> one?", "response": "<|end|>"})
    assert said.count("⟦<|end|>⟧") == 2
    assert part(said, "supervised") == "<|end|>" * 2
    assert value(said, "supervised") == f"{len('<|end|>') + 1} tokens"
    assert value(said, "note").startswith(
        "1 sample has a control token in its text, <|end|> (line 1): it is kept as text"
    )
    said = seen({"prompt": "Is <|end|> one?", "response": "a"}, "--special-tokens", "parse")
    assert said.count("⟦<|end|>⟧") == 3
    assert "note" not in said


def test_reasoning_is_shown_as_it_is_trained_on(seen):
    thinks = {"messages": [turn("user", "q"), turn("assistant", "<think>t</think>a")]}
    said = seen(thinks, "--reasoning", "only")
    assert parts(said)[1:] == [("supervised", "<think>t</think>"), ("context", "a<|end|>")]
    assert value(said, "end of answer") == "none: --reasoning only trains on what is before it"
    said = seen(thinks, "--reasoning", "strip")
    assert parts(said)[1:] == [("supervised", "a<|end|>")]
    assert value(said, "note") == "answers from which reasoning was taken out: 1 (line 1)"
    said = seen({"messages": [turn("user", "q"), turn("assistant", "a")]}, "--reasoning", "only")
    assert "not trained on: no answer has reasoning in the prompt's format: it is left out (--reasoning only)" in said
    assert parts(said) == [("cut", f"{written([turn('user', 'q')])}{ASKS}a<|end|>")]


def test_a_record_that_is_none_has_its_reason_and_rows_are_counted_as_rows(folder, capsys, tmp_path):
    import pandas

    (folder / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    said = inspect(folder, capsys, "--bad-records", "skip", "--line", 2, train="bad.jsonl")
    assert f"not trained on: {folder / 'bad.jsonl'}, line 2: not JSON" in said
    pandas.DataFrame(RECORDS[:2]).to_parquet(folder / "train.parquet")
    assert inspect(folder, capsys, "--line", 2, train="train.parquet").startswith(
        f"{folder / 'train.parquet'}, row 2\n"
    )
    assert "has no such row, its 2 records end with row 2" in inspect(
        folder, capsys, "--line", 3, status=2, train="train.parquet"
    )


def test_a_record_may_lack_a_named_field_that_another_one_has(folder, capsys):
    write_jsonl(folder / "named.jsonl", [{"q": "a", "a": "b", "s": "c"}, {"q": "d", "a": "e"}])
    names = ("--fields", "prompt=q", "response=a", "system=s")
    said = inspect(folder, capsys, "--line", 2, *names, train="named.jsonl")
    assert part(said, "supervised") == "e<|end|>"
