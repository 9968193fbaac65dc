"""The backward of attention over a packed row of 64 short samples takes a quarter to a fifth of what slices take.

One layer's attention of a Qwen3-0.6B (16 heads, 8 of keys and values, head size 128), 64 samples of 128 tokens in one
row. "by sample" is what a CPU gets from pocl-fast: one causal sdpa call per sample, on a split of the row. "slices" is
the same on slices of the row: a slice's gradient is as long as the row, and all are added. "mask" (where asked for, as
its 4 GiB of scores move the other sides' memory) is transformers' sdpa over the whole row with the mask that it derives
from the positions. On a GPU there is "varlen" too: torch's flash attention over packed rows. All sides run in this
process on the same tensors, in turns; medians of the forward and of the backward. The outputs and gradients of each are
compared with float64 attention, sample by sample.

With --data a second table: forward and backward of a distillation step of the bundled model's student of six layers,
its teacher's hidden states given, by sample and, as pocl-fast did before, by slices while transformers makes its mask.

    python benchmarks/packed_attention.py [--device cuda] [--samples 64] [--tokens 128] [--dtype bf16] [--repeats 5]
        [--sides "by sample,mask"] [--data FILE.jsonl --batches 8,32]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it

import torch
from device import machine, save
from table_form import console
from torch import Tensor
from transformers import AttentionInterface

from pocl_fast.cutting.cut import cut_layers
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.data.fitting import encode_all
from pocl_fast.data.packed import pack
from pocl_fast.loss.linear import linear_distillation_loss
from pocl_fast.loss.objective import Objective
from pocl_fast.loss.teacher_output import LinearTeacher
from pocl_fast.models import loading, packed_forward
from pocl_fast.models.lm_head import lm_head, loss_within_forward
from pocl_fast.models.packed_attention import BY_SAMPLE, enable_packing, needs_no_mask, packed_by_sample, packed_varlen
from pocl_fast.models.parameters import as_trainable
from pocl_fast.models.precision import choose_precision
from pocl_fast.records.samples import read_samples

Attention = Callable[[Any, Tensor, Tensor, Tensor, Sequence[int]], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_ERROR = {"fp32": 1e-5, "bf16": 1e-2}  # of output and gradients in norm: sums of rounded products


def by_sample(layer: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    return packed_by_sample(layer, q, k, v, None, lengths)[0]


def slices(layer: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    outputs, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        outputs.append(
            sdpa_attention_forward(layer, q[:, :, part], k[:, :, part], v[:, :, part], None, is_causal=True)[0]
        )
        start += length
    return torch.cat(outputs, dim=1)


def mask(layer: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    sample = torch.arange(len(lengths), device=q.device).repeat_interleave(torch.tensor(lengths, device=q.device))
    places = torch.arange(len(sample), device=q.device)
    allowed = (sample[:, None] == sample[None]) & (places[:, None] >= places[None])
    return sdpa_attention_forward(layer, q, k, v, allowed[None, None])[0]


def varlen(layer: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    ends = torch.tensor((0, *lengths), device=q.device).cumsum(0).to(torch.int32)
    return packed_varlen(layer, q, k, v, None, lengths, cu_seq_lens_q=ends)[0]


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], upstream: Tensor) -> list[Tensor]:
    """Output [1, T, heads, size] and the three gradients in float64, from softmaxes by hand."""
    leaves = [x.detach().double().requires_grad_(True) for x in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for s_q, s_k, s_v in zip(*(x.split(list(lengths), dim=2) for x in leaves), strict=True):
        s_k, s_v = (x.repeat_interleave(groups, dim=1) for x in (s_k, s_v))
        scores = s_q @ s_k.transpose(-1, -2) * q.shape[-1] ** -0.5
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        outputs.append(scores.masked_fill(~causal, -torch.inf).softmax(-1) @ s_v)
    output = torch.cat(outputs, dim=2).transpose(1, 2)
    output.backward(upstream.double())
    return [output.detach(), *(x.grad for x in leaves if x.grad is not None)]


def errors(side: Attention, layer: Any, inputs: Sequence[Tensor], lengths: Sequence[int], upstream: Tensor) -> float:
    """The largest error in norm of output and gradients."""
    want = exact(*inputs, lengths, upstream)  # type: ignore[call-arg, misc]
    leaves = [x.detach().clone().requires_grad_(True) for x in inputs]
    output = side(layer, *leaves, lengths)  # type: ignore[call-arg, misc]
    output.backward(upstream)
    got = [output.detach(), *(x.grad for x in leaves)]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))  # type: ignore[union-attr]


def seconds(side: Attention, layer: Any, inputs: Sequence[Tensor], lengths: Sequence[int], upstream: Tensor) -> Any:
    """Of the forward and of the backward."""
    leaves = [x.detach().requires_grad_(True) for x in inputs]
    marks = []
    for phase in range(3):
        if upstream.is_cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        if phase == 0:
            output = side(layer, *leaves, lengths)  # type: ignore[call-arg, misc]
        elif phase == 1:
            output.backward(upstream)
    return marks[1] - marks[0], marks[2] - marks[1]


def attention_table(options: argparse.Namespace) -> dict[str, Any]:
    """Every side on one layer's attention."""
    sides: dict[str, Attention] = {"by sample": by_sample, "slices": slices, "mask": mask, "varlen": varlen}
    chosen = [name for name in options.sides.split(",") if name != "varlen" or options.device == "cuda"]
    T, lengths = options.samples * options.tokens, [options.tokens] * options.samples
    layer = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=True)

    def normal(heads: int) -> Tensor:
        # as a model makes it: [1, T, heads, size], its dimensions exchanged
        return torch.randn(1, T, heads, 128, device=options.device).to(DTYPES[options.dtype]).transpose(1, 2)

    inputs, upstream = [normal(16), normal(8), normal(8)], normal(16).transpose(1, 2)
    wrong = {name: errors(sides[name], layer, inputs, lengths, upstream) for name in chosen}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for turn in range(1 + options.repeats):
        for name in chosen:
            taken = seconds(sides[name], layer, inputs, lengths, upstream)
            if turn:  # the first warms up
                times[name].append(taken)
    middle = {name: [statistics.median(phase) for phase in zip(*times[name], strict=True)] for name in chosen}
    rows = []
    for name in chosen:
        over = [a / b for a, b in zip(middle[name], middle[chosen[0]], strict=True)]
        rows.append([name, *(f"{1e3 * t:.1f} ms ({r:.2f}x)" for t, r in zip(middle[name], over, strict=True))])
        rows[-1].append(f"{wrong[name]:.0e}")
    bad = [name for name, error in wrong.items() if not error <= MOST_ERROR[options.dtype]]
    row = f"{options.samples} samples of {options.tokens} tokens, {options.dtype}"
    return {
        "title": f"Attention over a packed row of {row}",
        "claim": (__doc__ or "").splitlines()[0],
        "columns": ["", "forward", "backward", "error"],
        "rows": rows,
        "note": f"wrong: {', '.join(bad)}" if bad else "",
    }


