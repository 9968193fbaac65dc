"""The lm_head: how a model turns its last hidden states into logits, and a loss computed at that place.

Knows the families of `transformers`. Does not know losses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocl_fast.data.encoding import EncodedSample
from pocl_fast.data.packed import PackedBatch, pack, padded_kwargs
from pocl_fast.models.packed_forward import forward_kwargs, supervised_hidden
from pocl_fast.models.placement import input_device, resident
from pocl_fast.system.errors import InputError


@dataclass(frozen=True, eq=False)
class LmHead:
    """logits = softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap), or without the softcap's part."""

    weight: Tensor  # [V, H], the model's own parameter
    bias: Tensor | None  # [V]
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def detached(self) -> LmHead:
        """A copy in memory of its own, so that the model itself can be freed."""
        weight = self.weight.detach().clone()
        bias = None if self.bias is None else self.bias.detach().clone()
        return LmHead(weight, bias, self.logit_scale, self.logit_softcap)

    def to(self, device: torch.device) -> LmHead:
        """The lm_head on a device; where it is there already, still the model's own parameters."""
        bias = None if self.bias is None else self.bias.to(device)
        return LmHead(self.weight.to(device), bias, self.logit_scale, self.logit_softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V], in the weight's dtype. For checks; a loss takes the weight, bias, scale and softcap."""
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
    softcap = getattr(config, "final_logit_softcapping", None)
    weight, bias = _weight(head), getattr(head, "bias", None)
    if weight.is_meta:  # offloaded
        weight, bias = resident(head, "weight"), None if bias is None else resident(head, "bias")
    return LmHead(weight, bias, scale, softcap)


def _weight(head: Any) -> Tensor:
    """An lm_head's weight, with LoRA's part where it is trained by it."""
    if not hasattr(head, "lora_A"):
        return head.weight
    weight = head.get_base_layer().weight
    for adapter in [] if head.merged else head.active_adapters:
        if adapter in head.lora_A:
            if getattr(head.lora_dropout[adapter], "p", 0.0):
                raise InputError("LoRA on the lm_head must have no dropout: its weight is used as a whole")
            weight = weight + head.get_delta_weight(adapter)
    return weight


def causal_lm(model: Any) -> Any:
    """The transformers model within its wrappers: DDP, an engine, a compiled module, adapters of peft."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def loss_within_forward(
    model: Any, batch: PackedBatch, loss: Callable[[Tensor, LmHead], Tensor], *, packed: bool
) -> Tensor:
    """`loss(hidden [N, H], lm_head)` of the final hidden states at a batch's supervised positions, computed within the
    forward of `model` and of its lm_head: whatever wraps these (DDP, FSDP, ZeRO-3, adapters) has the weights together
    there, and sees an output whose gradients it knows. No logits are made."""
    inner = causal_lm(model)
    head = inner.get_output_embeddings()
    kwargs, where = (forward_kwargs(inner, batch), batch.supervised) if packed else padded_kwargs(batch)

    def forward(**given: Any) -> Tensor:
        output = inner.get_decoder()(**{name: given[name] for name in kwargs})
        return head(output.last_hidden_state.flatten(0, 1)[where])

    with _replaced(inner, forward), _replaced(head, lambda hidden: loss(hidden, lm_head(inner))):
        return model(**kwargs)


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before  # type: ignore[method-assign]


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raises `InputError` where a model's logits are not its lm_head applied to its last hidden states."""
    head = lm_head(model)
    sample = EncodedSample(0, tuple(range(1, 5)), tuple(range(5, 9)), False)
    batch = pack([sample]).to(input_device(model))
    was_training = model.training
    model.eval()
    hidden = supervised_hidden(model.get_decoder(), batch, packed=False)  # a family may not run on packed rows
    ours = head.logits(hidden.to(head.weight.device, head.weight.dtype)).float()
    kwargs, where = padded_kwargs(batch)
    theirs = model(**kwargs).logits.flatten(0, 1)[where.to(ours.device)].float()
    model.train(was_training)
    if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max())):
        raise InputError(
            f"{type(model).__name__} does more to its logits than apply its lm_head to the last hidden states,"
            " which pocl-fast does not know how to repeat from hidden states; use another architecture"
        )
