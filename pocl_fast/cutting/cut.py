"""Cutting a smaller model out of a larger one, by keeping some of its layers.

Knows where a model's layers and their weights are. Its settings are in cut_settings.py; the proof that a cut model is
right is in cut_check.py.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocl_fast.cutting.cut_check import SMALL, StudentFails, differences, logits_apart, tolerance, with_large_weights
from pocl_fast.cutting.cut_settings import Settings, owners_of_keys
from pocl_fast.models.parameters import num_parameters
from pocl_fast.models.placement import input_device
from pocl_fast.models.probing import DEVICE_ERRORS, evaluating, random_ids, same_random_numbers
from pocl_fast.system.errors import InputError, first_line

SEARCHED = 1_000_000_000  # parameters; of so small a model other numbers of layers are tried where one is refused,
MOST_OTHERS = 6  # so many
MOST_PROOFS = 8  # candidates whose layers are right and whose logits are compared


def evenly_spaced_layers(num_layers: int, keep: int) -> list[int]:
    """Which layers a cut model of `keep` layers takes: the first, the last, and the others evenly between them. Where
    layers share keys and values, `chosen_layers` moves some of these.

    The first layers read the embeddings and the last ones write for the lm_head, so both ends must stay for the cut
    model to speak at all; residual layers in between refine one stream, so an even choice loses least of any one step
    (DistilBERT's initialisation, arXiv 1910.01108 section 3).
    """
    if not 1 <= keep <= num_layers:
        raise InputError(f"--student-layers {keep}: the model to cut from has {num_layers} layers")
    if keep == 1:
        return [0]
    return [round(i * (num_layers - 1) / (keep - 1)) for i in range(keep)]


def chosen_layers(model: Any, keep: int) -> list[int]:
    """Which layers `cut_layers` keeps of a model: those of `evenly_spaced_layers`, but for layers that have no keys and
    values of their own (Gemma 3n and 4). Such a layer reads those of an earlier layer, its owner, and stays only with
    it: a missing owner takes the place of a chosen layer.

    The first and the last layer stay; of two layers, the last one. As few layers as can be are replaced. Of such
    choices it is the one in which a layer is replaced by one of its kind (of attention, with or without keys of its
    own); then the one that moves the layers least.
    """
    return _chosen(model.config, len(stack_of(model).layers), keep)


def _chosen(config: Any, count: int, keep: int) -> list[int]:
    even = evenly_spaced_layers(count, keep)
    owners = owners_of_keys(config)
    missing = sorted({owners[layer] for layer in even if layer in owners}.difference(even))
    if not missing:
        return even
    kinds = list(config.get_text_config(decoder=True).layer_types)
    natures = [(kind, layer in owners) for layer, kind in enumerate(kinds)]

    def choices(replaced: int) -> Iterator[tuple[int, int, list[int]]]:
        for gone in itertools.combinations(even[1:-1] or even[:1], replaced):
            for new in itertools.combinations(missing, replaced):
                chosen = sorted({*even, *new}.difference(gone))
                if all(owners.get(layer, layer) in chosen for layer in chosen):
                    others = Counter(natures[layer] for layer in gone) - Counter(natures[layer] for layer in new)
                    moved = sum(abs(a - b) for a, b in zip(even, chosen, strict=True))
                    yield others.total(), moved, chosen

    # one such choice there always is: at most every layer between makes room, and then the last one's owner is enough
    return min(next(found for replaced in range(1, keep) if (found := list(choices(replaced)))))[-1]


def cut_layers(model: Any, keep: int, layers: Sequence[int] | None = None) -> Any:
    """A copy of a transformers causal language model with `keep` of its layers and everything else, embeddings, final
    norm and lm_head, as it is. `layers` are their numbers, ascending; without them, those of `chosen_layers`.

    The settings of the layers follow them. The cut model gives the logits of its source without the other layers; so it
    does when it is loaded from its folder. Raises `InputError` where no configuration of this family says that. The
    source stays as it is.
    """
    stack = stack_of(model)
    chosen = _chosen(model.config, len(stack.layers), keep) if layers is None else list(layers)
    _check_layers(model.config, len(stack.layers), keep, chosen)
    _check_cuttable(model)
    settings = Settings(model.config, len(stack.layers), chosen)
    with same_random_numbers(input_device(model)), evaluating(model):
        cut = _Cut(model, stack, chosen, settings)
        if (student := cut.made()) is not None:
            return student
        searches = layers is None and num_parameters(model) <= SEARCHED
        others = _other_counts(model, stack, keep) if searches else []
    which = f"{keep} of its {len(stack.layers)} layers ({', '.join(map(str, chosen))})"
    right = f"It can be cut to {' or '.join(map(str, others))}" if others else "Take another number of layers"
    right += "" if layers is None else ", or the layers of --layer-choice even"
    raise InputError(
        f"cannot cut {type(model).__name__} to {which}: {cut.fault}. {right}, or give a smaller model as the student"
    )


def _check_layers(config: Any, count: int, keep: int, chosen: list[int]) -> None:
    """Raises `InputError` for layers that are not `keep` of the model's, ascending, and where one stays without the
    layer whose keys and values it reads."""
    if chosen != sorted({*chosen}) or len(chosen) != keep or not {*chosen} <= {*range(count)}:
        raise InputError(f"layers {chosen}: give {keep} different ones of the model's 0 to {count - 1}, ascending")
    owners = owners_of_keys(config)
    if alone := [layer for layer in chosen if owners.get(layer, layer) not in chosen]:
        owner = owners[alone[0]]
        raise InputError(f"layers {chosen}: layer {alone[0]} reads the keys of layer {owner}, which is missing")


def _other_counts(model: Any, stack: Stack, keep: int) -> list[int]:
    """Of the numbers of layers next to `keep`, up to two to which the model can be cut."""
    count = len(stack.layers)
    near = sorted((n for n in range(1, count) if n != keep), key=lambda n: (abs(n - keep), n))
    found: list[int] = []
    for n in near[:MOST_OTHERS]:
        chosen = _chosen(model.config, count, n)
        if len(found) < 2 and _Cut(model, stack, chosen, Settings(model.config, count, chosen)).made() is not None:
            found.append(n)
    return sorted(found)


@dataclass(frozen=True)
class Wrong:
    """What differs in the layers of a candidate."""

    layers: list[int]
    kinds: int  # parts of another kind or shape
    settings: int  # plain settings


class _Cut:
    """The search for the configuration of a cut model."""

    def __init__(self, model: Any, stack: Stack, chosen: list[int], settings: Settings) -> None:
        self.model, self.stack, self.chosen, self.settings = model, stack, chosen, settings
        self.fault, self.came = "", -1

    def made(self) -> Any:
        """The cut model; None where no configuration is right, `fault` says why."""
        tried: list[str] = []
        for config in self._fitting():
            if (text := config.to_json_string(use_diff=False)) in tried:
                continue
            tried.append(text)
            student = self._student(config)
            if student is not None and self._is_right(student):
                return student
            if len(tried) >= MOST_PROOFS:
                break
        return None

    def _fitting(self) -> Iterator[Any]:
        """Configurations in which every kept layer is what it was, the likeliest first; at last those in which only
        plain settings of a layer differ, which need not tell."""
        bases: list[tuple[Wrong, dict[str, Any]]] = []
        nearly: list[dict[str, Any]] = []
        for changes in self.settings.candidates():
            wrong = self._wrong(changes)
            if wrong is None:
                continue
            if not wrong.layers:
                yield self.settings.build(changes)
            elif wrong.kinds == 0:
                nearly.append(changes)
            if wrong.layers and len(bases) < 2:
                bases.append((wrong, changes))
        for wrong, changes in bases:
            yield from map(self.settings.build, self._by_periods(wrong, changes))
            yield from map(self.settings.build, self._by_lists(changes))
        yield from map(self.settings.build, nearly)

    def _by_periods(self, wrong: Wrong, changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The settings of every n-th layer, or of the first n, one after the other as they are least wrong."""
        for others in self.settings.periods():
            found = [(self._wrong({**changes, **other}), {**changes, **other}) for other in others]
            for now, candidate in found:
                if now is not None and (now.kinds, now.settings) < (wrong.kinds, wrong.settings):
                    wrong, changes = now, candidate
            if not wrong.layers:
                yield changes
                return

    def _by_lists(self, changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A list of layers' numbers can say what a period cannot: it gets those that would be wrong without it."""
        for steps in ({}, self.settings.single_steps()):
            for name in self.settings.lists_of_numbers():
                empty = {**changes, **steps, name: []}
                wrong = self._wrong(empty)
                if wrong is None or not wrong.layers:
                    continue
                filled = {**empty, name: wrong.layers}
                if (now := self._wrong(filled)) is not None and not now.layers:
                    yield filled

    def _wrong(self, changes: dict[str, Any]) -> Wrong | None:
        """What differs in the kept layers from what they were, under these changes; None where there is no such
        model."""
        try:
            with torch.device("meta"):
                model = _empty(self.model, self.settings.build(changes))
            layers = model.get_submodule(self.stack.name)
        except Exception as failure:  # whatever a family's own checks raise
            self._note(0, first_line(failure, named=True))
            return None
        if len(layers) != len(self.chosen):
            self._note(0, f"it has {len(layers)} layers whatever its settings say")
            return None
        faults = [differences(layers[new], self.stack.layers[old]) for new, old in enumerate(self.chosen)]
        wrong = Wrong(
            [new for new, fault in enumerate(faults) if any(fault)],
            kinds=sum(len(kinds) for kinds, _ in faults),
            settings=sum(len(settings) for _, settings in faults),
        )
        if wrong.layers:
            first = wrong.layers[0]
            fault = [*faults[first][0], *faults[first][1]][0]
            self._note(1, f"its settings cannot say what layer {self.chosen[first]} is ({fault})")
        return wrong

    def _note(self, weight: int, fault: str) -> None:
        """Keeps why a candidate is not right: the first of those that came furthest."""
        if weight > self.came:
            self.fault, self.came = fault, weight

    def _student(self, config: Any) -> Any:
        """The cut model with its source's weights; None where these do not fit."""
        student = _empty(self.model, config)
        try:
            self._take_precision(student)
            self._copy_weights(self.model, student)
        except (RuntimeError, KeyError) as failure:
            self._note(2, f"weights that do not belong to one layer: {first_line(failure)}")
            return None
        student.tie_weights()
        student.name_or_path = ""  # its source's, which it is not
        student.generation_config = copy.deepcopy(self.model.generation_config)
        return student.to(input_device(self.model)).eval()

    def _take_precision(self, student: Any) -> None:
        """Gives the student's weights and buffers the dtypes of the source's; and those of its buffers that differ from
        the source's by rounding alone, these values (frequencies that were in bf16 once)."""
        weights = self.model.state_dict()
        for name, tensor in student.named_parameters(remove_duplicate=False):
            tensor.data = tensor.data.to(weights[self.stack.old_name(name, self.chosen)].dtype)
        buffers = dict(self.model.named_buffers())
        for name, tensor in student.named_buffers():
            old = buffers.get(self.stack.old_name(name, self.chosen))
            if old is None or old.shape != tensor.shape:
                continue
            tensor.data = tensor.data.to(old.dtype)
            near = old.is_floating_point() and torch.allclose(tensor.to(old.device), old, rtol=0.01, atol=0)
            tensor.data = old.detach().cpu().clone() if near else tensor.data

    def _copy_weights(self, source: Any, student: Any) -> None:
        weights = source.state_dict()
        taken = {}
        for name, tensor in student.state_dict().items():
            weight = weights[self.stack.old_name(name, self.chosen)]
            if weight.shape != tensor.shape:  # one weight for all layers, a part each
                weight = _parts_of(weight, tensor.shape, len(self.stack.layers), self.chosen)
            taken[name] = weight.clone()
        student.load_state_dict(taken, strict=True)

    def _is_right(self, student: Any) -> bool:
        """Whether the cut model gives its source's logits without the other layers: by its weights, and where it is
        small also by large ones."""
        dropped = [i for i in range(len(self.stack.layers)) if i not in self.chosen]
        pairs = [(self.model, student)]
        if num_parameters(self.model) <= SMALL:
            large = with_large_weights(self.model)
            pairs.append((large, copy.deepcopy(student)))
        for source, cut in pairs:
            if source is not self.model:
                self._copy_weights(source, cut)
            layers = source.get_submodule(self.stack.name)
            try:
                error = logits_apart(source, list(layers), dropped, cut)
            except StudentFails as failure:
                self._note(3, str(failure))
                return False
            if error > tolerance(self.model):
                self._note(
                    3,
                    f"its logits are {error:.1g} of the largest away from those of the whole model without the other "
                    f"layers: layers of this family compute by their place, or share what another one computed",
                )
                return False
        return True


@dataclass(frozen=True)
class Stack:
    """The layers of a model's text part, by name; and other lists that have an entry a layer."""

    name: str
    layers: nn.ModuleList
    lists: tuple[str, ...]  # the names of all of them

    def old_name(self, name: str, chosen: Sequence[int]) -> str:
        """The name in the source of a weight of the cut model."""
        for stack in self.lists:
            if name.startswith(stack + "."):
                layer, _, rest = name[len(stack) + 1 :].partition(".")
                return f"{stack}.{chosen[int(layer)]}.{rest}" if rest else f"{stack}.{chosen[int(layer)]}"
        return name


def stack_of(model: Any) -> Stack:
    """The model's layers: of the lists that have as many entries as it has layers, and that run on text, the one with
    the most weights. A tower for pictures may have as many."""
    name = type(model).__name__
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.ParameterList)) and len(module) == count
    }
    if len(found) > 1:
        with evaluating(model), torch.no_grad():
            ran = _ran(model, {name: module[0] for name, module in found.items() if isinstance(module, nn.ModuleList)})
        found = {name: module for name, module in found.items() if name in ran or isinstance(module, nn.ParameterList)}
    stacks = {name: module for name, module in found.items() if isinstance(module, nn.ModuleList)}
    if not stacks:
        raise InputError(f"cannot cut layers from {name}: no list of {count} layers found in it")
    largest = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()))
    return Stack(largest, stacks[largest], tuple(found))


