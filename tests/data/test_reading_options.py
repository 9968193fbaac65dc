"""Every option of reading beside every other: a stream gives what the whole file gives, and each sample what it gives
alone."""

from collections import Counter
from dataclasses import replace

import pytest
from template_shapes import HEADER, QWEN3, TURNS, said, tokenizer_of
from tiny import write_jsonl

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import fit_all
from pocl_fast.data.stream import SampleStream
from pocl_fast.options.data import DataOptions
from pocl_fast.records.bad_records import BadRecords
from pocl_fast.records.samples import iter_samples, read_samples
from pocl_fast.records.sources import source_of
from pocl_fast.system import resumable_table

THOUGHT = "<think>\nso\n</think>\n\n"
# "no" is refused wherever it is, "second" as the first turn, "fin" as the last one
REFUSING = (
    "{% if messages[0].content.endswith('second') or messages[-1].content == 'fin' %}{{ raise_exception('so') }}"
    "{% endif %}{% for m in messages if m.content == 'no' %}{{ raise_exception('no') }}{% endfor %}"
)
TEMPLATES = {"turns": TURNS + HEADER, "reasoning of the last": QWEN3, "refusing": REFUSING + TURNS + HEADER}


def talk(*turns, system=""):
    """A record whose turns are by turns of the user and of the assistant."""
    roles = ("user", "assistant")
    messages = [said(roles[place % 2], text) for place, text in enumerate(turns)]
    return {"messages": [said("system", system), *messages] if system else messages}


GOOD = talk("a", f"{THOUGHT}yes")  # fits whatever is asked for
RECORDS = [
    GOOD,
    talk("one", "yes", "two", f"{THOUGHT}yes <|eot|> more", "three", "b" * 300),
    talk("long " * 60 + "end<|eot|>", f"{THOUGHT}so <|start|>", "short", f"{THOUGHT}b"),
    talk("first " * 60, f"{THOUGHT}1", "second", f"{THOUGHT}2"),
    "not JSON",
    talk("a", "no", "b", f"{THOUGHT}c"),
    talk("a", f"{THOUGHT}fin", "b " * 100, f"{THOUGHT}c", "d", f"{THOUGHT}e"),
    talk("a", "fin", "b " * 100, f"{THOUGHT}c"),
    {"messages": [said("user", "q")]},
    talk("q " * 100, f"{THOUGHT}a", system="s " * 20),
    talk("q", "<think>\nso\n</think>", "q", f"{THOUGHT}a"),
    talk("e\u0301 <|eot|>" * 40, f"<think>\n<|eot|> so\n</think>\n\n{'é' * 200}"),
    talk("x", f"{THOUGHT}<|eot|>", "y" * 150, f"{THOUGHT}z", "u", f"<think>\n{'v' * 200}\n</think>\n\nw"),
    talk("plain", "answer"),
    GOOD,
]


def summed(reports):
    """What several reports say of lines, as one would, without the sample that all share."""
    lines = {name: set() for name in ("skipped", "truncated", "untrained", "shortened", "control")}
    counts, kinds = Counter(), Counter()
    for report in reports:
        for name in ("skipped", "truncated", "untrained"):
            lines[name].update(getattr(report, name))
        lines["shortened"].update(report.shortened.lines)
        lines["control"].update(report.control.lines)
        kinds.update((kind, line) for kind, numbers in (*report.bad, *report.unwritten) for line in numbers)
        counts.update({(what, numbers): count for what, count, numbers in report.notes if len(reports) == 1})
    return lines, {key for key in kinds if key[1] > 1}


@pytest.mark.pairwise
@pytest.mark.parametrize("piece", [3, 4096])
@pytest.mark.parametrize("limits", [(400, 200), (240, 120), (150, 120)], ids=str)
@pytest.mark.parametrize("long_prompts", ["skip", "truncate-left"])
@pytest.mark.parametrize("special_tokens", ["text", "parse"])
@pytest.mark.parametrize("reasoning", ["keep", "strip", "only"])
@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_stream_the_whole_file_and_each_sample_alone_give_the_same(
    tmp_path, monkeypatch, template, train_on, reasoning, special_tokens, long_prompts, limits, piece
):
    monkeypatch.setattr(resumable_table, "PIECE", piece)
    lengths = dict(zip(("max_length", "max_prompt_length"), limits, strict=True))
    path = write_jsonl(tmp_path / "a.jsonl", [one for one in RECORDS if one != "not JSON"])
    lines = path.read_text().splitlines()
    place = RECORDS.index("not JSON")
    path.write_text("\n".join([*lines[:place], "not JSON", *lines[place:]]) + "\n")

    def encoder():
        chosen = {"train_on": train_on, "reasoning": reasoning, "special_tokens": special_tokens}
        return SampleEncoder(tokenizer_of(TEMPLATES[template]), **chosen)

    def fitted_of(samples, bad):
        given = {**lengths, "long_prompts": long_prompts, "name": str(path), "bad": bad}
        return fit_all(samples, encoder(), **given)

    bad = BadRecords("skip")
    samples = read_samples(path, bad=bad)
    fitted, report = fitted_of(samples, bad)

    options = DataOptions(**lengths, long_prompts=long_prompts, bad_records="skip")
    stream = SampleStream(source_of(path), encoder(), options)
    assert [row for rows in stream for row in rows] == fitted
    assert stream.check() == report

    alone = [fitted_of([samples[0], one], BadRecords("skip")) for one in samples[1:]]
    assert [row for rows, _ in alone for row in rows[1:]] == fitted[1:]
    whole, each = summed([report]), summed([one for _, one in alone])
    assert whole[0] == each[0]
    read = BadRecords("skip")
    list(iter_samples(source_of(path), bad=read))
    own = {(kind, line) for kind, numbers in read.counts for line in numbers}
    assert whole[1] - own == each[1]

    keeping = SampleEncoder(
        tokenizer_of(TEMPLATES[template]),
        train_on=train_on,
        reasoning="only" if reasoning == "only" else "keep",
        special_tokens=special_tokens,
    )
    for sample, one in fitted:
        assert samples[one.index].line == sample.line
        assert len(one) <= limits[0]
        assert one.spans[0][0] <= limits[1]
        again = keeping.encode(sample, **lengths)
        assert replace(again, index=one.index) == one
