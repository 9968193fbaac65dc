"""A training step with the teacher's cache full is 2.2 times as fast as with the teacher run live by transformers, at
the same loss; samples are read from the cache in random order as fast as the same bytes from end to end.

(a) Three students, equal at the start, take the same steps of AdamW on the same batches in turns: one's teacher is run
at every step as transformers runs it, with torch's own products, another's as a run of pocl-fast does
(`freeze_linears`), the third's is read from a full bf16 cache. Prints the median seconds of a step and the largest
relative difference of the losses. (b) A cache of `--read-mib` of random rows is read in batches of random order, out of
the page cache, in turns with its files read from end to end; the first reading of a sample, which compares its
checksum, apart. (c) What bf16, fp32 and int8 lose, and how many bytes a token they take.

    python benchmarks/teacher_cache.py [--data dolly.jsonl] [--steps 6]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocl_fast.cutting.cut import cut_layers
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.data.packed import pack
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.teacher_output import LinearTeacher
from pocl_fast.models import loading
from pocl_fast.models.frozen import freeze_linears
from pocl_fast.models.lm_head import LmHead, lm_head, loss_within_forward
from pocl_fast.models.packed_attention import enable_packing
from pocl_fast.models.packed_forward import supervised_hidden
from pocl_fast.models.parameters import as_trainable
from pocl_fast.models.placement import choose_device
from pocl_fast.models.precision import choose_precision
from pocl_fast.records.samples import read_samples
from pocl_fast.run.demo import bundled_data
from pocl_fast.system.fp32_products import fp32_products
from pocl_fast.teacher.cache import TeacherCache
from pocl_fast.teacher.shards import HIDDEN_DTYPES, HiddenEntries, row_bytes
from pocl_fast.teacher.teacher import Teacher, rounding_loss

BATCHES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=bundled_data("train"), help="JSON Lines of instruction samples")
    parser.add_argument("--teacher", default="bundled")
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="of each side, after a first pass")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="as pocl-fast's option")
    parser.add_argument("--read-mib", type=int, default=512, help="size of the cache that is read in (b)")
    parser.add_argument("--parts", default="abc", help="which of (a), (b) and (c)")
    options = parser.parse_args()
    device = choose_device("auto")
    precision = choose_precision(options.precision, device)
    teacher = loading.load_model(options.teacher, device=device)
    student = as_trainable(cut_layers(teacher, options.student_layers))
    for model in (teacher, student):
        enable_packing(model)
    plain = copy.deepcopy(teacher)
    freeze_linears(teacher.get_decoder(), precision.frozen_dtype)  # as a run does
    batches = read_batches(options)
    print(f"{options.data}, batches of {options.batch_size}, {options.precision}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        if "a" in options.parts:
            training_steps(student, plain, teacher, batches, options.steps, Path(folder))
        if "b" in options.parts:
            reading(Path(folder), options.read_mib << 20)
        if "c" in options.parts:
            rounding(teacher, batches)


def read_batches(options: argparse.Namespace) -> list[list[EncodedSample]]:
    encoder = SampleEncoder(loading.load_tokenizer(options.teacher))
    lengths = {"max_length": 512, "max_prompt_length": 384, "long_prompts": "skip", "name": str(options.data)}
    encoded, _ = encode_all(read_samples(options.data), encoder, **lengths)
    random.Random(0).shuffle(encoded)
    return [encoded[i : i + options.batch_size] for i in range(0, BATCHES * options.batch_size, options.batch_size)]


def training_steps(
    student: Any, plain: Any, frozen: Any, batches: list[list[EncodedSample]], steps: int, folder: Path
) -> None:
    """(a)"""
    cached = Teacher(frozen, folder)
    sides = {
        "plain": (student, partial(run_live, plain, "ieee")),
        "frozen": (copy.deepcopy(student), partial(run_live, frozen, None)),
        "cached": (copy.deepcopy(student), cached.output),
    }
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for name, (model, _) in sides.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(len(batches) + steps):  # the first pass fills the cache, as in training, and is not counted
        batch = batches[number % len(batches)]
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            start = time.perf_counter()
            losses[name].append(step(*sides[name], optimizers[name], batch))
            seconds[name].append(time.perf_counter() - start)
        if number == len(batches) - 1 and not cached.release_body_if_cached([s for batch in batches for s in batch]):
            raise RuntimeError("the cache is not full after the first pass")
    middle = {name: statistics.median(times[len(batches) :]) for name, times in seconds.items()}
    gap = max(abs(a - b) / abs(a) for a, b in zip(losses["frozen"], losses["cached"], strict=True))
    print(f"(a) a step with the teacher cached: {middle['cached']:.3f} s; losses differ by {gap:.1e} at most")
    for name, what in (("plain", "as transformers runs it"), ("frozen", "as a run of pocl-fast does")):
        print(f"    live, {what}: {middle[name]:.3f} s, {middle[name] / middle['cached']:.2f}x", flush=True)


@torch.no_grad()
def run_live(teacher: Any, mode: str | None, samples: list[EncodedSample]) -> LinearTeacher:
    """With torch's own products of fp32 tensors on a CPU ("ieee"), or the process's."""
    head = lm_head(teacher)
    with contextlib.nullcontext() if mode is None else fp32_products(mode):
        hidden = supervised_hidden(teacher.get_decoder(), pack(samples).to(head.weight.device), packed=True)
    return LinearTeacher(hidden, head.weight, head.bias, head.logit_scale, head.logit_softcap)


def step(
    student: Any,
    teacher: Callable[[list[EncodedSample]], Any],
    optimizer: torch.optim.Optimizer,
    samples: list[EncodedSample],
) -> float:
    batch = pack(samples).to(next(student.parameters()).device)
    objective, said = Objective("forward_kl"), teacher(samples)

    def loss_of(hidden: torch.Tensor, head: LmHead) -> torch.Tensor:
        return linear_distillation_loss(hidden, head.weight, said, batch.labels, objective).loss

    loss = loss_within_forward(student, batch, loss_of, packed=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def rounding(teacher: Any, batches: list[list[EncodedSample]]) -> None:
    """(c)"""
    head = lm_head(teacher)
    with torch.no_grad():
        parts = [
            supervised_hidden(teacher.get_decoder(), pack(batch).to(head.weight.device), packed=True)
            for batch in batches
        ]
    hidden = torch.cat(parts)[:1024]
    print(f"(c) {'':<8}{'bytes a token':>15}{'hidden states':>15}{'mean KL, nats':>15}   over {len(hidden)} tokens")
    for name, dtype in HIDDEN_DTYPES.items():
        entries = HiddenEntries(hidden.shape[1], dtype)
        loss = rounding_loss(entries, head, hidden)
        print(f"    {name:<8}{row_bytes(entries):>15}{loss.hidden:>15.1e}{loss.divergence:>15.1e}")


def reading(folder: Path, size: int) -> None:
    """(b): samples of 40 to 160 tokens, as Dolly's are with this tokenizer; batches of 16."""
    entries = HiddenEntries(576)
    order = random.Random(0)
    samples: list[EncodedSample] = []
    cache = TeacherCache(folder, teacher="0" * 64, entries=entries)
    with cache:
        while len(samples) * 100 * row_bytes(entries) < size:
            number = len(samples)
            tokens = tuple(range(number, number + order.randint(40, 160)))
            samples.append(EncodedSample(number, (1,), tokens, False))
            cache.put(samples[-1:], torch.randn(len(tokens), 576))
    files = sorted(cache.folder.glob("*.safetensors"))
    buffer = memoryview(np.empty(max(path.stat().st_size for path in files), np.uint8))

    def sequential() -> float:
        start = time.perf_counter()
        done = 0
        for path in files:
            with open(path, "rb", buffering=0) as file:
                done += file.readinto(buffer)
        return done / (time.perf_counter() - start)

    def shuffled(dtype: torch.dtype) -> float:
        order.shuffle(samples)
        start = time.perf_counter()
        tokens = 0
        for first in range(0, len(samples), 16):
            tokens += len(cache.read_hidden(samples[first : first + 16], dtype=dtype))
        return tokens * row_bytes(entries) / (time.perf_counter() - start)

    sequential()
    once = shuffled(torch.bfloat16)
    rounds = [(sequential(), shuffled(torch.bfloat16), shuffled(torch.float32)) for _ in range(7)]
    whole, random_order, as_fp32 = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(
        f"(b) {len(samples)} samples, {cache.nbytes() / 2**20:.0f} MiB in {len(files)} shards:"
        f" sequential {whole / 1e9:.1f} GB/s; random order {random_order / 1e9:.1f} ({random_order / whole:.0%}),"
        f" with checksums (once) {once / 1e9:.1f} ({once / whole:.0%}), made fp32 {as_fp32 / 1e9:.1f}"
        f" ({as_fp32 / whole:.0%})"
    )


if __name__ == "__main__":
    main()