def _ran(model: Any, modules: dict[str, nn.Module]) -> set[str]:
    """Which of the modules run on text."""
    ran: set[str] = set()
    hooks = [module.register_forward_pre_hook(lambda *_, name=name: ran.add(name)) for name, module in modules.items()]
    try:
        model(input_ids=random_ids(model, 1, 2), use_cache=False)
    except DEVICE_ERRORS:
        raise
    except Exception as failure:  # whatever a family raises
        reason = f"it does not run on tokens alone ({first_line(failure, named=True)})"
        raise InputError(f"cannot cut layers from {type(model).__name__}: {reason}") from failure
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def _check_cuttable(model: Any) -> None:
    """Raises `InputError` where the weights are not a plain model's own."""
    name = type(model).__name__
    if hasattr(model, "peft_config") or hasattr(model, "get_base_model"):
        raise InputError(f"cannot cut layers from {name}: merge its adapter first (merge_and_unload)")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise InputError(f"cannot cut layers from {name}: its weights are quantised; load it without quantization")
    if any(weight.is_meta for weight in model.state_dict().values()):
        raise InputError(f"cannot cut layers from {name}: some of its weights are on disk or not loaded")


def _empty(model: Any, config: Any) -> Any:
    """A model of the source's class and attention, by another configuration."""
    attention = getattr(model.config, "_attn_implementation", None)
    if attention in ("eager", "sdpa"):  # another was chosen for where the source runs
        config._attn_implementation = attention
    return type(model)(config).eval()


def _parts_of(weight: Tensor, shape: torch.Size, count: int, chosen: Sequence[int]) -> Tensor:
    """Of a weight that has a part for each of `count` layers along one dimension, the parts of the chosen ones."""
    wrong = [dim for dim, (a, b) in enumerate(zip(weight.shape, shape, strict=True)) if a != b]
    if (
        len(wrong) != 1
        or weight.shape[wrong[0]] % count
        or weight.shape[wrong[0]] // count * len(chosen) != shape[wrong[0]]
    ):
        raise RuntimeError(f"a weight of shape {tuple(weight.shape)} where {tuple(shape)} is right")
    parts = weight.unflatten(wrong[0], (count, -1))
    return parts.index_select(wrong[0], torch.tensor(list(chosen), device=weight.device)).flatten(
        wrong[0], wrong[0] + 1
    )
