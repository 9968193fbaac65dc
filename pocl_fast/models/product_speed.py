"""How fast a core of this CPU multiplies in fp32 and in bf16, by timing, and which of them is then taken for what.

Knows the sizes of a model's matrices and each way in which a run multiplies them. Does not know where a choice is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from pocl_fast.loss.lm_head_products import Bf16Way, bf16_ways, trained_head
from pocl_fast.models.frozen import freeze_linears
from pocl_fast.system.fp32_products import faster, fp32_products, least_seconds, rounds_to_bf16

Name = Literal["fp32", "bf16"]
Mode = Literal["ieee", "bf16"]  # torch's names: MKL's exact products, and oneDNN's, which may round their inputs
Trained = Literal["ieee", "bf16", "rounded"]  # weights that train: in a mode, or rounded by us (rounded.py)
ROWS, HEAD_ROWS = 256, 64  # of a product; at 1,024 rows the speeds are within 10 % of these
FLOP = 150_000_000  # of a product at most, so that a round of all of them takes about 40 ms at 80 GFLOP/s
BUDGET = 0.25  # seconds
SMALL = 1 << 16  # weights of a layer, below which a product is little but its start


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model's matrices; SmolLM2-135M's where no model is known yet."""

    hidden: int = 576
    intermediate: int = 1536
    vocabulary: int = 49152

    @classmethod
    def of(cls, config: Any) -> Shapes:
        """Those of a transformers configuration. A size that it does not name stays as above, the intermediate one four
        times the hidden one."""
        text = config.get_text_config()

        def size(name: str, default: int) -> int:
            value = getattr(text, name, None)
            return value if isinstance(value, int) and value > 0 else default

        hidden = size("hidden_size", cls.hidden)
        return cls(hidden, size("intermediate_size", 4 * hidden), size("vocab_size", cls.vocabulary))

    @property
    def are_small(self) -> bool:
        """Whether products are so small that no precision is faster."""
        return self.hidden * self.intermediate < SMALL


@dataclass(frozen=True)
class CpuProducts:
    """How a CPU multiplies: weights that train, layers that do not, and bf16 lm_heads in the linear loss."""

    trained: Trained
    layers: Name
    head: Bf16Way

    @property
    def name(self) -> Name:
        """Whether anything is rounded to bf16 that was fp32."""
        return "bf16" if "bf16" in (self.layers, self.of_training) else "fp32"

    @property
    def of_training(self) -> Name:
        """In what weights that train are multiplied."""
        by_mode = self.trained == "bf16" and rounds_to_bf16()
        return "bf16" if self.trained == "rounded" or by_mode else "fp32"

    @property
    def mode(self) -> Mode:
        """The mode of fp32 products: where layers are rounded, oneDNN's for what else there is."""
        return "bf16" if self.trained == "rounded" else self.trained

    @classmethod
    def from_json(cls, record: Any) -> CpuProducts:
        """Raises ValueError for what `asdict` has not made."""
        fields = {"trained": get_args(Trained), "layers": get_args(Name), "head": get_args(Bf16Way)}
        if not isinstance(record, dict) or any(record.get(name) not in known for name, known in fields.items()):
            raise ValueError(f"{record!r}")
        return cls(*(record[name] for name in fields))


@dataclass(frozen=True)
class Speeds:
    """GFLOP/s of one core in each way to multiply, by what is multiplied."""

    trained: dict[Trained, float]
    layers: dict[Name, float]
    head: dict[Bf16Way, float]
    rounds: bool  # whether mode "bf16" rounds here


def decide(speeds: Speeds) -> CpuProducts:
    """The fastest way for each, the exact one where that is within 5 % of it. For weights that train first the faster
    mode (oneDNN's is the usual one where no mode rounds), then rounding where it is faster than that."""
    modes = {mode: speeds.trained[mode] for mode in get_args(Mode)}
    mode = _faster(modes, "ieee" if speeds.rounds else "bf16")
    return CpuProducts(
        trained=_faster({mode: modes[mode], "rounded": speeds.trained["rounded"]}, mode),
        layers=_faster(speeds.layers, "fp32"),
        head=_faster(speeds.head, "fp32"),
    )


