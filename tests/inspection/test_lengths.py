"""The lengths of a data set before its limits, and what these take, against a count without limits."""

import json
import random
import re

import numpy as np
import pytest
from tiny import tiny_tokenizer, write_jsonl

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.sample_set import read_set
from pocl_fast.data.stream import SampleStream
from pocl_fast.inspection import lengths as counting
from pocl_fast.inspection.length_pictures import as_text, svg
from pocl_fast.inspection.lengths import Lengths, Taken, count_lengths, histogram, in_words, quantiles
from pocl_fast.options.run import RunData
from pocl_fast.records.sources import source_of


def data_set(count=40):
    draw = random.Random(3)
    return [{"prompt": "p" * draw.randint(1, 60), "response": "r" * draw.randint(1, 90)} for _ in range(count)]


AROUND = len(tiny_tokenizer()("<|start|>user\n<|end|>\n<|start|>assistant\n").input_ids)


def counted(records, options, **encoding):
    _, report = read_set(records, SampleEncoder(tiny_tokenizer(), **encoding), options, "train")
    return count_lengths(report.before, options)


def test_samples_are_counted_with_the_lengths_that_they_had_before_the_limits():
    records = data_set()
    found = counted(records, RunData(max_length=100, max_prompt_length=60, long_prompts="skip"))
    prompts = np.array([len(record["prompt"]) + AROUND for record in records])
    whole = prompts + [len(record["response"]) + 1 for record in records]
    kept = whole[prompts <= 60]
    assert 0 < len(kept) < 40
    assert (found.prompts.total, found.prompts.longest, found.prompts.over) == (40, prompts.max(), 40 - len(kept))
    assert (found.samples.total, found.samples.longest) == (40, whole.max())
    assert found.samples.over == (whole > 100).sum() > 0
    assert found.samples.median == np.sort(whole)[19]
    assert found.tokens == whole.sum()
    assert found.by_prompt_limit == Taken(40 - len(kept), whole.sum() - kept.sum())
    assert found.by_length_limit == Taken((kept > 100).sum(), np.maximum(0, kept - 100).sum())
    assert found.kept == np.minimum(kept, 100).sum()
    said = in_words(found)
    assert f"{40 - len(kept)} of 40 are over --max-prompt-length 60: left out (--long-prompts skip)" in said[0]
    assert f"{found.samples.over} of 40 are over --max-length 100" in said[1]
    share = f"{100 * (1 - found.kept / found.tokens):.1f} % are lost"
    assert f"of {found.tokens:,} tokens {share}: {found.by_prompt_limit.tokens:,} to --max-prompt-length" in said[2]
    assert f"{found.by_length_limit.tokens} to --max-length ({found.by_length_limit.samples} samples)" in said[2]


def test_of_a_conversation_the_prompt_ends_before_the_first_answer_trained_on_and_shortened_ones_are_counted_whole():
    turns = [{"role": "user", "content": "q" * 30}, {"role": "assistant", "content": "a" * 9}]
    records = [{"messages": turns * 3}, {"messages": turns}]
    options = RunData(max_length=99, max_prompt_length=60, long_prompts="truncate-left")
    exchange = AROUND + 30 + 9 + len(tiny_tokenizer()("<|end|>\n").input_ids)
    lengths = [3 * exchange - 1, exchange - 1]
    every = counted(records, options)
    assert (every.prompts.median, every.prompts.longest, every.prompts.over) == (AROUND + 30, AROUND + 30, 0)
    assert (every.samples.median, every.samples.longest) == (lengths[1], lengths[0])
    last = counted(records, options, train_on="last")
    assert (last.prompts.longest, last.prompts.over) == (2 * exchange + AROUND + 30, 1)
    assert last.samples == every.samples
    assert "1 of 2 are over --max-prompt-length 60: shortened (--long-prompts truncate-left)" in in_words(last)[0]


def test_samples_without_anything_to_train_on_are_not_counted():
    user, thinks = {"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>t</think>a"}
    records = [{"messages": [user, turn]} for turn in (thinks, {"role": "assistant", "content": "a" * 50})]
    found = counted(records, RunData(max_length=99, max_prompt_length=60, reasoning="only"), reasoning="only")
    want = len("<think>t</think>a") + AROUND + 2
    assert (found.prompts.total, found.samples.total, found.samples.longest, found.tokens) == (1, 1, want, want)


def test_a_file_that_is_read_in_pieces_has_the_lengths_of_one_that_is_read_at_once(tmp_path):
    records = data_set()
    options = RunData(max_length=100, max_prompt_length=60, long_prompts="skip")
    stream = SampleStream(
        source_of(write_jsonl(tmp_path / "t.jsonl", records)), SampleEncoder(tiny_tokenizer()), options
    )
    assert count_lengths(stream.check().before, options) == counted(records, options)


