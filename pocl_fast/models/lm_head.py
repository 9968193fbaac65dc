"""The lm_head: how a model turns its last hidden states into logits, and a loss computed at that place.

Knows models of `transformers` and adapters of peft, by what they compute. Does not know losses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pocl_fast.data.packed import PackedBatch, Rows
from pocl_fast.models.packed_forward import Forward, decoder_of, forwards, in_batch_order, router_loss, run_anew
from pocl_fast.models.placement import input_device, resident
from pocl_fast.models.probing import DEVICE_ERRORS, found_of, is_exact, is_sharded, plain_run, random_ids
from pocl_fast.system.errors import InputError, first_line


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
    """The lm_head of a causal language model of `transformers`. Raises `InputError` where it has none, where adapters
    make more of it than a weight, and where its logits are made in a way that `LmHead` does not describe."""
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise InputError(f"{type(model).__name__} has no lm_head that pocl-fast finds (get_output_embeddings)")
    scale, softcap = logit_transform(model)
    weight, bias = _weight(head), getattr(head, "bias", None)
    if weight.is_meta:  # offloaded
        weight, bias = resident(head, "weight"), None if bias is None else resident(head, "bias")
    return LmHead(weight, bias, scale, softcap)


def _weight(head: Any) -> Tensor:
    """An lm_head's weight, with LoRA's or DoRA's part where it is trained by it."""
    if not hasattr(head, "lora_A"):
        return head.weight
    base: Tensor = head.get_base_layer().weight
    weight = base
    for adapter in [] if head.merged or head.disable_adapters else head.active_adapters:
        if adapter not in head.lora_A:
            continue
        if getattr(head.lora_dropout[adapter], "p", 0.0):
            raise InputError("LoRA on the lm_head must have no dropout: its weight is used as a whole")
        adapted = base + head.get_delta_weight(adapter)
        if adapter in (getattr(head, "lora_magnitude_vector", None) or {}):  # DoRA, which gives the norm no gradient
            adapted = adapted * (head.lora_magnitude_vector[adapter].weight / adapted.detach().norm(dim=1))[:, None]
        weight = weight + (adapted - base)
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
    model: Any,
    batch: PackedBatch,
    loss: Callable[[Tensor, LmHead], Tensor],
    *,
    packed: Rows | bool,
    router_weight: float | Tensor = 0.0,
) -> Tensor:
    """`loss(hidden [N, H], lm_head)` of the final hidden states at a batch's supervised positions, computed within the
    forward of `model` and of its lm_head: whatever wraps these (DDP, FSDP, ZeRO-3, adapters) has the weights together
    there, and sees an output whose gradients it knows. No logits are made. With a `router_weight` the loss of the
    model's router over experts is added, times that (see `router_loss`)."""
    inner = causal_lm(model)
    head, body = inner.get_output_embeddings(), decoder_of(inner)
    logit_transform(inner)  # within the forward it could not be measured
    parts = forwards(body, batch, packed)
    asks = {"output_router_logits": True} if isinstance(router_weight, Tensor) or router_weight else {}

    def forward(**given: Any) -> Tensor:
        hidden, routers = [], []
        for number, part in enumerate(run_anew(body, parts)):
            kwargs = part.kwargs if number else {name: given[name] for name in part.kwargs}
            output = body(**kwargs, **asks)
            hidden.append(output.last_hidden_state.flatten(0, 1)[part.where])
            routers.append(getattr(output, "router_logits", None))
        value = head(in_batch_order(hidden, parts))
        return value + router_weight * router_loss(inner, routers, parts) if asks else value

    def compared(hidden: Tensor) -> Tensor:
        whole = lm_head(inner)
        return loss(hidden.to(whole.weight.dtype), whole)  # fp32 adapters may follow layers in bf16

    with _replaced(inner, forward), _replaced(head, compared):
        return model(**parts[0].kwargs)