# ---- a training step ----


def before(layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, packed_lengths: Any = None, **kwargs: Any) -> Any:
    return slices(layer, q, k, v, packed_lengths), None


def step_row(samples: list[Any], model: Any, repeats: int) -> list[str]:
    """Forward and backward of one batch both ways, in turns: tokens, times, and how far losses are apart."""
    batch, head = pack(samples), lm_head(model)
    teacher = LinearTeacher(torch.randn(len(batch.labels), head.weight.shape[1]), head.weight.detach())

    def loss(hidden: Tensor, head: Any) -> Tensor:
        return linear_distillation_loss(hidden, head.weight, teacher, batch.labels, Objective("forward_kl")).loss

    ways = {"by sample": (packed_by_sample, needs_no_mask), "slices": (before, lambda _: False)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}
    for turn in range(1 + repeats):
        for name, (attend, no_mask) in ways.items():
            AttentionInterface.register(BY_SAMPLE, attend)
            packed_forward.needs_no_mask = no_mask  # type: ignore[assignment]
            start = time.perf_counter()
            value = loss_within_forward(model, batch, loss, packed=True)
            value.backward()
            if turn:
                times[name].append(time.perf_counter() - start)
            losses[name] = float(value.detach())
            model.zero_grad()
    ours, theirs = (statistics.median(times[name]) for name in ways)
    gap = abs(losses["by sample"] - losses["slices"]) / abs(losses["slices"])
    cells = [f"{sum(batch.lengths)}", f"{ours:.3f} s", f"{theirs:.3f} s ({theirs / ours:.3f}x)", f"{gap:.0e}"]
    return [str(len(samples)), *cells]


def step_table(options: argparse.Namespace) -> dict[str, Any]:
    """A distillation step on batches of so many samples."""
    choose_precision("fp32", torch.device("cpu"))
    tokenizer = loading.load_tokenizer("bundled")
    limits: dict[str, Any] = {"max_length": 512, "max_prompt_length": 384, "long_prompts": "skip"}
    encoded, _ = encode_all(read_samples(options.data), SampleEncoder(tokenizer), name=str(options.data), **limits)
    model = as_trainable(cut_layers(loading.load_model("bundled"), 6))
    enable_packing(model)
    rows = [step_row(encoded[:count], model, options.repeats) for count in options.batches]
    return {
        "title": "Forward and backward of a distillation step",
        "claim": "A student of six layers of SmolLM2-135M, fp32, its teacher's hidden states given.",
        "columns": ["samples", "tokens", "by sample", "slices, and a mask of the row", "losses differ by"],
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of each sample")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", default="by sample,slices,varlen", help="with commas between")
    parser.add_argument("--data", type=Path, help="JSON Lines of instruction samples, for the training step on a CPU")
    parser.add_argument("--batches", default="8,32", help="samples of that step, with commas between")
    options = parser.parse_args()
    options.batches = [int(count) for count in options.batches.split(",")]
    tables = [attention_table(options), *([step_table(options)] if options.data else [])]
    facts = machine(options.device)
    save({"machine": facts, "tables": tables}, "packed_attention.json")
    print(facts["device"])
    for table in tables:
        print(console(table))
    if tables[0]["note"]:
        raise SystemExit(tables[0]["note"])


if __name__ == "__main__":
    main()
