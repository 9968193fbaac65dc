"""What `--precision auto` takes on a CPU is within 5 % of the fastest way to multiply.

The choice is made as a run makes it, in a fraction of a second on cropped matrices. Then the whole matrices of a model
(SmolLM2-135M's by default) are multiplied in every way that a run has, forward, by the data and by the weight, at
several numbers of rows: fp32 tensors in each mode of torch and rounded to bf16, layers that do not train in each
precision, and a bf16 lm_head of the linear loss. All ways run in this process, in turns; the least processor time of a
thread counts, so that other programs on the machine do not. Ends with an error where a chosen way took more than 1.05
times the fastest, all products and rows of a part together.

    python benchmarks/precision.py [--hidden 576] [--intermediate 1536] [--vocabulary 49152] [--rows 64,256,1024]
        [--repeats 5]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it

import torch
from device import machine, save
from table_form import console
from torch import nn

from pocl_fast.loss import cpp
from pocl_fast.loss.lm_head_products import HeadProducts, bf16_way, weight_grad_
from pocl_fast.models.frozen import freeze_linears
from pocl_fast.models.product_speed import CpuProducts, Mode, Shapes, decide, measure_speeds
from pocl_fast.system.fp32_products import fp32_products, rounds_to_bf16

Product = Callable[[], object]
HEAD_ROWS = 256  # at most, of a product with an lm_head: the loss multiplies chunks of them
MOST = 1.05  # times the fastest


def least(ways: dict[str, Product], repeats: int) -> dict[str, float]:
    """The least thread time of each, in turns."""
    found = dict.fromkeys(ways, float("inf"))
    for repeat in range(repeats + 1):
        for way, product in ways.items():
            start = time.thread_time()
            product()
            if repeat:
                found[way] = min(found[way], time.thread_time() - start)
    return found


def trained(rows: int, K: int, N: int) -> dict[str, dict[str, Product]]:
    """A layer of weights that train: by product, then by way."""
    pairs = factors(rows, K, N)
    return {name: by_mode(*pair) | {"rounded": partial(rounded, *pair)} for name, pair in pairs.items()}


def trained_lm_head(rows: int, K: int, N: int) -> dict[str, dict[str, Product]]:
    """An lm_head that trains; the linear loss rounds its products where the C++ backend has them."""
    ways = {name: by_mode(*pair) for name, pair in factors(rows, K, N).items()}
    for name, product in loss_products(torch.randn(N, K), rows).items():
        ways[name]["rounded"] = partial(in_bf16_way, "bf16", product) if cpp.has_products() else ways[name]["bf16"]
    return ways


def factors(rows: int, K: int, N: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    x, weight, grad = torch.randn(rows, K), torch.randn(N, K), torch.randn(rows, N)
    return {"forward": (x, weight.t()), "by data": (grad, weight), "by weight": (grad.t(), x)}


def by_mode(a: torch.Tensor, b: torch.Tensor) -> dict[str, Product]:
    """An fp32 product in each mode of torch."""
    return {mode: partial(in_mode, mode, a, b) for mode in get_args(Mode)}


def in_mode(mode: str, a: torch.Tensor, b: torch.Tensor) -> None:
    with fp32_products(mode):
        torch.mm(a, b)


def rounded(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.mm(a.bfloat16(), b.bfloat16()).float()


def in_bf16_way(way: Any, product: Product) -> None:
    with bf16_way(way):
        product()


def loss_products(weight: torch.Tensor, rows: int) -> dict[str, Product]:
    """The linear loss's products with an lm_head [V, H], rounded to bf16."""
    N, K = weight.shape
    hidden, grad = torch.randn(rows, K).to(weight.dtype), torch.randn(rows, N)
    out, total = torch.empty(rows, N), torch.empty(N, K)
    made = HeadProducts(weight, None, torch.bfloat16)
    return {
        "forward": lambda: made.logits(hidden, out),
        "by data": lambda: made.hidden_grad(grad, torch.float32),
        "by weight": lambda: weight_grad_(total, grad, hidden, torch.bfloat16, add=False),
    }


