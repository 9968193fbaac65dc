"""The cache with room holds what transformers' own holds, and copies nothing to add a token; any cache keeps rows."""

import copy
import random

import pytest
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

from pocl_fast.answers.kv_cache import RoomyLayer, keep_rows

HEADS, SIZE = 2, 4

pytestmark = pytest.mark.usefixtures("seed")


def states(rows, tokens):
    return torch.randn(rows, HEADS, tokens, SIZE), torch.randn(rows, HEADS, tokens, SIZE)


def change(layers, rows, rng):
    """One of the calls that transformers or a decoder makes, on every layer; how many rows there are then."""
    kind = rng.choice(["token", "token", "tokens", "select", "repeat", "reorder", "crop", "copy"])
    if kind == "repeat":
        for layer in layers:
            layer.batch_repeat_interleave(2)
        return 2 * rows
    if kind == "select":
        kept = torch.tensor(sorted(rng.sample(range(rows), rng.randint(1, rows))))
        for layer in layers:
            layer.batch_select_indices(kept)
        return len(kept)
    if kind == "reorder":
        order = torch.randperm(rows)
        for layer in layers:
            layer.reorder_cache(order)
    elif kind == "crop" and layers[0].get_seq_length() > 1:
        for layer in layers:
            layer.crop(-1)
    elif kind == "copy":
        layers[:] = copy.deepcopy(layers)
    else:
        new = states(rows, 1 if kind == "token" else 3)
        for layer in layers:
            layer.update(*new)
    return rows


@pytest.mark.parametrize("room", [0, 2, 50])
def test_it_holds_what_a_dynamic_layer_holds_whatever_is_done(room, seed):
    rng = random.Random(seed)
    for _ in range(20):
        layers = [DynamicLayer(), RoomyLayer(room)]
        rows = 2
        new = states(rows, 5)
        for layer in layers:
            layer.update(*new)
        for _ in range(12):
            rows = change(layers, min(rows, 8), rng) if rows <= 8 else rows
            want, got = layers
            assert torch.equal(got.keys, want.keys)
            assert torch.equal(got.values, want.values)
            assert got.get_seq_length() == want.get_seq_length()


def test_a_token_within_the_room_is_written_beside_the_others():
    layer = RoomyLayer(room=3)
    first, _ = layer.update(*states(4, 5))
    for _ in range(3):
        keys, _ = layer.update(*states(4, 1))
        assert keys.data_ptr() == first.data_ptr()
    layer.batch_select_indices(torch.tensor([1, 3]))
    assert layer.keys.untyped_storage().nbytes() == 2 * HEADS * 8 * SIZE * 4
    keys, _ = layer.update(*states(2, 1))
    assert keys.shape == (2, HEADS, 9, SIZE)


# states of a convolution or of linear attention alone; beside keys and values, of all tokens and of a window
@pytest.mark.parametrize("kind", ["conv", "linear_attention", "hybrid", "hybrid_sliding", "sliding_attention"])
def test_the_kept_rows_of_a_cache_are_those_of_all_its_states(kind):
    sizes = {"sliding_window": 4} if "sliding" in kind else {}
    cache = Cache(layers=[DYNAMIC_LAYER_TYPE_MAPPING[kind](**sizes)])
    rows = torch.arange(5.0)
    if kind not in ("conv", "linear_attention"):
        cache.update(*(rows[:, None, None, None].expand(5, HEADS, 6, SIZE) for _ in range(2)), 0)
    if kind != "sliding_attention":
        cache.update_conv_state(rows[:, None, None].expand(5, SIZE, 3), 0)
    if "conv" not in kind and kind != "sliding_attention":
        cache.update_recurrent_state(rows[:, None, None].expand(5, SIZE, SIZE), 0)
    keep_rows(cache, torch.tensor([1, 3, 4]))
    layer = cache.layers[0]
    tensors = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    tensors += [state for name in ("conv_states", "recurrent_states") for state in getattr(layer, name, {}).values()]
    held = [tensor for tensor in tensors if tensor is not None]
    assert held
    for tensor in held:
        assert tensor.flatten(1)[:, 0].tolist() == [1, 3, 4]
        assert tensor.flatten(1).std(1).max() == 0


def test_a_cache_of_a_model_of_its_own_keeps_the_rows_that_it_knows_of():
    class Own(DynamicCache):
        def batch_select_indices(self, indices):
            self.states = self.states[indices]

    cache = Own()
    cache.states = torch.arange(4)
    keep_rows(cache, torch.tensor([0, 2]))
    assert cache.states.tolist() == [0, 2]
