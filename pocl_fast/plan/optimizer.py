"""What an optimizer keeps of each weight that it trains: found by one step of it. Knows transformers' optimizers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

SIDE = 256  # of the matrix that is stepped: optimizers of few bits keep small ones whole
ADAM = 8.0  # two fp32 numbers a weight


def state_bytes_a_weight(arguments: Any) -> float | None:
    """Bytes of the optimizer's state for each weight of a matrix; None where the optimizer needs a whole model, or a
    device that is not here."""
    try:
        kind, given = Trainer.get_optimizer_cls_and_kwargs(arguments)
        weight = torch.nn.Parameter(torch.zeros(SIDE, SIDE))
        optimizer = kind([weight], **given)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    except Exception:  # whatever an optimizer that cannot step this raises
        return None
    parts = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in parts if x.dim()) / weight.numel()
