"""Which layers a cut student keeps: measured, chosen, said and written down."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_model
from tiny_family import tiny_family
from tiny_training import encoded_samples

from pocl_fast.answers.likelihood import LoadedModel
from pocl_fast.cutting import layer_choice
from pocl_fast.cutting.cut import chosen_layers, cut_layers, stack_of
from pocl_fast.cutting.cut_settings import owners_of_keys
from pocl_fast.cutting.importance import block_influence, most_important
from pocl_fast.cutting.layer_choice import check_choice, cut_student, halves, measuring_of, ranges
from pocl_fast.data.packed import Rows
from pocl_fast.models.packing_check import packing_ready
from pocl_fast.system.errors import InputError


def direct_influence(model, samples):
    """ShortGPT's equation over each sample alone, in float64, from transformers' own hidden states."""
    model = tiny_copy(model).double()
    layers, last = stack_of(model).layers, []
    layers[-1].register_forward_hook(lambda _, __, output: last.append(output))  # before the final norm
    cosines = [[] for _ in layers]
    for sample in samples:
        with torch.no_grad():
            states = list(model(torch.tensor([sample.ids]), output_hidden_states=True).hidden_states)
        states[-1] = last[-1]
        for layer in range(len(layers)):
            a, b = states[layer][0], states[layer + 1][0]
            cosines[layer] += ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).tolist()
    return [1 - np.mean(found) for found in cosines]


def tiny_copy(model):
    copied = type(model)._from_config(model.config, attn_implementation="eager").eval()
    copied.load_state_dict(model.state_dict())
    return copied


def without_effect(model, layers):
    """The model with these layers adding nothing to what they are given."""
    for layer in layers:
        model.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        model.model.layers[layer].mlp.down_proj.weight.data.zero_()
    return model


def samples(count=12):
    return encoded_samples(count)[1]


@pytest.fixture
def cut(tmp_path):
    """Cuts a student with these options; `said` has the lines."""

    def make(source, keep, choice, given=None, folder=tmp_path):
        options = SimpleNamespace(student_layers=keep, layer_choice=choice)
        measuring = measuring_of("bundled", samples() if given is None else given, torch.no_grad)
        return cut_student(source, options, folder, measuring, make.said.append)

    make.said = []
    return make


# -- importance --------------------------------------------------------------------------------------------------------


# samples of 30 to 43 tokens, so that a rectangle has padding, and a length each has rectangles of one and of several
@pytest.mark.parametrize("rows", [Rows.PACKED, Rows.PADDED, Rows.BY_LENGTH])
def test_block_influence_is_that_of_each_sample_alone_in_float64(rows):
    model, given = tiny_model(layers=4), samples()
    assert len({len(one) for one in given}) not in (1, len(given))
    want = direct_influence(model, given)
    packing_ready(model, None)
    got = block_influence(LoadedModel(model, rows), model.model.layers, given)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_measuring_leaves_the_model_and_its_attention_as_they_were(cut):
    model = tiny_model(layers=4)
    before, attention = {k: v.clone() for k, v in model.state_dict().items()}, model.config._attn_implementation
    state = torch.get_rng_state()
    cut(model, 2, "importance")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.config._attn_implementation == attention
    assert not any(layer._forward_hooks for layer in model.model.layers)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("idle", [(0, 3), (1, 2, 5), (5,)])
def test_exactly_the_layers_that_do_something_are_kept(cut, idle):
    source = without_effect(tiny_model(layers=6), idle)
    busy = [layer for layer in range(6) if layer not in idle]
    student = cut(source, len(busy), "importance")
    for new, old in enumerate(busy):
        kept, whole = student.model.layers[new].state_dict(), source.model.layers[old].state_dict()
        assert all(torch.equal(weight, whole[name]) for name, weight in kept.items())
    tokens = torch.arange(1, 20)[None]
    torch.testing.assert_close(student(tokens).logits, source(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_layer_that_does_not_take_and_give_hidden_states_is_refused_with_the_way_out():
    class Widens(torch.nn.Module):
        def forward(self, hidden, *args, **kwargs):
            return torch.cat([hidden, hidden], -1)[..., : hidden.shape[-1] + 1]

    model = tiny_model(layers=2)
    model.model.layers[1] = Widens()
    loaded = LoadedModel(model, Rows.PADDED)
    with pytest.raises(InputError, match=r"LlamaForCausalLM cannot be measured: its Widens .* --layer-choice even"):
        block_influence(loaded, model.model.layers, samples(3))


# layers 6 and 8 read the keys of 3, layer 9 those of 4
@pytest.mark.parametrize(
    ("scores", "keep", "kept"),
    [
        ([9, 8, 7, 1, 1, 6, 5, 4, 3, 2], 3, [0, 1, 2]),  # no reader among the best
        ([2, 1, 1, 0, 0, 1, 9, 1, 9, 1], 3, [3, 6, 8]),  # the owner is worth its readers
        ([7, 6, 1, 0, 0, 1, 8, 1, 1, 1], 2, [0, 1]),  # and here it is not: 8 + 0 against 7 + 6
        ([5, 1, 1, 0, 0, 1, 9, 1, 1, 9], 4, [3, 4, 6, 9]),
        ([1] * 10, 2, [0, 1]),
    ],
)
def test_a_reader_of_keys_stays_only_with_their_owner_and_the_sum_is_the_largest(scores, keep, kept):
    owners = {6: 3, 8: 3, 9: 4}
    assert most_important(scores, keep, owners) == kept


def test_of_every_number_of_layers_the_most_important_set_is_the_best_of_all():
    from itertools import combinations

    owners, scores = {5: 2, 6: 3, 7: 2}, np.random.default_rng(0).random(8)
    for keep in range(1, 9):
        allowed = [s for s in combinations(range(8), keep) if all(owners.get(i, i) in s for i in s)]
        best = max(allowed, key=lambda chosen: scores[list(chosen)].sum())
        assert most_important(scores, keep, owners) == list(best)


# keys that are shared; layers of several kinds; experts in some layers
@pytest.mark.parametrize("family", ["gemma4_text", "gemma3n_text", "qwen3_moe", "lfm2", "jamba"])
def test_families_of_many_kinds_of_layers_are_measured_and_cut(family, cut, tmp_path):
    source = tiny_family(family)
    cut(source, 3, "auto")
    [line] = cut.said
    layers = json.loads((tmp_path / "layers.json").read_text())["layers"]
    owners = owners_of_keys(source.config)
    assert len(layers) == 3
    assert all(owners.get(layer, layer) in layers for layer in layers)
    assert "held-out CE" in line


# -- cutting by a list -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([0, 0], "give 2 different ones of the model's 0 to 3, ascending"),
        ([2, 1], "ascending"),
        ([1], "give 2"),
        ([1, 4], "0 to 3"),
    ],
)
def test_a_list_of_layers_that_is_none_is_refused(layers, says):
    with pytest.raises(InputError, match=says):
        cut_layers(tiny_model(layers=4), 2, layers)


def test_a_list_without_the_owner_of_a_layers_keys_is_refused():
    with pytest.raises(InputError, match="layer 3 reads the keys of layer 1, which is missing"):
        cut_layers(tiny_family("gemma4_text"), 2, [0, 3])


def test_layers_that_no_configuration_can_say_are_refused_with_the_way_out():
    source = tiny_family("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InputError, match=r"cannot cut .* \(0, 3\): .* or the layers of --layer-choice even"):
        cut_layers(source, 2, [0, 3])


# -- the choice --------------------------------------------------------------------------------------------------------


def own_loss(model, given):
    """Cross-entropy of all trained tokens, by transformers' own forward of each sample alone."""
    total, count = 0.0, 0
    for one in given:
        with torch.no_grad():
            logits = model(torch.tensor([one.ids])).logits[0].double()
        for start, end in one.spans:
            labels = torch.tensor(one.ids[start:end])
            total += float(torch.nn.functional.cross_entropy(logits[start - 1 : end - 1], labels, reduction="sum"))
            count += end - start
    return total / count


