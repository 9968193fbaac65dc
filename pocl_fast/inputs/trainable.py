"""A student's weights made ready to train.

Knows precisions. Does not know how they are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pocl_fast.models.lm_head import causal_lm
from pocl_fast.models.probing import is_sharded
from pocl_fast.system.errors import InputError


def check_trains(student: Any) -> None:
    """Raises `InputError` where nothing of a student is to train."""
    if not any(p.requires_grad for p in student.parameters()):
        raise InputError(
            "the student is frozen, none of its weights requires a gradient: call student.requires_grad_(True), or give"
            " a peft_config"
        )


def make_trainable(student: Any, say: Callable[[str], object], *, mixes: bool) -> None:
    """Makes weights in half precision fp32, in place, and tells `say`: those that train, for the optimizer's small
    steps would be rounded away; and all others, unless the device `mixes` precisions by autocast."""
    if is_sharded(student):
        return
    only_trained = mixes or getattr(causal_lm(student), "is_quantized", False)
    half = [
        p
        for p in student.parameters()
        if p.is_floating_point() and p.itemsize < 4 and (p.requires_grad or not only_trained)
    ]
    if not half:
        return
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(half[0].dtype, str(half[0].dtype))
    count = sum(p.numel() for p in half)
    if only_trained:
        for p in half:
            p.data = p.data.float()
    else:
        student.float()
    say(
        f"the student trains with fp32 weights, made of its {count} in {kind}: there the optimizer's small steps would"
        " be rounded away"
    )
