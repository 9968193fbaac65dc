"""Every family is answered as its own `generate` answers one prompt at a time, or refused."""

import pytest
import torch
from tiny import tiny_model
from tiny_family import FAMILIES, tiny_family

from pocl_fast.answers import decoding, decoding_way
from pocl_fast.answers.decoding import generate
from pocl_fast.answers.decoding_way import ALONE, WAYS
from pocl_fast.answers.engine import TorchEngine
from pocl_fast.models.packed_forward import length_limit
from pocl_fast.system.errors import InputError

NEW = 9  # tokens of an answer: past the windows of 8
# attention that counts padding (mpt, gpt_neo); states with rows, without, and within the model; a mask for one token
QUICK = ["falcon_h1", "gpt_neo", "lfm2", "mamba", "mixtral", "mpt", "recurrent_gemma", "rwkv"]


def prompts(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in (1, 3, 21, 7, 3)]


def headed(seed=4):
    generator = torch.Generator().manual_seed(seed)
    head, *rests = (torch.randint(3, 250, (n,), generator=generator).tolist() for n in (12, 3, 19, 1))
    return [head + rest for rest in rests]


def own_answer(model, prompt, ends, new=NEW):
    """By the model's own `generate`, of this prompt alone."""
    ids = torch.tensor([prompt])
    model(input_ids=ids[:, :1], use_cache=False)  # frequencies that an earlier, longer prompt has left
    row = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=256,
    )
    answer = row[0, len(prompt) :].tolist()
    return answer[: next((n for n, token in enumerate(answer) if token in ends), len(answer))]


def check_answers(model):
    """Of prompts of many lengths, and of prompts with a common head; some answers end early."""
    for rows in (prompts(), headed()):
        free = generate(model, rows, max_new_tokens=NEW, end_ids=set(), pad_id=256)
        ends = {free[0][2], free[1][4]}
        got = generate(model, rows, max_new_tokens=NEW, end_ids=ends, pad_id=256)
        want = [own_answer(model, prompt, ends) for prompt in rows]
        assert got == want
        assert len({len(answer) for answer in want}) > 1


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.full) for family in FAMILIES]
)
def test_answers_are_those_of_the_models_own_generate_one_by_one(family):
    check_answers(tiny_family(family))


@pytest.mark.parametrize(("family", "cache", "lengths"), [("llama", "roomy", "any"), ("rwkv", "own", "single")])
def test_the_way_is_said_once_where_it_is_not_the_fastest(family, cache, lengths, monkeypatch):
    said, probes = [], []
    monkeypatch.setattr(decoding, "say", said.append)
    probe = decoding_way._Probe
    monkeypatch.setattr(decoding_way, "_Probe", lambda *arguments: probes.append(1) or probe(*arguments))
    model = tiny_family(family)
    for _ in range(2):
        generate(model, [[1, 2], [3]], max_new_tokens=2, end_ids=set(), pad_id=256)
    way = decoding_way.decoding_way(model, 256)
    assert (way.cache, way.lengths) == (cache, lengths)
    assert len(probes) == 1
    assert len(said) == (family == "rwkv")
    if said:
        assert "RwkvForCausalLM" in said[0]
        assert "one prompt at a time" in said[0]


def test_a_llama_shares_the_prompts_prefix_and_a_family_whose_distances_count_padding_does_not():
    for model, shares in ((tiny_model(), True), (tiny_family("mpt"), False), (tiny_family("gpt_neo"), False)):
        assert decoding_way.decoding_way(model, 256).lengths == "any"
        assert decoding_way.shares_prefix(model, 256) is shares


def test_the_rounding_of_a_state_in_bf16_is_not_taken_for_an_error():
    assert decoding_way.decoding_way(tiny_family("falcon_h1").bfloat16(), 256).lengths == "any"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoding_way.decoding_way(tiny_family("qwen3_5_text"), 256).lengths == "any"


def test_trying_a_model_out_changes_no_random_number_and_no_mode():
    model = tiny_family("falcon_h1").train()
    model.lm_head.eval()  # a part that its owner keeps in evaluation mode
    modes = [module.training for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    TorchEngine(model, 256).generate(
        [[1, 2, 3]], sample_ids=[0], end_ids=set(), max_new_tokens=2, temperature=0.0, seed=0
    )
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("family", ["lfm2", "rwkv"])
def test_a_sampled_answer_does_not_depend_on_its_batch(family):
    model, rows = tiny_family(family), prompts()
    settings = {"max_new_tokens": 6, "end_ids": {258}, "pad_id": 256, "temperature": 1.0, "seed": 5}
    together = generate(model, rows, **settings)
    for i, prompt in enumerate(rows):
        assert generate(model, [prompt], sample_ids=[i], **settings) == [together[i]]


def test_every_way_gives_a_plain_model_the_same_answers(monkeypatch):
    model, rows = tiny_model(), prompts()
    want = [own_answer(model, prompt, {258}) for prompt in rows]
    for way in WAYS:
        monkeypatch.setattr(decoding, "decoding_way", lambda *_, way=way: way)
        monkeypatch.setattr(decoding, "shares_prefix", lambda *_: False)
        assert generate(model, rows, max_new_tokens=NEW, end_ids={258}, pad_id=256) == want


def test_a_model_that_sees_later_tokens_is_refused():
    with pytest.raises(InputError, match=r"BertLMHeadModel that also looks at later .* Load it as a decoder"):
        generate(tiny_family("bert", is_decoder=False), [[1, 2]], max_new_tokens=2, end_ids=set(), pad_id=256)


def test_a_model_whose_generate_is_not_its_forward_is_refused():
    # RoBERTa's forward counts positions from its pad token's id on, `generate` from 0
    model = tiny_family("roberta", is_decoder=True, pad_token_id=1)
    with pytest.raises(InputError, match=r"RobertaForCausalLM cannot generate answers: .* as its own generate has it"):
        generate(model, [[5, 6]], max_new_tokens=2, end_ids=set(), pad_id=1)


ROPES = {
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, {"max_position_embeddings": 24}),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "rope_theta": 1e4,
            "original_max_position_embeddings": 24,
        },
        {"original_max_position_embeddings": 24},
    ),
}


@pytest.mark.parametrize("rope", ROPES)
def test_a_long_prompt_changes_no_other_where_frequencies_depend_on_length(rope):
    family, parameters, more = ROPES[rope]
    model = tiny_family(family, rope_parameters=parameters, **more)
    assert length_limit(model.config) == 24
    rows = [[7, 8, 9], [5] * 22, list(range(20, 70)), [42], [9, 9, 9, 1]]
    want = [own_answer(model, prompt, {258}) for prompt in rows]
    for order in (range(5), (2, 0, 4, 1, 3)):
        got = generate(model, [rows[i] for i in order], max_new_tokens=NEW, end_ids={258}, pad_id=256)
        assert got == [want[i] for i in order]


def test_ranks_agree_on_the_slowest_way():
    assert sorted([ALONE, WAYS[0], WAYS[-1]], key=decoding_way.slowness) == [WAYS[0], ALONE, WAYS[-1]]
