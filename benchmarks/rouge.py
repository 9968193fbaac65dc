"""ROUGE-L is the same as rouge-score's to the last bit, and tens (short texts) to hundreds of times faster.

Both sides run in this process on the same pairs, in turns; the figures are medians. The pairs are the `output` fields
of the bundled samples or of a JSON-lines file, each scored against a noisy copy of itself (words dropped, swapped and
taken from its neighbour) and repeated up to `--pairs`, every repetition with noise of its own. "first call" counts the
stemming of words never seen before; it happens once in a process.

    python benchmarks/rouge.py [--data FILE] [--pairs 4000] [--repeats 5] [--threads N]
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
from rouge_score import rouge_scorer

from pocl_fast.rouge import rouge_l

BUNDLED = Path(__file__).resolve().parents[1] / "pocl_fast" / "data"


def responses(path: Path | None) -> list[str]:
    """The texts of `output` fields; a list of them gives its first."""
    files = [path] if path else sorted(BUNDLED.glob("*.jsonl"))
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
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    rng = random.Random(0)
    texts = responses(options.data)
    references = [texts[i % len(texts)] for i in range(options.pairs)]
    predictions = [noisy(text, texts[(i + 1) % len(texts)], rng) for i, text in enumerate(references)]
    words = statistics.mean(len(text.split()) for text in references)
    print(f"{options.pairs} pairs of {words:.0f} words on average")
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


if __name__ == "__main__":
    main()
