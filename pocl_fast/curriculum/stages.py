"""The curriculum: an order of the samples, easy first, and the stages that bring them in.

Knows scores and sample indices. Does not know models, texts or training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pocl_fast.curriculum.competence import Competence
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_text

if TYPE_CHECKING:
    from pocl_fast.curriculum.fusion import Ties
    from pocl_fast.curriculum.scores import SignalScores
    from pocl_fast.data.encoded import EncodedSample

WRITTEN_AT_ONCE = 1 << 13  # samples
SHUFFLED = (1 << 62) + 1  # a stream of random numbers for the order of "random", apart from those of the passes


@dataclass(frozen=True)
class Stage:
    """One stage: it trains on the `size` easiest samples, at one temperature and one weight alpha of cross-entropy."""

    index: int
    size: int
    temperature: float
    alpha: float


@dataclass(frozen=True)
class Curriculum:
    """Sample indices, easiest first, each with its fused score, and the stages over them."""

    order: np.ndarray  # [samples] int64; distinct, with gaps where samples were left out
    score: np.ndarray  # [samples] float64: score[i] is that of sample order[i]
    stages: tuple[Stage, ...]

    def subset(self, stage: int) -> np.ndarray:
        """The sample indices that a stage trains on, easiest first: [stages[stage].size] int64."""
        return self.order[: self.stages[stage].size]

    def save(self, path: str | Path) -> None:
        """Writes JSON, under a temporary name first: a crash leaves the old file or the new one, never half of one.
        Beyond the curriculum itself, memory is that of a few thousand samples."""
        write_text(Path(path), self._json())

    def _json(self) -> Iterator[str]:
        yield '{"stages": ' + json.dumps([asdict(s) for s in self.stages])
        for name, array in (("order", self.order), ("score", self.score)):
            yield f', "{name}": ['
            for start in range(0, len(array), WRITTEN_AT_ONCE):
                piece = array[start : start + WRITTEN_AT_ONCE].tolist()  # their Python objects take 10 times the array
                yield (", " if start else "") + json.dumps(piece)[1:-1]
            yield "]"
        yield "}"

    @classmethod
    def load(cls, path: str | Path) -> Curriculum:
        """Reads what `save` wrote. Raises `InputError` where the file is missing or its content is not a curriculum."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            stages = tuple(Stage(**stage) for stage in record["stages"])
            return _checked(cls(np.array(record["order"]), np.array(record["score"], dtype=np.float64), stages))
        except FileNotFoundError as error:
            raise InputError(f"{path} is not there: run `pocl-fast rank` first") from error
        except KeyError as error:
            raise InputError(
                f"{path} is not a curriculum (it lacks {error}); delete it and run `pocl-fast rank` again"
            ) from error
        except (OSError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is not a curriculum ({error}); delete it and run `pocl-fast rank` again"
            ) from error


def baby_steps(
    order: np.ndarray,
    score: np.ndarray,
    *,
    stages: int = 4,
    temperatures: Sequence[float] = (1.0, 2.0),
    alphas: Sequence[float] = (0.3, 0.0),
) -> Curriculum:
    """The Baby-Step schedule: stage i of n trains on the easiest ⌊N/n⌋·(i+1) samples, the last on all N.

    `order` [N] lists the sample indices, easiest first, and `score` [N] their fused scores in the same order.
    `temperatures` and `alphas` are one value for each stage, or the first and the last stage's with the others linear
    between them, to two decimals (a single stage takes the first). The defaults are the paper's: temperature 1, 1.33,
    1.67, 2 and alpha 0.3, 0.2, 0.1, 0.

    Raises ValueError for fewer samples than stages, no stages, a temperature that is not positive, an alpha outside
    0 to 1, and arrays that do not fit each other. (arXiv 2506.05695, section 3.2.)
    """
    return _staged(order, score, stage_sizes(len(order), stages), temperatures, alphas)


