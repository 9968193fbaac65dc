"""`Objective`: the one description of a distillation loss, which every backend is given."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from pocl_fast.loss.kinds import check_number, described

Divergence: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]
TemperatureScaling: TypeAlias = Literal["auto", "none", "tau", "tau2"]

DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
SCALINGS: tuple[TemperatureScaling, ...] = get_args(TemperatureScaling)


@dataclass(frozen=True)
class Objective:
    """`alpha · CE(student, label) + (1 - alpha) · c(temperature) · D(teacher, student)` for each supervised token.

    CE is at temperature 1; D compares q = softmax(student / temperature) with p = softmax(teacher / temperature):

    - `forward_kl`: KL(p‖q); `reverse_kl`: KL(q‖p)
    - `jsd`: beta · KL(p‖m) + (1 - beta) · KL(q‖m), m = beta · p + (1 - beta) · q; beta, the teacher's weight, 0 *means*
      forward KL and 1 reverse KL, as in GKD (arXiv 2306.13649)
    - `skew_forward_kl`: KL(p‖skew · p + (1 - skew) · q); `skew_reverse_kl`: KL(q‖(1 - skew) · p + skew · q)
      (DistiLLM, arXiv 2402.03898)
    - `tvd`: ½ Σ|p - q|

    c is `temperature_scaling`: "none" 1, "tau" τ, "tau2" τ², and "auto" what keeps the gradient's size when τ changes:
    τ for tvd, τ² for the others. `temperature` and `alpha` are numbers, or tensors of one value or one a token; a new
    value never compiles anything again. One of beta or skew compiles no kernel again, but torch.compile goes over a
    function that it reaches as a number. (arXiv 2506.05695, equations 1 to 4; arXiv 1503.02531 for τ².)

    Raises TypeError for what is not a number, and ValueError for a name that does not exist, a temperature that is not
    positive, an alpha or beta outside 0 to 1, or a skew not between 0 and 1. Tensors are taken as they are: looking
    into them would stop a GPU.
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
        for name in ("temperature", "alpha", "beta", "skew"):
            check_number(name, getattr(self, name))
        if not isinstance(self.temperature, Tensor) and not (0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not isinstance(self.alpha, Tensor) and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha, the weight of cross-entropy, must be within 0 to 1, got {self.alpha}")
        for name, share in (("beta", self.beta), ("skew", self.skew)):
            if isinstance(share, Tensor):
                raise ValueError(f"{name} must be a number, not a tensor: it chooses what is computed")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta, the teacher's weight in jsd, must be within 0 to 1, got {self.beta}")
        if not 0 < self.skew < 1:
            raise ValueError(f"skew must be above 0 and below 1, got {self.skew}")

    @property
    def family(self) -> Divergence:
        """The divergence that is computed: `jsd` at its ends is a KL."""
        if self.divergence != "jsd" or 0 < self.beta < 1:
            return self.divergence
        return "forward_kl" if self.beta == 0 else "reverse_kl"

    @property
    def teacher_share(self) -> float:
        """The teacher's weight in the mixture m of p and q; without meaning for a divergence that has none."""
        shares = {"jsd": self.beta, "skew_forward_kl": self.skew, "skew_reverse_kl": 1 - self.skew}
        return shares.get(self.divergence, 0.5)

    @property
    def temperature_power(self) -> int:
        """The p of c(τ) = τ^p, with "auto" resolved."""
        auto = 1 if self.divergence == "tvd" else 2
        return {"auto": auto, "none": 0, "tau": 1, "tau2": 2}[self.temperature_scaling]

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Objective:
        """A published setting by name, with `changes` to its fields.

        - "paper:NAME" for each divergence: the first stage of POCL's code, with its scaling: τ² on forward KL, jsd and
          skew reverse KL, none on the others; its jsd weighs the teacher with 0.1.
        - "distillm:NAME" for each, and "distillm" for its skew reverse KL: no temperature, divergence alone.
          (In both codes forward KL and skew forward KL leave out Σ p log p: the value differs by a constant of the
          teacher, the gradient does not.)
        - "trl": the GKD trainer's jsd of beta 0.5, which no temperature enters. "liger": half CE, half jsd of beta 0.5,
          not scaled. "distillkit": half CE, half forward KL, everything scaled by τ².
        """
        if name not in _PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(_PRESETS)}")
        return replace(_PRESETS[name], **changes)


def check_objective(given: Any) -> None:
    """Raises TypeError for what is not an `Objective`: its name, its fields, or its class."""
    if isinstance(given, Objective):
        return
    instead = "Objective(...)"
    if isinstance(given, str):
        instead = f"Objective.preset({given!r})" if given in _PRESETS else "Objective(divergence)"
        if given in DIVERGENCES:
            instead = f"Objective({given!r})"
    elif isinstance(given, dict):
        instead = "Objective(**fields)"
    raise TypeError(f"objective must be an Objective, got {described(given)}; give {instead}")


_PAPER_SCALING: dict[Divergence, TemperatureScaling] = {
    "forward_kl": "tau2",
    "reverse_kl": "none",
    "jsd": "tau2",
    "skew_forward_kl": "none",
    "skew_reverse_kl": "tau2",
    "tvd": "none",
}
_PRESETS = {
    **{
        f"paper:{name}": Objective(name, alpha=0.3, beta=0.1, temperature_scaling=scaling)
        for name, scaling in _PAPER_SCALING.items()
    },
    **{f"distillm:{name}": Objective(name, beta=0.1, temperature_scaling="none") for name in _PAPER_SCALING},
    "distillm": Objective("skew_reverse_kl", temperature_scaling="none"),
    "trl": Objective("jsd", beta=0.5, temperature_scaling="none"),
    "liger": Objective("jsd", alpha=0.5, beta=0.5, temperature_scaling="none"),
    "distillkit": Objective("forward_kl", alpha=0.5, temperature_scaling="tau2"),
}
