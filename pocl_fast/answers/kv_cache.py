"""A cache of keys and values with room for the tokens to come, and how any cache keeps some of its rows. Does not know
prompts and answers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


def roomy_cache(config: Any, room: int) -> Any:
    """An empty cache for a model of this config, whose full-attention layers are `RoomyLayer`s."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, tokens, head_dim] as views of larger memory: a step writes its own token, where
    `DynamicLayer` copies all that came before it.

    Memory is taken for what is there and `room` tokens more, again when these are used up.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._memory: tuple[Tensor, Tensor] | None = None  # of keys and values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds tokens. Returns the keys and values of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if not self._has_room(new):
            self._memory = self._with_room(self.keys, key_states, new), self._with_room(self.values, value_states, new)
        assert self._memory is not None
        keys, values = self._memory
        keys[..., old:new, :] = key_states
        values[..., old:new, :] = value_states
        self.keys, self.values = keys[..., :new, :], values[..., :new, :]
        return self.keys, self.values

    def _has_room(self, length: int) -> bool:
        """Whether `length` tokens fit, and the keys still lie in the memory: methods of `DynamicLayer` replace them."""
        if self._memory is None or self.keys is None or self._memory[0].shape[-2] < length:
            return False
        return self.keys.data_ptr() == self._memory[0].data_ptr() and len(self.keys) == len(self._memory[0])

    def _with_room(self, held: Tensor | None, states: Tensor, length: int) -> Tensor:
        """New memory for `length` tokens and the room, with what is held at its beginning."""
        memory = states.new_empty((*states.shape[:-2], length + self.room, states.shape[-1]))
        if held is not None and held.numel():
            memory[..., : held.shape[-2], :] = held
        return memory

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch, and their room."""
        length = self.get_seq_length()
        if not self._has_room(length):
            return super().batch_select_indices(indices)
        assert self._memory is not None
        keys, values = (memory.index_select(0, indices) for memory in self._memory)
        self._memory = keys, values
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]


def keep_rows(cache: Any, rows: Tensor) -> None:
    """Keeps these rows of the batch in a transformers cache, of the states that are no keys and values too.

    transformers has two methods for it; states of linear attention, of a convolution or of a compressor are often known
    to one alone: the one that the more derived class defines.
    """
    if _definer(cache, "batch_select_indices") is not Cache or _definer(cache, "reorder_cache") is not Cache:
        _keep(cache, rows)
        return
    for layer in cache.layers:
        _keep(layer, rows)


def _keep(states: Any, rows: Tensor) -> None:
    order = type(states).__mro__
    of_select, of_reorder = _definer(states, "batch_select_indices"), _definer(states, "reorder_cache")
    if of_select is None and of_reorder is None:
        raise NotImplementedError(f"{type(states).__name__} cannot keep some rows of a batch")
    if of_reorder is None or (of_select is not None and order.index(of_select) <= order.index(of_reorder)):
        states.batch_select_indices(rows)
    else:
        states.reorder_cache(rows)


def _definer(states: Any, method: str) -> type | None:
    """The class that defines a method of the object, None where it has none."""
    return next((cls for cls in type(states).__mro__ if method in vars(cls)), None)