def stage_sizes(samples: int, stages: int) -> list[int]:
    """How many samples each Baby-Step stage has. Raises ValueError for fewer samples than stages, and no stages."""
    if stages < 1:
        raise ValueError(f"stages must be at least 1, got {stages}")
    if stages > samples:
        raise ValueError(f"{samples} samples cannot fill {stages} stages: give more samples or fewer stages")
    return [samples // stages * (i + 1) for i in range(stages - 1)] + [samples]


def competent_stages(
    order: np.ndarray,
    score: np.ndarray,
    competence: Competence,
    *,
    stages: int = 4,
    temperatures: Sequence[float] = (1.0, 2.0),
    alphas: Sequence[float] = (0.3, 0.0),
) -> Curriculum:
    """Stages of equally many steps, within which the share of samples that may be drawn grows on: a stage's size is
    what it may draw at its end, the last one's all. Otherwise as `baby_steps`."""
    N = len(order)
    stage_sizes(N, stages)  # refuses
    sizes = [competence.allowed((i + 1) / stages, N) for i in range(stages - 1)] + [N]
    return _staged(order, score, sizes, temperatures, alphas)


def _staged(
    order: np.ndarray, score: np.ndarray, sizes: Sequence[int], temperatures: Sequence[float], alphas: Sequence[float]
) -> Curriculum:
    stages = len(sizes)
    settings = zip(sizes, _spread("temperatures", temperatures, stages), _spread("alphas", alphas, stages), strict=True)
    made = tuple(Stage(i, size, temperature, alpha) for i, (size, temperature, alpha) in enumerate(settings))
    return _checked(Curriculum(np.asarray(order), np.asarray(score, dtype=np.float64), made))


def no_curriculum(num_samples: int, *, temperature: float, alpha: float) -> Curriculum:
    """All samples from the start, in file order and one stage; every score is 0.

    Raises ValueError for no samples, a temperature that is not positive and an alpha outside 0 to 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    stage = Stage(0, num_samples, float(temperature), float(alpha))
    return _checked(Curriculum(np.arange(num_samples), np.zeros(num_samples), (stage,)))


class StageSettings(Protocol):
    """What options say about stages."""

    @property
    def curriculum(self) -> str: ...
    @property
    def stages(self) -> int: ...
    @property
    def rrf_k(self) -> float: ...
    @property
    def ties(self) -> Ties: ...
    @property
    def temperature(self) -> Sequence[float]: ...
    @property
    def alpha(self) -> Sequence[float]: ...
    @property
    def pacing(self) -> str: ...
    @property
    def initial_competence(self) -> float: ...
    @property
    def full_competence(self) -> float: ...


def is_measured(settings: StageSettings) -> bool:
    """Whether the order is that of measured difficulty; else nothing is measured for it."""
    return settings.curriculum in ("pocl", "reverse")


def make_curriculum(known: SignalScores, settings: StageSettings) -> Curriculum:
    """Stages of the samples by reciprocal rank fusion of their scores; of "reverse" the hardest come first. Raises as
    `stages_over` does."""
    fused = known.fused(settings.rrf_k, settings.ties)
    order = fused.order[::-1] if settings.curriculum == "reverse" else fused.order
    # samples that were left out leave gaps in the index
    return stages_over(known.index[order], fused.score[order], settings)


def unmeasured_curriculum(samples: Sequence[EncodedSample], settings: StageSettings, *, seed: int) -> Curriculum:
    """Stages of the samples without their difficulty: for "none" one stage in file order; for "random" an order that
    `seed` shuffles; for "length" the fewest supervised tokens first (of equal ones the fewest tokens in all, then file
    order), which are the score. Raises as `stages_over` does."""
    index = np.array([sample.index for sample in samples], dtype=np.int64)
    score = np.zeros(len(index))
    if settings.curriculum == "random":
        index = np.random.Generator(np.random.Philox(key=[seed, SHUFFLED])).permutation(index)
    elif settings.curriculum == "length":
        supervised = np.array([sample.supervised_count for sample in samples], dtype=np.float64)
        order = np.lexsort((index, np.array([len(sample) for sample in samples]), supervised))
        index, score = index[order], supervised[order]
    return stages_over(index, score, settings)


def check_unmeasured(
    given: Curriculum, samples: Sequence[EncodedSample], settings: StageSettings, *, seed: int
) -> None:
    """Raises `InputError` where a curriculum whose order is not measured is not the one that these settings make of its
    samples: a control would be trained along another order than it is called by."""
    listed = set(given.order.tolist())
    made = unmeasured_curriculum([one for one in samples if one.index in listed], settings, seed=seed)
    if len(made.stages) != len(given.stages) or not np.array_equal(made.order, given.order):
        shuffled = f" (shuffled by seed {seed})" if settings.curriculum == "random" else ""
        raise InputError(
            f"curriculum={settings.curriculum!r} makes {len(made.stages)} stages over an order of its own{shuffled},"
            " and another curriculum is given beside it: give one of the two"
        )


def paces_by_competence(settings: StageSettings) -> bool:
    """Whether harder samples come in with every step. Where "auto" means something else, whoever knows that has settled
    it."""
    return settings.pacing != "baby-steps" and settings.curriculum != "none"


def stages_over(order: np.ndarray, score: np.ndarray, settings: StageSettings) -> Curriculum:
    """The stages over samples in this order, easiest first. Raises `InputError` for settings that do not fit them."""
    named: dict[str, Any] = {"temperatures": settings.temperature, "alphas": settings.alpha, "stages": settings.stages}
    try:
        if settings.curriculum == "none":
            plain = no_curriculum(len(order), temperature=settings.temperature[0], alpha=settings.alpha[0])
            return replace(plain, order=order)
        if paces_by_competence(settings):
            competence = Competence(settings.initial_competence, settings.full_competence)
            return competent_stages(order, score, competence, **named)
        return baby_steps(order, score, **named)
    except ValueError as error:
        raise InputError(f"--stages, --temperature or --alpha: {error}") from error


def control_line(settings: StageSettings) -> str:
    """What a training beside "pocl" differs in; empty for "pocl" with the paper's pacing, and for "none" in place of
    one stage, which is the same."""
    if settings.curriculum == "none" and settings.stages == 1:
        return ""
    stages = f"the {settings.stages} stages of pocl"
    said = {
        "none": f"all samples from the start, for as many steps as {stages} have",
        "random": f"{stages}, over an order that the seed shuffles",
        "reverse": f"{stages}, the hardest samples first",
        "length": f"{stages}, the samples with the fewest supervised tokens first",
    }
    parts = [f"curriculum {settings.curriculum}: {said[settings.curriculum]}"] if settings.curriculum in said else []
    if settings.curriculum == "none":
        both = {"temperature": settings.temperature, "alpha": settings.alpha}
        first = [name for name, values in both.items() if len(set(values)) > 1]
        parts.append(" and ".join(f"{name} {values[0]:g}" for name, values in both.items()) + " throughout")
        parts[-1] += f" ({' and '.join(first)}: the first value given)" if first else ""
    if paces_by_competence(settings):
        parts.append(
            f"pacing competence: the easiest {100 * settings.initial_competence:g} % at first, growing to all of them"
            f" after {100 * settings.full_competence:g} % of the steps; stages of equally many steps"
        )
    return "; ".join(parts)


def _spread(name: str, given: Sequence[float], stages: int) -> list[float]:
    """One value a stage; two decimals between the ends, as the paper's scripts have them."""
    values = [float(value) for value in given]
    if len(values) == stages:
        return values
    if len(values) != 2:
        raise ValueError(
            f"{name} must be the first and the last value or one for each of {stages} stages, got {len(values)} values"
        )
    first, last = values
    between = [round(first + (last - first) * i / (stages - 1), 2) for i in range(1, stages - 1)]
    return [first, *between, last][:stages]


def _repeats(order: np.ndarray) -> bool:
    """Whether a number is there twice; np.unique's table of 10 million takes half a gigabyte."""
    ascending = np.sort(order)
    return bool((ascending[1:] == ascending[:-1]).any())


def _checked(curriculum: Curriculum) -> Curriculum:
    """The curriculum, its order in int64. Raises ValueError where its parts do not fit or a setting is out of range."""
    order, score, stages = curriculum.order, curriculum.score, curriculum.stages
    if order.ndim != 1 or order.dtype.kind not in "iu" or _repeats(order):
        raise ValueError("order must list each sample index once, as integers")
    if score.shape != order.shape:
        raise ValueError(f"order and score must be of one length, got shapes {order.shape} and {score.shape}")
    sizes = [stage.size for stage in stages]
    if not sizes or sizes[0] < 1 or sizes[-1] != len(order) or sizes != sorted(sizes):
        raise ValueError(f"the stages' sizes must rise from at least 1 to all {len(order)} samples, got {sizes}")
    for i, stage in enumerate(stages):
        if stage.index != i:
            raise ValueError(f"stage {i} has the index {stage.index}")
        if not 0 < stage.temperature < np.inf:
            raise ValueError(f"stage {i}: temperature must be positive and finite, got {stage.temperature}")
        if not 0 <= stage.alpha <= 1:
            raise ValueError(f"stage {i}: alpha must be within 0 to 1, got {stage.alpha}")
    return Curriculum(order.astype(np.int64, copy=False), score, stages)