def layers(rows: int, K: int, N: int) -> dict[str, dict[str, Product]]:
    """A layer that does not train."""
    x, ways = torch.randn(rows, K), {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        layer = nn.Linear(K, N, bias=False)
        freeze_linears(layer, dtype)
        ways[name] = partial(layer, x)
    return {"forward": ways}


def head(rows: int, K: int, N: int) -> dict[str, dict[str, Product]]:
    """A bf16 lm_head in the linear loss."""
    ways = ("fp32", "bf16") if cpp.has_products() else ("fp32",)
    made = loss_products(torch.randn(N, K).bfloat16(), rows)
    return {name: {way: partial(in_bf16_way, way, product) for way in ways} for name, product in made.items()}


def measured(options: argparse.Namespace, chosen: CpuProducts) -> tuple[list[list[Any]], dict[str, dict[str, float]]]:
    """The table's rows, and each part's seconds by way, summed."""
    hidden, inner, vocabulary = options.hidden, options.intermediate, options.vocabulary
    shapes = {"layer": (hidden, inner), "lm_head": (hidden, vocabulary)}
    parts = [("trained", "layer", trained), ("trained", "lm_head", trained_lm_head)]
    parts += [("layers", "layer", layers), ("head", "lm_head", head)]
    table, sums = [], {name: {} for name in ("trained", "layers", "head")}
    for part, shape, make in parts:
        K, N = shapes[shape]
        for rows in options.rows:
            if shape == "lm_head" and rows > HEAD_ROWS:
                continue
            for product, ways in make(rows, K, N).items():
                seconds = least(ways, options.repeats)
                for way, value in seconds.items():
                    sums[part][way] = sums[part].get(way, 0.0) + value
                speeds = {way: 2e-9 * rows * K * N / value for way, value in seconds.items()}
                said = ", ".join(f"{way} {speed:.0f}" for way, speed in speeds.items())
                taken = getattr(chosen, part)
                table.append([f"{part}, {shape}", rows, product, said, taken, seconds[taken] / min(seconds.values())])
    return table, sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 576), ("intermediate", 1536), ("vocabulary", 49152), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", default="64,256,1024", help="with commas between")
    options = parser.parse_args()
    options.rows = [int(rows) for rows in options.rows.split(",")]
    facts = machine("cpu")
    start = time.perf_counter()
    chosen = decide(measure_speeds(Shapes(options.hidden, options.intermediate, options.vocabulary)))
    seconds = time.perf_counter() - start
    torch.set_num_threads(1)
    rows, sums = measured(options, chosen)
    ratios = {part: ways[getattr(chosen, part)] / min(ways.values()) for part, ways in sums.items()}
    wrong = {part: ratio for part, ratio in ratios.items() if ratio > MOST}
    said = ", ".join(f"{part} {getattr(chosen, part)} {ratio:.3f}" for part, ratio in ratios.items())
    table = {
        "title": f"Precision on one core, hidden {options.hidden}, intermediate {options.intermediate},"
        f" vocabulary {options.vocabulary}",
        "claim": "What `--precision auto` takes on a CPU is within 5 % of the fastest way to multiply.",
        "columns": ["what", "rows", "product", "GFLOP/s", "chosen", "its time over the least"],
        "rows": rows,
        "note": [
            f"Chosen in {seconds:.2f} s. Its time over the least, all rows and products: {said}.",
            "trained: fp32 weights in torch's modes, of which bf16 (oneDNN's) rounds"
            f" {'to bf16' if rounds_to_bf16() else 'nothing'} here, or rounded"
            " before the product; layers: weights that do not train; head: a bf16 lm_head.",
        ],
    }
    save({"machine": facts, "tables": [table]}, "precision.json")
    print(facts["device"])
    print(console(table))
    if wrong:
        raise SystemExit(f"more than 5 % over the fastest: {wrong}")


if __name__ == "__main__":
    main()