def test_the_held_out_loss_of_each_choice_is_that_of_the_student_it_makes(cut, tmp_path):
    source, given = without_effect(tiny_model(layers=6), (0, 3)), samples()
    cut(source, 4, "importance", given)
    found = json.loads((tmp_path / "layers.json").read_text())
    seen, held_out = halves(given)
    assert [one.index for one in seen] == [0, 2, 4, 6, 8, 10]
    assert [one.index for one in held_out] == [1, 3, 5, 7, 9, 11]
    assert {name: one["layers"] for name, one in found["choices"].items()} == {
        "even": chosen_layers(source, 4),
        "importance": [1, 2, 4, 5],
    }
    for one in found["choices"].values():
        by_hand = own_loss(cut_layers(source, 4, one["layers"]), held_out)
        assert one["cross_entropy"] == pytest.approx(by_hand, rel=1e-5)
    even, importance = (found["choices"][name]["cross_entropy"] for name in ("even", "importance"))
    assert cut.said == [
        f"student: 4 of 6 layers; even (0, 2, 3, 5): held-out CE {even:.3f}; importance (1, 2, 4, 5): held-out CE"
        f" {importance:.3f}; taken: importance"
    ]


def test_auto_takes_the_choice_of_the_lower_loss(cut, tmp_path, monkeypatch):
    source = tiny_model(layers=4)
    taken = {}
    for name, scores in (("first", [4, 3, 2, 1]), ("last", [1, 2, 3, 4])):
        monkeypatch.setattr(layer_choice, "block_influence", lambda *_, scores=scores: scores)
        cut(source, 2, "auto", folder=tmp_path / name)
        found = json.loads((tmp_path / name / "layers.json").read_text())
        losses = {choice: one["cross_entropy"] for choice, one in found["choices"].items()}
        assert found["taken"] == min(losses, key=losses.get)
        assert found["layers"] == found["choices"][found["taken"]]["layers"]
        taken[name] = found["choices"]["importance"]["layers"]
    assert taken == {"first": [0, 1], "last": [2, 3]}


