"""Whether a model reads from left to right: whether what it predicts at a token depends on later ones.

Knows transformers' models. Does not know what a model is used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pocl_fast.models.lm_head import causal_lm
from pocl_fast.models.placement import input_device
from pocl_fast.models.probing import DEVICE_ERRORS, apart, is_exact, is_sharded, plain_run, positions_of, random_ids
from pocl_fast.system.errors import InputError, first_line

TOKENS = 8  # of the sample
# of the largest logit: what reads from left to right is exact, but for the rounding of experts' batches
TOLERANCE, TOLERANCE_HALF = 1e-4, 2e-2


def check_left_to_right(model: Any, argument: str) -> None:
    """Raises `InputError` where `model`, given as `argument`, does not run on tokens alone, and where what it predicts
    depends on later tokens, as an encoder's predictions do. One that is sharded already is not checked."""
    inner = causal_lm(model)
    if is_sharded(inner):
        return
    length = min(TOKENS, positions_of(inner.config))
    row = random_ids(inner, 1, length)[0].tolist()
    with plain_run(inner):
        checked_logits(inner, f"{argument} is a", row, length // 2, TOLERANCE if is_exact(inner) else TOLERANCE_HALF)


def checked_logits(model: Any, argument: str, row: Sequence[int], seen: int, allowed: float) -> Tensor:
    """Logits [T, V] fp32 of a row of T tokens, without a cache. Raises `InputError` where the model does not run on
    them, and where the logits of its first `seen` tokens move by more than is `allowed`, relative to the largest, when
    the later tokens are others. What is NaN is not refused here."""
    named = f"{argument} {type(model).__name__}"
    others = random_ids(model, 1, len(row), seed=1)[0].tolist()
    try:
        ids = torch.tensor([list(row), [*row[:seen], *others[seen:]]], device=input_device(model))
        logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    except DEVICE_ERRORS:
        raise
    except Exception as failure:  # whatever a model's own code raises
        why = first_line(failure, named=True)
        raise InputError(
            f"{named} that does not run on tokens alone ({why}). Give a causal language model of text"
        ) from failure
    moved = apart(logits[1, :seen], logits[0, :seen])
    if moved > allowed and not logits.isnan().any():
        raise InputError(
            f"{named} that also looks at later tokens, as an encoder does: a token's logits move by {moved:.2g} of the"
            " largest with the tokens after it, so that what it predicts would be known to it already. Load it as a"
            " decoder (is_decoder=True), or give a causal language model"
        )
    return logits[0]
