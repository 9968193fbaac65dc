"""Which trainings the study of benchmarks/study.py compares: methods, each with the options of its training.

Knows options alone. A method is trained once a seed; all methods of a part take equally many optimizer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pocl_fast.options.presets import PRESETS

# name -> the divergence; "gkd" is what GKD trains on: half of its batches are the student's own answers
OBJECTIVES: dict[str, dict[str, Any]] = {
    "forward_kl": {"divergence": "forward_kl"},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.5},
    "tvd": {"divergence": "tvd"},
    "skew_forward_kl": {"divergence": "skew_forward_kl"},
    "skew_reverse_kl": {"divergence": "skew_reverse_kl"},
    "gkd": {"divergence": "jsd", "beta": 0.5, "rollouts": "gkd"},
}
# of the paper's recipe its curriculum; nothing is evaluated on the way
OF_CURRICULUM = (
    "curriculum",
    "pacing",
    "stages",
    "temperature",
    "alpha",
    "fresh_optimizer",
    "fresh_learning_rate",
    "ties",
)
PAPER: dict[str, Any] = {name: PRESETS["paper"][name] for name in OF_CURRICULUM} | {"stage_weights": "last"}
NONE: dict[str, Any] = {
    "curriculum": "none", "temperature": [1.0], "alpha": [0.3], "fresh_optimizer": False, "fresh_learning_rate": False,
}  # fmt: skip
ONE_COSINE = {"fresh_optimizer": False, "fresh_learning_rate": False}
TEACHER_GENERATES = 48  # tokens of an answer to learn; more do not fit beside the longest prompts
WITHOUT_ORDER = "forward_kl, random order"
EARLY_END = {"pacing": "competence", "initial_competence": 0.4, "full_competence": 0.3}  # shares of samples, of steps
STEADY = {"temperature": [1.0, 1.0], "alpha": [0.3, 0.3]}  # neither a rising temperature nor a falling alpha


@dataclass(frozen=True)
class Method:
    """A method of the study: the options of its training, beside those that all have."""

    name: str
    part: str
    options: Mapping[str, Any] = field(default_factory=dict)
    teacher: bool = True
    passes: float | None = None  # over all samples, where a part gives them
    whole: bool = False  # all samples from the first step, in stages of the same settings and lengths


def main_part() -> list[Method]:
    """Each objective with the paper's curriculum, with its stages over a random order, and without; two baselines."""
    made = []
    for name, objective in OBJECTIVES.items():
        made.append(Method(f"{name}, pocl", "main", PAPER | objective))
        made.append(Method(f"{name}, random order", "main", PAPER | objective | {"curriculum": "random"}))
        made.append(Method(f"{name}, none", "main", NONE | objective))
    made.append(Method("sft", "main", NONE | {"alpha": [1.0]}, teacher=False))
    answers = {"data_source": "teacher", "max_new_tokens": TEACHER_GENERATES}
    made.append(Method("sequence-level KD", "main", NONE | {"alpha": [1.0]} | answers))
    return made


def parts_part() -> list[Method]:
    """The paper's curriculum with each of its parts switched off alone; forward KL. Without the order it is a method of
    the main part: see `WITHOUT_ORDER`."""
    off: dict[str, dict[str, Any]] = {
        "rising temperature": {"temperature": [1.0, 1.0]},
        "falling alpha": {"alpha": [0.3, 0.3]},
        "fresh optimizer": {"fresh_optimizer": False},
        "restarted cosine": {"fresh_learning_rate": False},
        "fresh optimizer and restarted cosine": ONE_COSINE,
        "all but order and growing subsets": ONE_COSINE | STEADY,
    }
    whole = Method("without growing subsets", "parts", PAPER, whole=True)
    return [whole, *(Method(f"without {name}", "parts", PAPER | changed) for name, changed in off.items())]


def pacing_part() -> list[Method]:
    """Other pacings of the same order, each with one cosine over all; forward KL."""
    base = PAPER | ONE_COSINE | STEADY | {"ties": "average"}
    pacings: dict[str, dict[str, Any]] = {
        "baby steps": {},
        "baby steps, equal stages": {"stage_length": "equal"},
        "competence": {"pacing": "competence"},
        "competence, early end": EARLY_END,
        "competence, early end, random order": EARLY_END | {"curriculum": "random"},
        "competence, random order": {"pacing": "competence", "curriculum": "random"},
        "competence, hard first": {"pacing": "competence", "curriculum": "reverse"},
        "competence, short first": {"pacing": "competence", "curriculum": "length"},
        "competence, rising temperature": {"pacing": "competence", "temperature": [1.0, 2.0]},
        "competence, falling alpha": {"pacing": "competence", "alpha": [0.3, 0.0]},
    }
    return [Method(name, "pacing", base | changed) for name, changed in pacings.items()]


def budget_part(passes: Sequence[float] = (2.5, 5, 20)) -> list[Method]:
    """The paper's curriculum, none, and competence that ends early, at other numbers of passes; forward KL."""
    early_end = PAPER | ONE_COSINE | STEADY | {"ties": "average"} | EARLY_END
    kinds = {"pocl": PAPER, "none": NONE, "competence, early end": early_end}
    return [
        Method(f"{name}, {count:g} passes", f"{count:g} passes", options, passes=count)
        for count in passes
        for name, options in kinds.items()
    ]


PARTS = {"main": main_part, "parts": parts_part, "pacing": pacing_part, "budgets": budget_part}
