"""The lengths of a data set before its limits, and what these cut, against a count without limits."""

import random
import re

import numpy as np
import pytest
from tiny import tiny_tokenizer

from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.sample_set import read_set
from pocl_fast.inspection import lengths as counting
from pocl_fast.inspection.lengths import count_lengths, histogram, in_words, svg
from pocl_fast.options import RunData


def data_set(count=40):
    draw = random.Random(3)
    return [{"prompt": "p" * draw.randint(1, 60), "response": "r" * draw.randint(1, 90)} for _ in range(count)]


def test_samples_are_counted_with_the_lengths_that_they_had_before_the_limits():
    records, encoder = data_set(), SampleEncoder(tiny_tokenizer())
    options = RunData(max_length=100, max_prompt_length=60, long_prompts="skip")
    known, _ = read_set(records, encoder, options, "train")
    found = count_lengths(known, encoder, options)
    around = len(tiny_tokenizer()("<|start|>user\n<|end|>\n<|start|>assistant\n").input_ids)
    prompts = np.array([len(record["prompt"]) + around for record in records])
    whole = prompts + [len(record["response"]) + 1 for record in records]
    kept = whole[prompts <= 60]
    assert 0 < len(kept) < 40
    assert (found.prompts.total, found.prompts.longest, found.prompts.over) == (40, prompts.max(), 40 - len(kept))
    assert (found.samples.total, found.samples.longest) == (len(kept), kept.max())
    assert found.samples.over == (kept > 100).sum() > 0
    assert (found.tokens, found.cut_tokens) == (kept.sum(), np.maximum(0, kept - 100).sum())
    assert f"{found.samples.over} of {len(kept)} are over --max-length 100" in in_words(found)[1]


def test_of_many_cut_samples_some_stand_for_the_others(monkeypatch):
    records, encoder = [{"prompt": "p", "response": "r" * 90}] * 50, SampleEncoder(tiny_tokenizer())
    options = RunData(max_length=60, max_prompt_length=50)
    known, _ = read_set(records, encoder, options, "train")
    whole = count_lengths(known, encoder, options)
    monkeypatch.setattr(counting, "_MEASURED", 7)
    assert count_lengths(known, encoder, options) == whole
    assert (whole.samples.over, whole.samples.total) == (50, 50)


# shorter than the limit; one bin a token; over it a little, and far
@pytest.mark.parametrize(("longest", "limit"), [(9, 512), (512, 512), (513, 512), (9000, 512), (7, 3), (1, 1)])
def test_a_bin_ends_at_the_limit_and_all_lengths_are_in_their_bin(longest, limit):
    lengths = np.unique(np.linspace(1, longest, 400).astype(int))
    made = histogram([(int(one), 2) for one in lengths], limit)
    assert made.total == 2 * len(lengths)
    assert made.over == 2 * (lengths > limit).sum()
    assert len(made.edges) == len(made.counts) + 1 <= counting.BINS + 1
    behind = sum(count for start, count in zip(made.edges, made.counts, strict=False) if start >= limit - 1e-6)
    assert behind == made.over
    for start, end, count in list(zip(made.edges, made.edges[1:], made.counts, strict=False))[:-1]:
        assert count == 2 * ((lengths > start + 1e-6) & (lengths <= end + 1e-6)).sum()


def test_the_picture_marks_the_limit_and_what_is_over_it():
    made = histogram([(10, 3), (600, 1)], 512)
    picture = svg(made, "<lengths>", "--max-length")
    assert "&lt;lengths&gt;" in picture
    assert "--max-length 512</text>" in picture
    bars = re.findall(r'<rect class="bar( over)?".*?<title>(.*?)</title>', picture)
    assert [over for over, _ in bars] == ["", " over"]
    assert bars[0][1].endswith("tokens: 3")
    assert "limit" not in svg(histogram([(10, 3)], 512), "short", "--max-length")
