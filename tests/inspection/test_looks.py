"""How a sample looks in a terminal and on a page: lines, colours, signs for what would not be seen, markup."""

import re
import shutil
import sys

import pytest
from tiny import tiny_tokenizer, write_jsonl
from tiny_inspection import inspect

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.token_view import token_view
from pocl_fast.inspection.inspected import Inspected
from pocl_fast.inspection.shown import columns, visible
from pocl_fast.inspection.terminal import as_text


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
