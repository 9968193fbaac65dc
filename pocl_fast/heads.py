"""What stands between a language model's last hidden states and its logits, and whether that is all of it.

Knows the families of `transformers`. Does not know losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocl_fast.errors import InputError
from pocl_fast.packing import forward_kwargs, pack, supervised_hidden
from pocl_fast.samples import EncodedSample


@dataclass(frozen=True, eq=False)
class LmHead:
    """logits = softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap), or without the softcap's part."""

    weight: Tensor  # [V, H], the model's own parameter
    bias: Tensor | None  # [V]
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def detached(self) -> LmHead:
        """A copy of its own memory, which keeps nothing else of the model alive."""
        weight = self.weight.detach().clone()
        bias = None if self.bias is None else self.bias.detach().clone()
        return LmHead(weight, bias, self.logit_scale, self.logit_softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V], in the products' own dtype: for checks; a loss takes the parts."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        cap = self.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits


def lm_head(model: Any) -> LmHead:
    """The lm_head of a causal language model of `transformers`. Raises `InputError` where it has none."""
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise InputError(f"{type(model).__name__} has no lm_head that pocl-fast finds (get_output_embeddings)")
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        scale /= float(divisor)
    return LmHead(head.weight, getattr(head, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raises `InputError` where a model's logits are not its lm_head applied to its last hidden states."""
    head = lm_head(model)
    sample = EncodedSample(0, tuple(range(1, 5)), tuple(range(5, 9)), False)
    batch = pack([sample]).to(head.weight.device)
    was_training = model.training
    model.eval()
    ours = head.logits(supervised_hidden(model.get_decoder(), batch, packed=True).to(head.weight.dtype)).float()
    theirs = model(**forward_kwargs(batch)).logits[0, batch.supervised].float()
    model.train(was_training)
    if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max())):
        raise InputError(
            f"{type(model).__name__} does more to its logits than apply its lm_head to the last hidden states,"
            " which pocl-fast does not know how to repeat from hidden states; use another architecture"
        )