@contextlib.contextmanager
def sparse_tied_embedding(model: Any) -> Iterator[None]:
    """Within it a tied embedding's gradient on the CPU is sparse: the batch's rows alone are added to the lm_head's
    gradient. torch's own, of the whole vocabulary, takes a tenth of a step of a small model in bf16.

    Call backward within it too, of a loss in which the lm_head has a part: without one `.grad` would be sparse. Models
    that are not tied are left as they are. `model` is a plain one of transformers, whole on one rank.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = isinstance(embedding, nn.Embedding) and getattr(head, "weight", None) is embedding.weight
    changes = tied and embedding.weight.device.type == "cpu" and embedding.max_norm is None
    changes = changes and not embedding.scale_grad_by_freq and not embedding.sparse and _looks_up(embedding)
    if changes:
        embedding.sparse = True
    try:
        yield
    finally:
        if changes:
            embedding.sparse = False


def _looks_up(embedding: nn.Embedding) -> bool:
    """Whether an embedding looks its weight up as it is: as torch does, or transformers, which scales what it finds."""
    kind = type(embedding)
    return kind.forward is nn.Embedding.forward or kind.__module__.startswith("transformers.")


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


# ---- what is between the lm_head and the logits ----


class LogitTransform(NamedTuple):
    """logits = softcap · tanh(scale · x / softcap) of what the lm_head gives, x; or scale · x."""

    scale: float
    softcap: float | None

    def __call__(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return self.softcap * torch.tanh(x / self.softcap) if self.softcap else x


def logit_transform(model: Any) -> LogitTransform:
    """What a model does to its lm_head's output: measured once, for no two families name it alike, and kept with the
    model. Where that is sharded already, its configuration is believed. Raises `InputError` where it is something
    else."""
    found = found_of(model)
    if "logit transform" not in found:
        found["logit transform"] = _configured(model) if is_sharded(model) else _measured(model)
    known: LogitTransform = found["logit transform"]
    return known


def _configured(model: Any) -> LogitTransform:
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0)
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        scale /= float(divisor)
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


LARGE = 1e3  # of logits, as the root of their mean square: any cap bends these
# at one of these sizes any cap bends logits a little, and at the last it has flattened them
SIZES = (1e-2, 1.0, 1e2, 1e3, 1e4)


def _measured(model: Any) -> LogitTransform:
    """From the logits that the model makes of random hidden states of many sizes, in place of its decoder's."""
    with plain_run(model):
        half = not is_exact(model)
        tolerance = 2e-2 if half else 1e-4
        seen = _logits_of(model, (1.0, LARGE))
        if not seen[0][1].isfinite().all():
            raise InputError(f"{type(model).__name__} gives logits that are not finite: are its weights damaged?")
        linear = LogitTransform(_near(model, _slope(*seen[0]), half), None)
        if _off(linear, seen) < tolerance:
            return linear
        off = _off(linear, seen[:1])
        seen = _logits_of(model, SIZES)
        softcap = _near(model, float(seen[-1][1].abs().median()), half)
        bent = [(x, softcap * torch.atanh(y / softcap)) for x, y in seen if float(y.abs().max()) < 0.9 * softcap]
        if bent and softcap > 0:
            capped = LogitTransform(_near(model, _slope(*bent[-1]), half), softcap)
            if _off(capped, seen) < tolerance:
                return capped
            off = min(off, _off(capped, seen))
    raise InputError(
        f"{type(model).__name__} does more to its logits than apply its lm_head to the last hidden states, scale and"
        f" softcap them: they are off by {off:.1e} of the largest. pocl-fast does not know how to repeat that from"
        " hidden states; use another architecture"
    )


def _logits_of(model: Any, sizes: tuple[float, ...]) -> list[tuple[Tensor, Tensor]]:
    """What the lm_head gives and the model's logits, [n, V] each, float64, for hidden
    states that give logits of each size."""
    head, body = model.get_output_embeddings(), decoder_of(model)
    ids, generator = random_ids(model, 1, 4), torch.Generator().manual_seed(0)
    try:
        output = body(input_ids=ids, use_cache=False)
        states = output.last_hidden_state
        if states.shape[-1] != (H := head.weight.shape[-1]):
            raise InputError(f"{type(model).__name__}: its lm_head takes {H} numbers a token, not {states.shape[-1]}")
        hidden = torch.randn(states.shape, generator=generator).to(states)
        hidden = hidden / head(hidden).float().square().mean().sqrt().clamp_min(1e-30).to(hidden)
        seen = []
        for size in sizes:

            def forward(*args: Any, states: Tensor = hidden * size, **kwargs: Any) -> Any:
                output.last_hidden_state = states
                return output

            with _replaced(body, forward):
                logits = model(input_ids=ids, use_cache=False).logits
            seen.append((head(hidden * size).flatten(0, 1), logits.flatten(0, 1)))
    except (*DEVICE_ERRORS, InputError):
        raise
    except Exception as error:  # whatever a family raises
        raise InputError(f"{type(model).__name__} does not run on plain tokens: {first_line(error)}") from error
    if seen[0][0].shape != seen[0][1].shape:
        x, logits = (one.shape[-1] for one in seen[0])
        raise InputError(f"{type(model).__name__} gives {logits} logits a token, and its lm_head {x}")
    return [(x.to(logits.device).double(), logits.double()) for x, logits in seen]


def _slope(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (x * x).sum())


def _off(transform: LogitTransform, seen: list[tuple[Tensor, Tensor]]) -> float:
    """The largest error relative to the largest logit of each size; infinite for what is not finite."""
    errors = [float((transform(x) - y).abs().max() / y.abs().max().clamp_min(1e-30)) for x, y in seen]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def _near(model: Any, measured: float, half: bool) -> float:
    """The number of the model's configuration, or its inverse, that was measured up to rounding; else `measured`."""
    named = [*vars(model.config).values(), *vars(model.config.get_text_config()).values(), 1.0]
    numbers = [float(x) for x in named if isinstance(x, (int, float)) and not isinstance(x, bool) and x]
    nearest = min((n for x in numbers for n in (x, 1 / x)), key=lambda n: abs(n - measured))
    return nearest if abs(nearest - measured) < (5e-3 if half else 1e-5) * abs(measured) else measured