def describe(chosen: CpuProducts, speeds: Speeds) -> str:
    """The choice and its reason, in a line."""
    layers = _compared(speeds.layers, chosen.layers)
    names = _NAMES | ({"bf16": "bf16 by oneDNN's mode"} if speeds.rounds else {})
    trained = f"{names[chosen.trained]}: {_compared(speeds.trained, chosen.trained, names)}"
    return (
        f"precision: {chosen.layers} for layers that do not train: their products run at {layers}; for weights that"
        f" train {trained}"
    )


_NAMES = {"ieee": "fp32 by torch's default library", "bf16": "fp32 by oneDNN", "rounded": "bf16 by rounding layers"}


def _compared(speeds: dict[Any, float], chosen: str, names: dict[str, str] | None = None) -> str:
    others = [f"{(names or {}).get(way, way)} at {speed:.0f}" for way, speed in speeds.items() if way != chosen]
    return ", ".join([f"{speeds[chosen]:.0f} GFLOP/s a core here", *others])


def _faster(speeds: dict[Any, float], usual: Any) -> Any:
    return faster({way: 1 / speed for way, speed in speeds.items()}, usual)


def measure_speeds(shapes: Shapes) -> Speeds:
    """Times every way, in turns, for about `BUDGET` seconds."""
    parts = {"trained": _trained(shapes), "layers": _layers(shapes), "head": _head(shapes)}
    trials = {f"{part} {way}": work for part, (ways, _) in parts.items() for way, work in ways.items()}
    seconds = least_seconds(trials, BUDGET)
    speeds = {
        part: {way: flop / seconds[f"{part} {way}"] / 1e9 for way in ways} for part, (ways, flop) in parts.items()
    }
    return Speeds(**speeds, rounds=rounds_to_bf16())  # type: ignore[arg-type]


Factors = tuple[torch.Tensor, torch.Tensor]
Ways = tuple[dict[Any, Callable[[], object]], float]  # and the floating-point operations of one


def _cropped(rows: int, K: int, N: int) -> tuple[int, int]:
    """[rows, K] by [K, N] with no more than `FLOP`."""
    K = min(K, 1024)
    return K, min(N, max(64, FLOP // (2 * rows * K)))


def _filled(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)  # random numbers take longer than products


def _trained(shapes: Shapes) -> Ways:
    """A layer's and the lm_head's products, forward and backward: as torch computes them in each mode, and rounded as
    layers and the linear loss do it."""
    pairs: list[Factors] = []
    flop = 0.0
    for rows, columns in ((ROWS, shapes.intermediate), (HEAD_ROWS, shapes.vocabulary)):
        K, N = _cropped(rows, shapes.hidden, columns)
        x, weight, grad = _filled(rows, K), _filled(N, K), _filled(rows, N)
        pairs += [(x, weight.t()), (grad, weight), (grad.t(), x)]
        flop += 3 * 2 * rows * K * N
    head = trained_head(HEAD_ROWS, N, K)

    def multiply(mode: Mode) -> None:
        with fp32_products(mode):
            for a, b in pairs:
                torch.mm(a, b)

    def rounded() -> None:
        with fp32_products("bf16"):
            for a, b in pairs[:3]:  # the layer's
                torch.mm(a.bfloat16(), b.bfloat16()).float()
            head()

    return {mode: partial(multiply, mode) for mode in get_args(Mode)} | {"rounded": rounded}, flop


def _layers(shapes: Shapes) -> Ways:
    """Two layers that do not train, as `freeze_linears` lays them out."""
    K, N = _cropped(ROWS, shapes.hidden, shapes.intermediate)
    x = _filled(ROWS, K)

    def frozen(dtype: torch.dtype) -> Callable[[], object]:
        two = nn.Sequential(*(nn.Linear(*sizes, bias=False, device="meta") for sizes in ((K, N), (N, K))))
        for layer, sizes in zip(two, ((N, K), (K, N)), strict=True):
            layer.weight = nn.Parameter(_filled(*sizes), requires_grad=False)
        freeze_linears(two, dtype)
        return partial(two, x)

    return {"fp32": frozen(torch.float32), "bf16": frozen(torch.bfloat16)}, 2 * 2 * ROWS * K * N


def _head(shapes: Shapes) -> Ways:
    """A bf16 lm_head's products in the linear loss."""
    K, N = _cropped(HEAD_ROWS, shapes.hidden, shapes.vocabulary)
    return dict(bf16_ways(HEAD_ROWS, N, K)), 3 * 2 * HEAD_ROWS * K * N
