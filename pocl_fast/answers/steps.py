"""How one batch of prompts goes through a model token by token: with a roomy cache, with the model's own, or without.

Each kind of steps is begun with prompts, then told the tokens that were chosen, and which rows go on. Knows
transformers' caches and what `generate` gives a model. Does not know which kind is right for a model (decoding_way.py),
nor how tokens are chosen.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pocl_fast.models.lm_head import causal_lm
from pocl_fast.models.placement import input_device


class Steps(Protocol):
    """A batch of B prompts on its way through a model."""

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, V] after the prompts."""
        ...

    def add(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after one token more of each row, [B]."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on. Raises `NotImplementedError` where the states' rows cannot be selected."""
        ...


class RoomySteps:
    """With a cache that has room for the answers; a prefix that all prompts share is computed once. Prompts may be of
    any lengths: they are padded on their left, between prefix and rest."""

    def __init__(self, model: Any, pad_id: int, room: int, prefix: SharedPrefix | None = None) -> None:
        self.model, self.pad_id, self.room, self.prefix = model, pad_id, room, prefix
        self.device = input_device(model)
        self.arguments = _Arguments(model)

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        prefix = self.prefix.tokens if self.prefix else []
        self.cache = self.prefix.cache(self, len(prompts)) if self.prefix else self.empty_cache()
        tokens, mask = padded([prompt[len(prefix) :] for prompt in prompts], self.pad_id, self.device)
        self.mask = torch.cat([mask.new_ones(len(mask), len(prefix)), mask], dim=1)
        self.positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, len(prefix) :]
        return self.forward(tokens, self.mask, self.positions, self.cache)

    def add(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return self.forward(tokens[:, None], self.mask, self.positions, self.cache)

    def keep(self, rows: Tensor) -> None:
        from pocl_fast.answers.kv_cache import keep_rows

        keep_rows(self.cache, rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits [B, V] after the last of `tokens`, which are added to the cache."""
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.arguments.cache: cache},
            **self.arguments.quiet,
        )
        return output.logits[:, -1]

    def empty_cache(self) -> Any:
        from pocl_fast.answers.kv_cache import roomy_cache  # imports transformers, which takes seconds

        return roomy_cache(self.model.config, self.room)


class SharedPrefix:
    """The tokens that all prompts begin with, and their cache, made when it is first asked for."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self._cache: Any = None

    def cache(self, steps: RoomySteps, rows: int) -> Any:
        """A new cache for a batch, which holds the prefix in each of its rows."""
        if self._cache is None:
            self._cache = steps.empty_cache()
            tokens = torch.tensor([self.tokens], device=steps.device)
            places = torch.arange(len(self.tokens), device=steps.device)[None]
            steps.forward(tokens, torch.ones_like(tokens), places, self._cache)
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return cache


class OwnSteps:
    """With the cache, the mask and the positions that the model's own `generate` would give it at each step."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        self.own = causal_lm(model)
        self.device = input_device(model)
        self.arguments = _Arguments(model)

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self.ids, mask = padded(prompts, self.pad_id, self.device)
        self.kwargs: dict[str, Any] = {"use_cache": True, **self.arguments.quiet}
        if self.arguments.take("attention_mask"):
            self.kwargs["attention_mask"] = mask
        if self.arguments.take("position_ids"):
            self.kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        if self.arguments.take("logits_to_keep"):
            self.kwargs["logits_to_keep"] = 1
        if self.own._supports_default_dynamic_cache():
            from transformers import DynamicCache

            self.kwargs[self.arguments.cache] = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        return self._forward(self.own.prepare_inputs_for_generation(self.ids, is_first_iteration=True, **self.kwargs))

    def add(self, tokens: Tensor) -> Tensor:
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        return self._forward(self.own.prepare_inputs_for_generation(self.ids, next_sequence_length=1, **self.kwargs))

    def keep(self, rows: Tensor) -> None:
        from transformers import Cache

        from pocl_fast.answers.kv_cache import keep_rows

        cache = self.kwargs.get(self.arguments.cache)
        if not isinstance(cache, Cache):
            raise NotImplementedError("the rows of its states cannot be selected")
        keep_rows(cache, rows)
        self.ids = self.ids[rows]
        for name in ("attention_mask", "position_ids"):
            if (tensor := self.kwargs.get(name)) is not None:
                self.kwargs[name] = tensor.index_select(-2, rows)  # positions may be [3, B, T]

    def _forward(self, inputs: dict[str, Any]) -> Tensor:
        outputs = self.model(**inputs, return_dict=True)
        self.kwargs = self.own._update_model_kwargs_for_generation(outputs, self.kwargs, is_encoder_decoder=False)
        logits: Tensor = outputs.logits[:, -1]
        return logits


class PlainSteps:
    """Without a cache: all tokens so far go through the model at each step. The rows' prompts must be of one length."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, input_device(model)

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self.ids = torch.tensor([list(prompt) for prompt in prompts], device=self.device)
        return self._logits()

    def add(self, tokens: Tensor) -> Tensor:
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        return self._logits()

    def keep(self, rows: Tensor) -> None:
        self.ids = self.ids[rows]

    def _logits(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self.ids, use_cache=False).logits[:, -1]
        return logits


class _Arguments:
    """The names of the arguments that a model's forward takes."""

    def __init__(self, model: Any) -> None:
        own = causal_lm(model)
        self.names = inspect.signature(type(own).forward).parameters

    @property
    def quiet(self) -> dict[str, Any]:
        """Without the routers' loss, which a model of experts cannot compute of one step's tokens."""
        return {"output_router_logits": False} if self.take("output_router_logits") else {}

    def take(self, name: str) -> bool:
        return name in self.names

    @property
    def cache(self) -> str:
        """transformers renamed the argument `past_key_values` to `cache` within version 5."""
        return "cache" if self.take("cache") else "past_key_values"


def padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, longest] of prompts, padded on their left."""
    longest = max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]
    tokens = [[pad_id] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)
