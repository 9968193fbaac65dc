"""Small models of many families, rows of packed samples, and attention written out in float64."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from pocl_fast.data.encoded import EncodedSample

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GQA = {**SMALL, "num_key_value_heads": 2}
FALCON = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
MIXED_LAYERS = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}
LENGTHS = (5, 1, 12, 9)  # one token alone; longer and shorter than the windows of 4 and 9


def model_of(config, dtype=torch.float32, attention="eager"):
    torch.manual_seed(0)
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()


def row(*lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    return [EncodedSample(i, tuple(ids[:1]), tuple(ids[1:]), False) for i, ids in enumerate(tokens)]


def three_samples():
    """Long and short prompts and responses; one of them a single token."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(3, 4), (1, 9), (12, 1)]
    rows = [torch.randint(0, 97, (p + r,), generator=generator).tolist() for p, r in sizes]
    return [
        EncodedSample(i, tuple(row[:p]), tuple(row[p:]), False)
        for i, (row, (p, _)) in enumerate(zip(rows, sizes, strict=True))
    ]


def each_alone(model, samples):
    """Logits [T, V] of each sample by itself, by the attention that the model has."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([s.prompt_ids + s.response_ids]), use_cache=False) for s in samples]
    return torch.cat([output.logits[0] for output in rows])


def responses_alone(model, samples):
    """Logits [N, V] that predict the responses' tokens, of each sample by itself."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([s.prompt_ids + s.response_ids])).logits[0] for s in samples]
    return torch.cat([logits[len(s.prompt_ids) - 1 : -1] for logits, s in zip(rows, samples, strict=True)])


def by_hand(q, k, v, lengths, scale, window=None):
    """Attention in float64, softmax by softmax: [1, heads, T, size] -> [1, T, heads, size]."""
    outputs = []
    groups = q.shape[1] // k.shape[1]
    for a, b, c in zip(*(x.double().split(lengths, dim=2) for x in (q, k, v)), strict=True):
        b, c = b.repeat_interleave(groups, 1), c.repeat_interleave(groups, 1)
        places = torch.arange(a.shape[2])
        behind = places[:, None] - places[None]
        allowed = (behind >= 0) & (behind < (window or len(places)))
        outputs.append((a @ b.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf).softmax(-1) @ c)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def varlen_by_its_documentation(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What torch's documentation says of varlen_attn, in place of its CUDA kernel: [T, heads, size] -> the same."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0
    assert torch.equal(cu_seq_q, cu_seq_k)
    lengths = cu_seq_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    left, right = window_size
    assert right == 0
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    window = None if left == -1 else left + 1
    return by_hand(q, k, v, lengths, scale, window)[0].to(query.dtype)
