"""How much each layer of a model does to the hidden states, and which layers to keep by that.

Knows models' layers and packed rows. Does not know how a model is cut (cut.py), nor what is done with a choice
(layer_choice.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pocl_fast.answers.likelihood import TOKENS_A_BATCH, LoadedModel
from pocl_fast.cutting.cut_check import StatesUnknown, states_of
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.packed import pack, token_budget_batches
from pocl_fast.models.frozen import frozen_linears
from pocl_fast.models.packed_forward import decoder_of, forwards, run_anew
from pocl_fast.system.errors import InputError


@torch.inference_mode()
def block_influence(source: LoadedModel, layers: Sequence[nn.Module], samples: Sequence[EncodedSample]) -> np.ndarray:
    """Of each layer, 1 - the mean cosine of what it is given and what it gives, over all tokens of the samples
    (ShortGPT's block influence, arXiv 2403.03853, equation 1). [layers] float64, from 0 to 2.

    Raises `InputError` where a layer does not take and give hidden states, or does not run.
    """
    model = source.model
    device, sums = next(model.parameters()).device, _Cosines(layers)
    body = decoder_of(model)
    with frozen_linears(model), sums.listening():
        for group in token_budget_batches([len(sample) for sample in samples], max_tokens=TOKENS_A_BATCH):
            batch = pack([samples[i] for i in group]).to(device)
            for part in run_anew(body, forwards(body, batch, source.packed)):
                sums.mask = _padding(part.kwargs)
                try:
                    body(**part.kwargs)
                except StatesUnknown as fault:
                    raise _unmeasured(model, str(fault)) from fault
    if silent := [layer for layer, count in enumerate(sums.tokens) if not count]:
        raise _unmeasured(model, f"its layer {silent[0]} does not run on text")
    return 1 - np.array(sums.cosines) / np.array(sums.tokens)


def _unmeasured(model: Any, why: str) -> InputError:
    return InputError(
        f"the layers of {type(model).__name__} cannot be measured: {why}. Give --layer-choice even, which measures none"
    )


def _padding(kwargs: Mapping[str, Any]) -> Tensor | None:
    """[B, T], 1 where a forward has a token and 0 where padding; None where it has no padding."""
    mask = kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


class _Cosines:
    """The sum of the cosines at each layer, and of how many tokens."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.cosines, self.tokens = [0.0] * len(layers), [0.0] * len(layers)
        self.mask: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the layers' forwards are counted."""
        hooks = [
            layer.register_forward_hook(self._counter(place), with_kwargs=True)
            for place, layer in enumerate(self.layers)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _counter(self, place: int) -> Any:
        def count(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given, hidden = states_of(layer, args, kwargs, output)
            given = given.to(hidden.device)  # a layer that lies on another device is given its states there
            cosine = nn.functional.cosine_similarity(given.float(), hidden.float(), dim=-1)  # [..., B, T]
            weight = torch.ones_like(cosine)
            if self.mask is not None:
                weight = weight * self.mask.to(cosine)
            self.cosines[place] += float((cosine * weight).sum(dtype=torch.float64))
            self.tokens[place] += float(weight.sum(dtype=torch.float64))

        return count


def most_important(scores: Sequence[float] | np.ndarray, keep: int, owners: Mapping[int, int]) -> list[int]:
    """The `keep` layers of the highest scores, ascending; of equal ones the earlier.

    A layer that reads the keys and values of another (`owners`: that one) stays only with it: of all such choices, the
    one with the highest sum.
    """
    possible = []
    kept_owners = sorted({*owners.values()})
    for count in range(min(keep, len(kept_owners)) + 1):
        for chosen in itertools.combinations(kept_owners, count):
            others = [i for i in range(len(scores)) if i not in chosen and owners.get(i, i) in (i, *chosen)]
            best = sorted(others, key=lambda i: (-scores[i], i))[: keep - count]
            if len(best) == keep - count:
                layers = sorted([*chosen, *best])
                possible.append((-sum(float(scores[i]) for i in layers), layers))
    return min(possible)[1]
