"""`pocl-fast inspect`: what it prints of a record, and that it loads no model and writes nothing unasked."""

import re
import shutil
import sys

import pytest
from tiny import save_tiny, tiny_tokenizer, write_jsonl
from tiny_run import run

from pocl_fast.cli import main
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.token_view import token_view
from pocl_fast.inspection.inspected import Inspected, Inspector
from pocl_fast.inspection.shown import columns, visible
from pocl_fast.inspection.terminal import as_text
from pocl_fast.options import RunData
from pocl_fast.records.bad_records import BadRecord
from pocl_fast.records.sources import source_of

RECORDS = [
    {"prompt": "Say <|end|>", "response": "yes 😀\nor no", "id": 7},
    {"prompt": "Say it", "response": "ok"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model without weights, and records."""
    made = tmp_path_factory.mktemp("inspected")
    save_tiny(made / "model")
    for weights in (made / "model").glob("*.safetensors"):
        weights.unlink()
    write_jsonl(made / "train.jsonl", RECORDS)
    return made


def inspect(folder, capsys, *words, status=0, train="train.jsonl"):
    """What the command prints; on stderr where it refuses."""
    capsys.readouterr()
    given = ["inspect", "--train", str(folder / train), "--model", str(folder / "model"), *map(str, words)]
    assert main(given) == status
    said = capsys.readouterr()
    return said.err if status else said.out


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


# -- how it looks ------------------------------------------------------------------------------------------------------


def view_of(text, supervised=None):
    ids = tuple(tiny_tokenizer()(text, split_special_tokens=False).input_ids)
    return token_view(EncodedSample(0, ids[:1], ids[1:], False, supervised or ()), tiny_tokenizer())


def without_codes(text):
    return re.sub(r"\x1b\[[\d;]*m", "", text)


@pytest.mark.parametrize("wide", [20, 41, 100])
def test_lines_fit_the_terminal_and_lose_nothing(wide):
    said = "asked 美是最重要的 " * 9 + "x" * 90 + "\nand\n\nlast<|end|>"
    one = Inspected("f", view_of(said))
    shown = as_text(one, colours=True, wide=wide)
    lines = without_codes(shown).split("\n")[4:]
    assert max(map(columns, lines)) <= wide
    want = "".join(visible(token) for token in one.view.tokens)
    assert "".join(lines).rstrip() == want.replace("\n", "")
    assert [line for line in lines if line.endswith("⏎")]


def test_a_terminal_has_colours_unless_nobody_wants_them(folder, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" not in inspect(folder, capsys)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    said = inspect(folder, capsys)
    assert "\x1b[1;32" in said
    assert "[supervised]" not in said
    monkeypatch.setenv("NO_COLOR", "1")
    said = inspect(folder, capsys)
    assert "\x1b" not in said
    assert "[supervised]" in said


def test_supervised_tokens_in_the_middle_have_parts_of_their_own():
    said = as_text(Inspected("f", view_of("asking", ((1, 2), (4, 5)))), colours=False, wide=80)
    assert "[prompt]\na\n[supervised]\ns\n[context]\nk·i\n[supervised]\nn\n[context]\ng\n" in said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" ", "␣"),
        ("\n", "⏎\n"),
        ("\t", "⇥"),
        ("\r", "␍"),
        ("\x1b", "\\x1b"),
        ("\u202e", "\\u{202e}"),
        ("\u00a0", "\\xa0"),
        ("\u200d", "\\u{200d}"),
        ("<|end|>", "<|end|>"),
        ("é", "é"),
    ],
)
def test_what_would_not_be_seen_has_a_sign(text, shown):
    [only] = view_of("a" + text).tokens[1:]
    assert visible(only) == shown


def test_the_page_is_one_file_and_balanced_and_what_a_record_says_is_no_markup(folder, capsys, tmp_path):
    from html.parser import HTMLParser

    shutil.copytree(folder / "model", tmp_path / "model")
    nasty = "</span></pre><script>alert('x')</script> \" & مرحبا " + "y" * 3000
    train = write_jsonl(tmp_path / "<b>.jsonl", [{"prompt": nasty, "response": nasty, '<i a="': 1}])
    words = ("--html", tmp_path / "p.html", "--max-length", 9000, "--max-prompt-length", 4000)
    assert f"page: {tmp_path / 'p.html'}" in inspect(tmp_path, capsys, *words, train=train.name)
    text = (tmp_path / "p.html").read_text(encoding="utf-8")

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.tokens, self.names = [], [], set()

        def handle_starttag(self, tag, attrs):
            self.names.add(tag)
            if tag != "meta":
                self.open.append(tag)
            if tag == "span" and "title" in dict(attrs):
                self.tokens.append([dict(attrs), ""])

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            if self.open and self.open[-1] == "span" and self.tokens and "pre" in self.open:
                self.tokens[-1][1] += data

    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert not {"script", "b", "i", "link", "img"} & reader.names
    assert not re.search(r"(?:src|href)=|url\(|@import", text)
    said = "".join(token for _, token in reader.tokens)
    assert said.count("</span></pre><script>alert('x')</script>".replace(" ", "␣")) == 2
    supervised = [attributes for attributes, _ in reader.tokens if attributes["class"].startswith("supervised")]
    answer = tiny_tokenizer()(nasty + "<|end|>").input_ids
    ids = [int(one) for attributes in supervised for one in re.findall(r"\d+", attributes["title"].split(";")[0])]
    assert ids == answer
    learns = [attributes for attributes, _ in reader.tokens if "the next token is learned" in attributes["title"]]
    assert len(learns) == len(supervised)
