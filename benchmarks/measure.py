"""Measuring a student's difficulty is at least 2x as fast as `model.generate` at batch 16 in file order, with the same
greedy answers, and the references' cross-entropy at least 4x as fast as logits and `cross_entropy`, to 1e-5.

Both sides answer the same prompts in one process, in turns; the published side pads 16 samples at a time on the left
(to answer) or on the right (for the loss), as such a loop is commonly written. Prints medians and ratios, how many
answers are the same, and the largest relative difference of the cross-entropies.

    python benchmarks/measure.py --data dolly.jsonl [--student FOLDER] [--samples 128] [--new-tokens 64] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it

import numpy as np
import torch
from torch import Tensor

from pocl_fast.answers.decoding import generate
from pocl_fast.answers.likelihood import cross_entropy
from pocl_fast.cutting.cut import cut_layers
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.models import loading
from pocl_fast.models.packed_attention import enable_packing
from pocl_fast.models.precision import choose_precision
from pocl_fast.records.samples import read_samples

PLAIN_BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines of instruction samples")
    parser.add_argument("--student", default="bundled", help="a model; the bundled one is cut to --student-layers")
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64, help="ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of both sides")
    options = parser.parse_args()
    choose_precision(options.precision, torch.device("cpu"))
    tokenizer = loading.load_tokenizer(options.student)
    encoder = SampleEncoder(tokenizer)
    encoded, _ = encode_all(
        read_samples(options.data),
        encoder,
        max_length=512,
        max_prompt_length=384,
        long_prompts="skip",
        name=str(options.data),
    )
    encoded = encoded[: options.samples]
    plain, ours = student(options), student(options)
    enable_packing(ours)
    prompts = [sample.prompt_ids for sample in encoded]
    settings: dict[str, Any] = {"max_new_tokens": options.new_tokens, "pad_id": tokenizer.pad_token_id}
    ends = sorted(encoder.end_ids)
    tokens = [sum(len(s) for s in encoded), sum(len(s.response_ids) for s in encoded)]
    print(f"{len(encoded)} samples, {tokens[0]} tokens of which {tokens[1]} in responses; {options.precision}")

    answers = in_turns(
        "answers",
        options.rounds,
        lambda: generate(ours, prompts, end_ids=ends, batch_size=options.batch_size, **settings),
        lambda: plain_answers(plain, prompts, end_ids=ends, **settings),
    )
    same = sum(a == b for a, b in zip(*answers, strict=True))
    length = statistics.mean(map(len, answers[0]))
    print(f"    {same} of {len(prompts)} answers are the same, of {length:.1f} tokens on average")
    losses = in_turns(
        "cross-entropy",
        options.rounds,
        lambda: cross_entropy(ours, encoded, packed=True),
        lambda: plain_cross_entropy(plain, encoded),
    )
    print(f"    largest relative difference {np.max(np.abs(losses[0] - losses[1]) / losses[1]):.1e}")


def student(options: argparse.Namespace) -> Any:
    model = loading.load_model(options.student)
    return cut_layers(model, options.student_layers) if options.student == "bundled" else model


def in_turns(what: str, rounds: int, ours: Callable[[], Any], plain: Callable[[], Any]) -> tuple[Any, Any]:
    """Runs both sides in turns, prints their medians and the median of the ratios; the last results."""
    seconds: list[list[float]] = [[], []]
    results: list[Any] = [None, None]
    for number in range(rounds):
        for i, side in enumerate((ours, plain)):
            start = time.perf_counter()
            results[i] = side()
            seconds[i].append(time.perf_counter() - start)
        print(f"{what}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    a, b = map(statistics.median, seconds)
    print(f"{what}: pocl-fast {a:.2f} s, plain {b:.2f} s: {ratio:.2f}x")
    return results[0], results[1]


def plain_answers(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_ids: list[int], pad_id: int
) -> list[list[int]]:
    """Greedy answers by `model.generate`, 16 prompts at a time in file order."""
    answers = []
    for start in range(0, len(prompts), PLAIN_BATCH):
        batch = prompts[start : start + PLAIN_BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        rows = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end_ids,
            pad_token_id=pad_id,
        )
        for row in rows[:, longest:].tolist():
            end = next((n for n, token in enumerate(row) if token in end_ids), len(row))
            answers.append(row[:end])
    return answers


@torch.inference_mode()
def plain_cross_entropy(model: Any, encoded: Sequence[EncodedSample]) -> np.ndarray:
    """Mean cross-entropy of each response from logits of all positions, 16 samples at a time in file order."""
    means: list[float] = []
    for start in range(0, len(encoded), PLAIN_BATCH):
        batch = encoded[start : start + PLAIN_BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([[*s.prompt_ids, *s.response_ids] + [0] * (longest - len(s)) for s in batch])
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in batch])
        labels = ids.masked_fill(mask == 0, -100)
        for row, sample in zip(labels, batch, strict=True):
            row[: len(sample.prompt_ids)] = -100
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
        ).view(len(batch), -1)
        means += (loss.double().sum(1) / (labels[:, 1:] != -100).sum(1)).tolist()
    return np.array(means)


if __name__ == "__main__":
    main()
