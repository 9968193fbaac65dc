"""What transformers makes of each sample by itself: a tiny model of a family in eager attention, and how far off
another result is from it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from families.tiny_families import WINDOW, row_auto_class, row_config, runnable_model
from pocl_fast.data.encoded import EncodedSample

TOLERANCE = 1e-4  # relative, in norm; of fp32 sums in another order 1e-6 are seen
TEMPERATURE, ALPHA = 1.5, 0.5
NEW_TOKENS = 10
PAD = 256
SIZES = ((9, 31), (1, 1), (1, 24), (20, 33))  # tokens of prompt and response: two tokens alone, others beyond WINDOW
assert all(sum(size) > WINDOW for size in SIZES if size != (1, 1))


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


SAMPLES = [
    EncodedSample(i, tuple(random_ids(prompt, 2 * i)), tuple(random_ids(response, 2 * i + 1)), False)
    for i, (prompt, response) in enumerate(SIZES)
]


def ids_of(sample: EncodedSample) -> Tensor:
    return torch.tensor([sample.prompt_ids + sample.response_ids])


def alone(model: Any, samples: Sequence[EncodedSample] = SAMPLES) -> list[Tensor]:
    """Logits [N, V] that predict each sample's response, of the sample by itself."""
    return [_logits(model, ids_of(one))[len(one.prompt_ids) - 1 : -1].float() for one in samples]


def forget(model: Any) -> None:
    """Lets a model whose positions depend on the longest sample it has seen forget that: a short one does."""
    if "dynamic" in str(getattr(model.config.get_text_config(), "rope_parameters", None)):
        with torch.no_grad():
            model(input_ids=torch.tensor([[3]]), use_cache=False)


def _logits(model: Any, ids: Tensor) -> Tensor:
    forget(model)
    return model(input_ids=ids, use_cache=False).logits[0]


@functools.lru_cache(maxsize=2)
def pristine(name: str) -> Any:
    """The family's model in eager attention. Not to be changed: see `eager_copy`."""
    model = runnable_model(name).requires_grad_(True)
    model.generation_config = GenerationConfig(pad_token_id=PAD)  # no end that `_by_transformers` did not ask for
    return model


@functools.lru_cache(maxsize=2)
def logits_alone(name: str) -> list[Tensor]:
    with torch.no_grad():
        return alone(pristine(name))


def eager_copy(name: str) -> Any:
    return copy.deepcopy(pristine(name))


def given(name: str) -> Any:
    """The same model as a user gives it: in the attention that transformers chooses, where that is the same function as
    its eager one (with ALiBi, Falcon's is another)."""
    return _built(name) if _attends_alike(name) else _built(name, attn_implementation="eager")


def _built(name: str, **options: Any) -> Any:
    model = row_auto_class(name).from_config(row_config(name), dtype=torch.float32, **options)
    model.load_state_dict(pristine(name).state_dict(), strict=True)
    model.tie_weights()
    return model.eval().requires_grad_(True)


@functools.lru_cache(maxsize=2)
@torch.no_grad()
def _attends_alike(name: str) -> bool:
    return all(off(got, want) < TOLERANCE for got, want in zip(alone(_built(name)), logits_alone(name), strict=True))


def off(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over that of what is right; NaN where either is."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12))


def check(got: Tensor, want: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, and it should be {tuple(want.shape)}"
    error = off(got, want)
    assert error < tolerance, f"{what} off by {error:.1e} of their norm"


def check_each(got: Sequence[Tensor], want: Sequence[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        check(a, b, f"{what} of sample {i} ({SIZES[i][0]} + {SIZES[i][1]} tokens)")
