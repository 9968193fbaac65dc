"""`Objective`: the one description of a distillation loss, which every backend is given."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torch import Tensor

Divergence: TypeAlias = Literal["forward_kl", "reverse_kl"]
TemperatureScaling: TypeAlias = Literal["auto", "none", "tau", "tau2"]

DIVERGENCES = ("forward_kl", "reverse_kl")
SCALINGS = ("auto", "none", "tau", "tau2")


@dataclass(frozen=True)
class Objective:
    """`alpha · CE(student, label) + (1 - alpha) · c(temperature) · D(teacher, student)` for each supervised token.

    CE is at temperature 1; D compares q = softmax(student / temperature) with p = softmax(teacher / temperature):
    `forward_kl` is KL(p‖q), `reverse_kl` is KL(q‖p). c is `temperature_scaling`: "none" 1, "tau" τ, "tau2" τ², and
    "auto" what keeps the gradient's size when τ changes, τ² for both. `temperature` and `alpha` are numbers, or
    tensors of one value or one a token; a new value never compiles anything again. `beta` and `skew` are the weights
    of divergences that mix p and q: neither KL reads them. (arXiv 2506.05695, equations 1 to 4; arXiv 1503.02531 for
    τ².)

    Raises ValueError for a name that does not exist, a temperature that is not positive, an alpha outside 0 to 1, or
    a beta or skew not between 0 and 1. Tensors are taken as they are: looking into them would stop a GPU.
    """

    divergence: Divergence = "forward_kl"
    temperature: float | Tensor = 1.0
    alpha: float | Tensor = 0.0
    beta: float = 0.5
    skew: float = 0.1
    temperature_scaling: TemperatureScaling = "auto"

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {self.divergence!r}")
        if self.temperature_scaling not in SCALINGS:
            raise ValueError(
                f"temperature_scaling must be one of {', '.join(SCALINGS)}; got {self.temperature_scaling!r}"
            )
        if not isinstance(self.temperature, Tensor) and not (0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not isinstance(self.alpha, Tensor) and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha, the weight of cross-entropy, must be within 0 to 1, got {self.alpha}")
        for name, value in (("beta", self.beta), ("skew", self.skew)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must be above 0 and below 1, got {value}")

    @property
    def temperature_power(self) -> int:
        """The p of c(τ) = τ^p, with "auto" resolved."""
        return {"auto": 2, "none": 0, "tau": 1, "tau2": 2}[self.temperature_scaling]

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Objective:
        """A published setting by name, with `changes` to its fields.

        "paper:forward_kl" and "paper:reverse_kl" are the first stage of POCL's code, which scales forward KL by τ² and
        reverse KL not at all.
        """
        if name not in _PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(_PRESETS)}")
        return replace(_PRESETS[name], **changes)


_PRESETS = {
    "paper:forward_kl": Objective("forward_kl", temperature=1.0, alpha=0.3, temperature_scaling="tau2"),
    "paper:reverse_kl": Objective("reverse_kl", temperature=1.0, alpha=0.3, temperature_scaling="none"),
}