# Shorter than the limit; one bin a token; over it a little, and far; of which few are long: bins that double, with the
# limit far over the longest, in the middle, below the shortest.
@pytest.mark.parametrize("few_are_long", [False, True])
@pytest.mark.parametrize(
    ("shortest", "longest", "limit"),
    [(1, 9, 512), (1, 512, 512), (1, 513, 512), (1, 9000, 512), (1, 7, 3), (1, 1, 1), (1, 900, 10**6), (40, 9000, 7)],
)
def test_a_bin_ends_at_the_limit_and_all_lengths_are_in_their_bin(shortest, longest, limit, few_are_long):
    lengths = np.unique(np.linspace(shortest, longest, 400).astype(int))
    lengths = np.concatenate([lengths[::-1], lengths, [shortest] * (len(lengths) * 30 if few_are_long else 0)])
    made = histogram(lengths, limit)
    assert made.total == len(lengths)
    assert made.over == (lengths > limit).sum()
    assert len(made.edges) == len(made.counts) + 1 <= counting.BINS + 1
    if made.over:
        behind = sum(count for start, count in zip(made.edges, made.counts, strict=False) if start >= limit - 1e-6)
        assert behind == made.over
    bins = list(zip(made.edges, made.edges[1:], made.counts, strict=False))
    for start, end, count in bins[:-1]:
        assert count == ((lengths > start + 1e-6) & (lengths <= end + 1e-6)).sum()
    assert bins[-1][2] == (lengths > bins[-1][0] + 1e-6).sum()
    widths = np.diff(made.edges)
    assert np.allclose(widths[1:] / widths[:-1], 2 if longest > 12 * quantiles(lengths)["50"] else 1)


def test_a_quantile_is_the_least_length_that_such_a_share_does_not_pass():
    lengths = random.Random(97).choices(range(1, 98), k=300)
    found = quantiles(lengths)
    assert found["0"] == min(lengths)
    assert found["100"] == max(lengths)
    for percent, value in list(found.items())[1:]:
        share = float(percent) / 100
        assert value in lengths
        assert sum(n <= value for n in lengths) >= share * len(lengths) > sum(n < value for n in lengths)
    assert quantiles([]) == {}


# few bins, a line each; many, put together; the limit among them, and no length over it; all far from 0
@pytest.mark.parametrize(
    ("shortest", "longest", "limit"), [(1, 8, 512), (1, 700, 512), (1, 700, 1000), (1, 9000, 512), (600, 900, 650)]
)
def test_the_text_has_every_length_once_and_names_the_limit_behind_its_bin(shortest, longest, limit):
    lengths = np.random.default_rng(0).integers(shortest, longest + 1, 500)
    rows = as_text(histogram(lengths, limit), "--max-length")
    assert len(rows) <= 12
    assert int(rows[0].split()[1]) > 0
    at = int(rows[0].split()[0].partition("-")[0]) - 1
    for row in rows:
        said, count, *rest = row.split(maxsplit=2)
        first, _, last = said.replace(",", "").partition("-")
        assert int(first) == at + 1
        at = int(last or first)
        assert int(count) == ((lengths >= int(first)) & (lengths <= at)).sum()
        assert ("".join(rest).endswith(f"<- --max-length {limit}")) == (at == limit and longest > limit)
    assert at >= lengths.max()


def test_the_picture_marks_the_limit_and_what_is_over_it():
    made = histogram(np.array([10, 600, 10, 10]), 512)
    picture = svg(made, "<lengths>", "--max-length")
    assert "&lt;lengths&gt;" in picture
    assert "--max-length 512</text>" in picture
    bars = re.findall(r'<rect class="bar( over)?".*?<title>(.*?)</title>', picture)
    assert [over for over, _ in bars] == ["", " over"]
    assert bars[0][1].endswith("tokens: 3")
    assert "limit" not in svg(histogram(np.array([10] * 3), 512), "short", "--max-length")


def test_a_picture_of_doubling_bins_has_bars_of_one_width():
    picture = svg(histogram(np.array([*range(3, 40)] * 9 + [3000]), 512), "lengths", "--max-length")
    widths = set(re.findall(r'<rect [^>]*width="([0-9.]+)"', picture))
    assert len(widths) == 1
    assert "--max-length 512</text>" in picture


def test_json_of_the_lengths_is_read_as_it_was_written():
    lengths = counted(data_set(), RunData(max_length=100, max_prompt_length=60, long_prompts="skip"))
    assert Lengths.from_json(json.loads(json.dumps(lengths.as_json()))) == lengths