# ---- the check at construction ----


@torch.no_grad()
def check_head(model: Any, whose: str = "") -> None:
    """Raises `InputError` where a model's logits are not its lm_head applied to its last hidden states, also once the
    adapters of that lm_head have trained. The model is as before afterwards. One that is sharded already is not
    checked."""
    if is_sharded(model):
        return
    name = f"{whose} {type(model).__name__}".strip()
    project = model.get_output_embeddings()
    with plain_run(model):
        with _trained(project) as adapted:
            if adapted:
                _check_adapters(name, project, input_device(model))
        head = lm_head(model)
        ids = random_ids(model, 1, 8)
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        theirs = model(input_ids=ids, use_cache=False).logits.float()
        if theirs.isnan().any():
            broken = [weight for weight, p in model.named_parameters() if not p.is_meta and p.isnan().any()]
            raise InputError(f"the logits of {name} are NaN{': so is its ' + broken[0] if broken else ''}")
        ours = head.logits(hidden.to(head.weight.device, head.weight.dtype)).float().to(theirs.device)
        off, both = math.inf, theirs.isfinite()
        if torch.equal(ours.isfinite(), both):  # −inf, which some families give for ids without a meaning
            ours, theirs = ours.where(both, 0.0), theirs.where(both, 0.0)
            off = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        if not off < (1e-4 if is_exact(model) else 2e-2):
            raise InputError(
                f"{name} does more to its logits than apply its lm_head to the last hidden states: they are off by"
                f" {off:.1e} of the largest. pocl-fast does not know how to repeat that from hidden states; use"
                " another architecture"
            )


def _check_adapters(name: str, project: Any, device: torch.device) -> None:
    weight, bias = _weight(project), getattr(project, "bias", None)
    dtype = (project.get_base_layer() if hasattr(project, "get_base_layer") else project).weight.dtype
    hidden = torch.randn(4, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(device, dtype)
    theirs = project(hidden).float()
    ours = nn.functional.linear(hidden.to(weight.dtype), weight, bias).float()
    off = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    if not off < (1e-4 if weight.dtype == hidden.dtype == torch.float32 else 3e-2):
        raise InputError(
            f"{name}: the adapters of its lm_head ({type(project).__module__}.{type(project).__qualname__}) compute"
            f" something else than LoRA or DoRA without a bias, off by {off:.1e} of the largest logit. Leave the"
            " lm_head out of their targets, or train it whole (modules_to_save)"
        )


@contextlib.contextmanager
def _trained(head: Any) -> Iterator[bool]:
    """Within it the parameters of an lm_head's adapters are moved, as training would, for many of them begin at zero;
    gives whether there are any. They are the same bits afterwards."""
    if head is None:
        yield False
        return
    base: Any = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    own = {id(p) for p in base.parameters()}
    before = [(p, p.detach().clone()) for p in head.parameters() if id(p) not in own]
    generator = torch.Generator().manual_seed(0)
    try:
        for p, _ in before:
            size = 0.5 * p.detach().float().square().mean().sqrt().clamp_min(0.1)
            p.data.add_((torch.randn(p.shape, generator=generator).to(p.device) * size).to(p.dtype))
        yield bool(before)
    finally:
        for p, values in before:
            p.data.copy_(values)


@torch.no_grad()
def adds_router_loss(model: Any, say: Callable[[str], object]) -> bool:
    """Whether a mixture of experts asks for the loss of its router (`output_router_logits`), and `router_loss` computes
    what its own forward adds. `say` is told either way, where it asks."""
    if not getattr(model.config.get_text_config(), "output_router_logits", False):
        return False
    name = f"the loss of {type(model).__name__}'s router over experts (output_router_logits)"
    if is_sharded(model):
        say(f"{name} is not added: the model is sharded already, so that it cannot be tried")
        return False
    ids = random_ids(model, 1, 16)
    kwargs = {"input_ids": ids, "use_cache": False, "output_router_logits": True}
    with plain_run(model):
        try:
            output = decoder_of(model)(**kwargs)
            routers = [getattr(output, "router_logits", None)]
            ours = router_loss(model, routers, [Forward(kwargs, ids, None)])
            own = model(**kwargs, labels=ids)
            theirs = own.loss - model(**kwargs | {"output_router_logits": False}, labels=ids).loss
        except DEVICE_ERRORS:
            raise
        except (InputError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            say(f"{name} is not added: {first_line(error)}")
            return False
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-4 * float(own.loss)):
        say(f"{name} is not added: its own forward adds {float(theirs):.3g} where pocl-fast finds {float(ours):.3g}")
        return False
    say(f"{name} is added, as in its own forward: {float(ours):.3g} for random tokens")
    return True
