"""Quantiles and histograms of lengths."""

import itertools
import random

import pytest

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.plan.lengths import length_histogram, quantiles


def samples(pairs):
    return [EncodedSample(i, (1,) * prompt, (2,) * response, False) for i, (prompt, response) in enumerate(pairs)]


def drawn(longest, count=300):
    random.seed(longest)
    return [(random.randint(1, longest), random.randint(1, longest)) for _ in range(count)]


# 3: bins narrower than a token are not made; 40: even bins; two samples far longer than the others: doubling ones
@pytest.mark.parametrize("pairs", [drawn(3), drawn(40), [*drawn(20), (2500, 3), (700, 4100)], [(5, 5)]])
def test_every_prompt_and_every_sample_is_in_the_one_bin_of_its_length(pairs):
    known = length_histogram(samples(pairs))
    assert list(known.edges) == sorted(set(known.edges))
    for counts, lengths in ((known.prompts, [a for a, _ in pairs]), (known.samples, [a + b for a, b in pairs])):
        bins = list(itertools.pairwise(known.edges))
        assert list(counts) == [sum(first <= n < end for n in lengths) for first, end in bins]
        assert sum(counts) == len(pairs)


def test_bins_are_even_and_round_unless_a_few_samples_are_far_longer():
    even = length_histogram(samples(drawn(200))).edges
    assert {b - a for a, b in itertools.pairwise(even)} in ({20}, {50})
    assert even[0] % 20 == 0
    doubling = length_histogram(samples([*drawn(20), (10, 4000)])).edges
    assert {b / a for a, b in itertools.pairwise(doubling)} == {2}


def test_no_samples_have_no_lengths():
    assert sum(length_histogram([]).samples) == 0
    assert quantiles([]) == {}


def test_a_quantile_is_the_least_length_that_such_a_share_does_not_pass():
    lengths = [a for a, _ in drawn(97)]
    found = quantiles(lengths)
    assert found["0"] == min(lengths)
    assert found["100"] == max(lengths)
    for percent, value in list(found.items())[1:]:
        share = float(percent) / 100
        assert value in lengths
        assert sum(n <= value for n in lengths) >= share * len(lengths) > sum(n < value for n in lengths)
