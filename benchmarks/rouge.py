"""ROUGE-L with the stemmer is at least 150 times as fast as rouge-score on 20,000 pairs, and the same to the last bit;
the longest common subsequence alone is no slower than rapidfuzz's LCSseq.similarity.

Both sides run in this process on the same pairs, in turns; the figures are medians. The pairs are the answers and
references of a run's difficulty.parquet, each answer against its own reference, then against other samples'; or the
`output` fields of the bundled samples or of a JSON-lines file, each against a noisy copy of itself (words dropped,
swapped and taken from its neighbour), every repetition with noise of its own. "first call" counts the stemming of
words never seen before; it happens once in a process. The subsequences are of random ids, given to rapidfuzz as lists,
which it reads faster than strings, and on one thread.

    python benchmarks/rouge.py [--data FILE] [--pairs 20000] [--repeats 5] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rouge_score import rouge_scorer

from pocl_fast import _C
from pocl_fast.answers.rouge import rouge_l
from pocl_fast.run.demo import bundled_data


def pairs(path: Path | None, count: int) -> tuple[list[str], list[str]]:
    """Predictions and references."""
    if path and path.suffix == ".parquet":
        table = pq.read_table(path, columns=["answer", "reference"])
        answers, theirs = table["answer"].to_pylist(), table["reference"].to_pylist()
        n = len(answers)
        return [answers[i % n] for i in range(count)], [theirs[(i + i // n) % n] for i in range(count)]
    texts = responses(path)
    rng = random.Random(0)
    references = [texts[i % len(texts)] for i in range(count)]
    return [noisy(text, texts[(i + 1) % len(texts)], rng) for i, text in enumerate(references)], references


def responses(path: Path | None) -> list[str]:
    """The texts of `output` fields; a list of them gives its first."""
    files = [path] if path else [bundled_data(split) for split in ("dev", "train")]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [row["output"] if isinstance(row["output"], str) else row["output"][0] for row in rows]
    if not texts:
        raise SystemExit("no samples: name a JSON-lines file with `output` fields by --data")
    return texts


def noisy(text: str, neighbour: str, rng: random.Random) -> str:
    """A text with a fifth of its words dropped, a tenth from the neighbour, and one pair of words swapped."""
    words, others = text.split(), neighbour.split() or [""]
    kept = [rng.choice(others) if rng.random() < 0.1 else word for word in words if rng.random() < 0.8]
    if len(kept) > 1:
        i = rng.randrange(len(kept) - 1)
        kept[i], kept[i + 1] = kept[i + 1], kept[i]
    return " ".join(kept)


def theirs(predictions: list[str], references: list[str], use_stemmer: bool) -> np.ndarray:
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=use_stemmer)
    return np.array([scorer.score(r, p)["rougeL"] for p, r in zip(predictions, references, strict=True)]).T


def ours(predictions: list[str], references: list[str], use_stemmer: bool, threads: int | None) -> np.ndarray:
    scores = rouge_l(predictions, references, use_stemmer=use_stemmer, threads=threads)
    return np.stack([scores.precision, scores.recall, scores.fmeasure])


def timed(side: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = side()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    predictions, references = pairs(options.data, options.pairs)
    words = [statistics.mean(len(text.split()) for text in texts) for texts in (predictions, references)]
    print(f"{options.pairs} pairs: predictions of {words[0]:.0f} words on average, references of {words[1]:.0f}")
    print(
        f"{'stemmer':<9}{'rouge-score, ms':>16}{'ours, ms':>10}{'ratio':>8}{'first call, ms':>16}{'ratio':>8}  scores"
    )
    for use_stemmer in (True, False):
        arguments = (predictions, references, use_stemmer)
        first, _ = timed(lambda a=arguments: ours(*a, options.threads))
        runs = [
            (timed(lambda a=arguments: theirs(*a)), timed(lambda a=arguments: ours(*a, options.threads)))
            for _ in range(options.repeats)
        ]
        slow, fast = (statistics.median(run[side][0] for run in runs) for side in (0, 1))
        same = all(np.array_equal(a, b) for (_, a), (_, b) in runs)
        print(
            f"{'yes' if use_stemmer else 'no':<9}{1e3 * slow:>16.0f}{1e3 * fast:>10.2f}{slow / fast:>7.0f}x"
            f"{1e3 * first:>16.1f}{slow / first:>7.0f}x  {'identical' if same else 'DIFFERENT'}"
        )
        if not same:
            raise SystemExit("the scores differ from rouge-score's")
    subsequences(options.repeats)


def subsequences(repeats: int, count: int = 40, length: int = 1000) -> None:
    """The longest common subsequence alone, of `count` pairs of `length` ids."""
    try:
        from rapidfuzz.distance import LCSseq
    except ImportError:
        print("subsequences: rapidfuzz is not installed (pip install rapidfuzz)")
        return
    rng = np.random.default_rng(0)
    print(f"\n{'LCS of ' + str(length) + ' x ' + str(length):<22}{'rapidfuzz, us':>14}{'ours, us':>10}{'ratio':>8}")
    for distinct in (50, 500, 20_000):
        ids = rng.integers(0, distinct, (2 * count, length))
        lists = ids.tolist()
        tokens = _C.tokenize([" ".join(f"w{i}" for i in row) for row in lists], 1)
        forms, first = np.arange(len(tokens.words), dtype=np.int32), np.arange(count + 1)
        pairs_of_lists = list(zip(lists[:count], lists[count:], strict=True))
        runs = [
            (
                timed(lambda p=pairs_of_lists: [LCSseq.similarity(a, b) for a, b in p]),
                timed(lambda t=tokens, f=forms, n=first: _C.rouge_l(t, f, n, 1)),
            )
            for _ in range(4 * repeats + 1)
        ]
        theirs_us, ours_us = (1e6 * statistics.median(run[side][0] for run in runs) / count for side in (0, 1))
        lengths = np.rint(runs[0][1][1][0] * length).astype(int).tolist()
        if lengths != runs[0][0][1]:
            raise SystemExit("the lengths differ from rapidfuzz's")
        name = f"{distinct} distinct ids"
        print(f"{name:<22}{theirs_us:>14.1f}{ours_us:>10.1f}{theirs_us / ours_us:>7.2f}x")


if __name__ == "__main__":
    main()