def test_a_choice_that_cannot_be_cut_is_an_error_and_auto_says_that_it_takes_the_other(cut, monkeypatch):
    source, cutting = tiny_model(layers=4), layer_choice.cut_layers

    def refusing(model, keep, layers):
        if list(layers) == [2, 3]:
            raise InputError("cannot cut LlamaForCausalLM to 2 of its 4 layers (2, 3): no. Give --layer-choice even")
        return cutting(model, keep, layers)

    monkeypatch.setattr(layer_choice, "cut_layers", refusing)
    monkeypatch.setattr(layer_choice, "block_influence", lambda *_: [1, 2, 3, 4])
    with pytest.raises(InputError, match="Give --layer-choice even"):
        cut(source, 2, "importance")
    cut(source, 2, "auto")
    assert "importance (2, 3): refused (cannot cut LlamaForCausalLM" in cut.said[0]
    assert cut.said[0].endswith("taken: even")


def test_the_same_choice_is_taken_again_without_measuring_and_said_once(cut, monkeypatch):
    source = without_effect(tiny_model(layers=4), (3,))
    student = cut(source, 2, "importance")
    monkeypatch.setattr(layer_choice, "block_influence", None)  # not callable
    again = cut(source, 2, "importance")
    assert len(cut.said) == 1
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("changed", ["samples", "keep", "choice"])
def test_a_choice_of_other_samples_or_options_is_not_taken(cut, changed):
    source = tiny_model(layers=4)
    cut(source, 2, "importance")
    keep, choice = 3 if changed == "keep" else 2, "auto" if changed == "choice" else "importance"
    cut(source, keep, choice, samples(10) if changed == "samples" else None)
    assert len(cut.said) == 2


def test_a_file_that_was_changed_is_refused(cut, tmp_path):
    (tmp_path / "layers.json").write_text("[1")
    with pytest.raises(InputError, match=r"layers\.json is not what was written there: delete it"):
        cut(tiny_model(layers=4), 2, "importance")


def test_even_layers_and_all_layers_are_taken_without_measuring(cut, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_choice, "block_influence", None)
    cut(tiny_model(layers=4), 2, "even", [])
    cut(tiny_model(layers=4), 4, "importance", [])
    assert cut.said == ["student: 2 of 4 layers (0, 3)", "student: 4 of 4 layers (0-3)"]
    assert json.loads((tmp_path / "layers.json").read_text())["layers"] == [0, 1, 2, 3]
    cut(tiny_model(layers=6), 2, "even", [])  # another source with the same options
    assert cut.said[2] == "student: 2 of 6 layers (0, 5)"


# a single layer; the fewest samples
@pytest.mark.parametrize("keep", [1, 2])
def test_one_or_two_layers_are_chosen_by_two_samples(cut, keep):
    student = cut(tiny_model(layers=4), keep, "auto", samples(2))
    assert len(student.model.layers) == keep


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_samples_are_refused(cut, count):
    with pytest.raises(InputError, match=f"here are {count}: give more, or --layer-choice even"):
        cut(tiny_model(layers=4), 2, "importance", samples(2)[:count])


@pytest.mark.parametrize("keep", [0, 5])
def test_more_layers_than_there_are_are_refused(cut, keep):
    with pytest.raises(InputError, match="the model to cut from has 4 layers"):
        cut(tiny_model(layers=4), keep, "importance")


def test_samples_are_picked_evenly_and_no_more_than_a_budget_of_tokens(monkeypatch):
    given = samples(300)
    seen, held_out = halves(given)
    assert (len(seen), len(held_out)) == (64, 64)
    assert seen[0].index == 0
    assert held_out[-1].index >= 297
    assert not {one.index for one in seen} & {one.index for one in held_out}
    monkeypatch.setattr(layer_choice, "TOKENS", 400)
    fewer, others = halves(given)
    assert sum(map(len, fewer)) == pytest.approx(400, rel=0.1)
    assert len(others) == pytest.approx(len(fewer), abs=1)


def test_a_choice_without_a_number_of_layers_is_refused():
    check_choice(SimpleNamespace(student_layers=None, layer_choice="even"))
    with pytest.raises(InputError, match=r"--layer-choice auto .* give --student-layers too"):
        check_choice(SimpleNamespace(student_layers=None, layer_choice="auto"))


def test_runs_of_numbers_are_said_as_such():
    assert ranges([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9, 10"
    assert ranges([5]) == "5"
