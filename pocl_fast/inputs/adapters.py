"""Adapters of peft for a student: their configuration out of options, put on the student, described.

Knows peft. Does not know how adapters are trained, nor how they are saved (saved_adapters.py).
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pocl_fast.models.loading import ADAPTER
from pocl_fast.models.parameters import num_parameters
from pocl_fast.options.data import AdapterOptions
from pocl_fast.system.errors import InputError, first_line
from pocl_fast.system.typed_values import did_you_mean

ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the lm_head
INSTALL = 'pip install "pocl-fast[peft]"'


class AdapterSettings(Protocol):
    """A run's options, a trainer's arguments."""

    @property
    def lora_rank(self) -> int | None: ...
    @property
    def lora_alpha(self) -> float | None: ...
    @property
    def lora_targets(self) -> list[str]: ...
    @property
    def peft_config(self) -> Path | None: ...
    @property
    def merge_adapters(self) -> bool: ...


# -- the configuration -------------------------------------------------------------------------------------------------


def configuration_of(options: AdapterSettings, given: Any = None) -> Any:
    """The configuration of peft that the options describe, or the one `given` to a trainer; None for no adapters.

    Raises `InputError` as `check_options` does, and where adapters are described twice, or none that are to be merged.
    """
    config = check_options(options)
    if isinstance(given, (str, os.PathLike)):
        given = _from_file(Path(given))
    if given is not None and config is not None:
        raise InputError(
            f"adapters are described twice, by the trainer's argument peft_config and by {named_by(options)} of its"
            " arguments: give one of them"
        )
    chosen = config if given is None else given
    if options.merge_adapters and chosen is None:
        raise InputError("merge_adapters has no adapters to merge: give lora_rank or peft_config")
    return chosen


def check_options(options: AdapterSettings) -> Any:
    """The configuration of peft that the options describe; None for no adapters.

    Raises `InputError` for options that do not go together, for a file that is no configuration, for adapters that
    cannot be trained here, and where peft is not installed.
    """
    by_rank, file = options.lora_rank is not None, options.peft_config
    if by_rank and file is not None:
        raise InputError(
            "lora_rank and peft_config both describe the adapters: give one of them (a file has r, lora_alpha and"
            " target_modules of its own)"
        )
    if not by_rank and options.lora_alpha is not None:
        raise InputError(f"lora_alpha {options.lora_alpha:g} is for LoRA adapters: give lora_rank too")
    if not by_rank and options.lora_targets != AdapterOptions().lora_targets:
        raise InputError(f"lora_targets {' '.join(options.lora_targets)} is for LoRA adapters: give lora_rank too")
    if not by_rank and file is None:
        return None
    if importlib.util.find_spec("peft") is None:
        raise InputError(f"{'lora_rank' if by_rank else 'peft_config'} needs peft: {INSTALL}")
    config = _lora(options) if file is None else _from_file(file)
    _check_kind(config, "lora_rank" if file is None else f"peft_config {file}")
    return config


def named_by(options: AdapterSettings) -> str:
    """The option that asks for the adapters, or the trainer's argument, for messages."""
    return "peft_config" if options.lora_rank is None else "lora_rank"


def _lora(options: AdapterSettings) -> Any:
    from peft import LoraConfig

    rank = int(options.lora_rank or 0)
    alpha: Any = options.lora_alpha or 2 * rank
    targets = [name.strip() for words in options.lora_targets for name in words.split(",") if name.strip()]
    if not targets:
        raise InputError(f"lora_targets names no layer: give names, such as q_proj v_proj, or {ALL_LINEAR}")
    if ALL_LINEAR in targets and len(targets) > 1:
        others = " ".join(name for name in targets if name != ALL_LINEAR)
        raise InputError(f"lora_targets: {ALL_LINEAR} stands alone; leave out {others}, or name every layer")
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        task_type="CAUSAL_LM",
    )


def configuration_file(given: Path) -> Path:
    """The file of a configuration, which may be named by the folder that it is in."""
    path = given.expanduser()
    return path / ADAPTER if path.is_dir() else path


def _from_file(given: Path) -> Any:
    """The configuration of peft in a JSON file, for new adapters."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft import __version__ as version

    path = configuration_file(given)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read peft_config {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"peft_config {path} is not JSON: {error}") from error
    kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(known, dict) or "peft_type" not in known:
        raise InputError(f"peft_config {path} has no peft_type, as {ADAPTER} of peft has: give one, such as LORA")
    kind = str(known.pop("peft_type")).upper()
    if kind not in kinds:
        near = did_you_mean(kind, list(kinds))
        raise InputError(f"peft_config {path}: peft_type {kind} is none of peft {version}{near}; it has {_list(kinds)}")
    accepted = [option.name for option in fields(kinds[kind]) if option.init]
    if unknown := sorted(known.keys() - set(accepted)):
        named = ", ".join(name + did_you_mean(name, accepted) for name in unknown)
        raise InputError(
            f"peft_config {path}: peft {version} does not know {named} of {kind}: take them out, or install the newer"
            " peft that wrote the file"
        )
    # of adapters that were saved: frozen, and for a model of their own
    known |= {"inference_mode": False, "base_model_name_or_path": None, "revision": None, "auto_mapping": None}
    known["task_type"] = known.get("task_type") or "CAUSAL_LM"
    try:
        return kinds[kind](**known)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise InputError(f"peft_config {path} is no {kind} that peft {version} takes: {first_line(error)}") from error


def _check_kind(config: Any, argument: str) -> None:
    """Raises `InputError` for adapters that do not train as part of a causal language model on packed rows."""
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise InputError(f"{argument} is for task_type {task}: a language model needs CAUSAL_LM")
    kind = type(config).__name__
    if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
        raise InputError(f"{kind} puts tokens before the prompt, which packed batches have no room for")
    if getattr(config, "alora_invocation_tokens", None) is not None:
        raise InputError(
            f"{argument}: alora_invocation_tokens look for their place in each prompt, which packed batches do not"
            " give: leave them out"
        )
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if hasattr(tuner, "update_and_allocate"):
        raise InputError(f"{kind} moves ranks between layers while it trains, which is not done here: give LoRA")


def check_fit(model: Any, options: AdapterSettings) -> None:
    """Raises `InputError` where the adapters of the options do not fit the model, which stays as it is: for a model
    that is used for other things before its adapters train."""
    if (config := configuration_of(options)) is None:
        return
    from peft import get_peft_model

    check_targets(model, config)
    try:
        with torch.device("meta"):
            empty = type(model)(copy.deepcopy(model.config))
    except Exception:  # a model's own code may need memory for its weights: what does not fit is found in training
        return
    try:
        get_peft_model(empty, copy.deepcopy(config), low_cpu_mem_usage=True)
    except (ValueError, KeyError) as error:
        raise _unfit(model, named_by(options), error) from error
    except Exception:  # kinds that begin with the weights' values, which an empty model has not: the same
        return


def _unfit(model: Any, argument: str, error: Exception) -> InputError:
    return InputError(f"{argument} does not fit {type(model).__name__}: {first_line(error)}")


# -- on a student ------------------------------------------------------------------------------------------------------


def with_adapters(model: Any, config: Any, argument: str, *, seed: int = 0, merges: bool = False) -> Any:
    """The model with new adapters of peft, whose first values `seed` draws; on the meta device these have none.

    Raises `InputError` where `config`, given as `argument`, does not describe adapters for this model, and for ones
    that cannot be merged where that is asked for (`merges`).
    """
    try:
        from peft import PeftConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise InputError(f"{argument} needs peft: {INSTALL}") from error
    if not isinstance(config, PeftConfig):
        kind = type(config).__name__
        raise InputError(f"{argument} is a {kind}, and no configuration of peft: give one, as LoraConfig(r=16)")
    if isinstance(model, PeftModel):
        raise InputError(
            f"the model has adapters already, and {argument} would put others on top: give the model without them"
            " (merge_and_unload()), or leave the argument out to train those it has"
        )
    _check_kind(config, argument)
    check_targets(model, config)
    before = {name: _bits(tensor) for name, tensor in plain_state(model).items()}
    try:
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        empty = any(p.is_meta for p in model.parameters())
        with torch.random.fork_rng(sorted(devices, key=str)):
            torch.manual_seed(seed)  # a training that begins again begins with the same adapters, on every rank
            adapted = get_peft_model(model, config, low_cpu_mem_usage=empty)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise _unfit(model, argument, error) from error
    after = {name: _bits(tensor) for name, tensor in plain_state(adapted.get_base_model()).items()}
    if new := sorted(after.keys() - before.keys()):
        raise InputError(
            f"{argument}: these adapters add layers to the model ({new[0]}), which it could not be saved with: leave"
            " them out (layer_replication)"
        )
    if changed := sorted(name for name, bits in before.items() if after.get(name) != bits):
        raise InputError(
            f"{argument}: these adapters begin by changing the model's own weights ({changed[0]} and {len(changed) - 1}"
            " more), which are not saved with them: give an init_lora_weights that leaves these as they are"
        )
    if merges:
        check_merges(adapted, "merge_adapters")
    return adapted


def _bits(tensor: Tensor) -> Any:
    """A sum over a tensor's bits, which changes where its values do."""
    if tensor.is_meta or hasattr(tensor, "ds_id") or hasattr(tensor, "full_tensor"):
        return None
    whole = tensor.detach().contiguous().view(-1)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(whole.element_size())
    return (tuple(tensor.shape), 0 if kind is None else whole.view(kind).sum(dtype=torch.int64).item())


def check_targets(model: Any, config: Any) -> None:
    """Raises `InputError` where a name of a layer that is to get adapters is no layer's, which peft passes over where
    another name is one's."""
    for setting in ("target_modules", "modules_to_save", "feedforward_modules"):
        names = getattr(config, setting, None)
        if names is None or isinstance(names, str):  # a pattern, which peft refuses where nothing matches
            continue
        modules = [name for name, _ in model.named_modules()]
        if unknown := sorted(n for n in names if not any(m == n or m.endswith("." + n) for m in modules)):
            raise InputError(
                f"{type(model).__name__} has no layer {', '.join(unknown)} ({setting}). Its linear layers are"
                f" {_list(_counted(_linear_layers(model)))}; {ALL_LINEAR} is all of these but the lm_head"
            )


def _linear_layers(model: Any) -> Iterator[str]:
    from transformers.pytorch_utils import Conv1D

    return (name for name, one in model.named_modules() if isinstance(one, (nn.Linear, Conv1D)))


def _counted(names: Iterator[str]) -> list[str]:
    """The last words of layers' names, each with how many there are, in their order: "q_proj (30)"."""
    return [f"{name} ({count})" for name, count in Counter(name.rpartition(".")[2] for name in names).items()]


def check_merges(adapted: Any, why: str) -> None:
    """Raises `InputError` where a kind of the adapters' layers cannot be merged; `why` says what merges them."""
    kinds = {type(one): one for one in adapted.modules() if hasattr(one, "base_layer") and hasattr(one, "merge")}
    for kind, layer in kinds.items():
        try:
            copy.deepcopy(layer).merge(safe_merge=True)
        except Exception as error:  # whatever a kind of adapters raises
            raise InputError(
                f"{why}: adapters of the kind {kind.__module__}.{kind.__qualname__} cannot be merged into their model"
                f" ({first_line(error, named=True)}): give others, such as LoRA"
            ) from error


def described(adapted: Any) -> str:
    """What is trained, in words: "LoRA rank 16, alpha 32 on q_proj (30), v_proj (30): 0.9 M of 135 M weights are
    trained"."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    config = adapted.active_peft_config
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if kind == "LORA":
        kind = f"{'DoRA' if config.use_dora else 'LoRA'} rank {config.r}, alpha {config.lora_alpha:g}"
    else:
        kind = f"adapters of the kind {kind}"
    named = list(adapted.get_base_model().named_modules())
    layers = _counted(name for name, one in named if isinstance(one, BaseTunerLayer) and ".base_layer" not in name)
    whole = _counted(name for name, one in named if isinstance(one, AuxiliaryTrainingWrapper))
    trained = sum(p.numel() for p in {id(p): p for p in adapted.parameters() if p.requires_grad}.values())
    also = f", and the whole of {_list(whole)}" if whole else ""
    count, every = _short(trained), _short(num_parameters(adapted))
    return f"{kind} on {_list(layers)}{also}: {count} of {every} weights are trained"


def _short(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count >= 100_000 else f"{count:,}"


def _list(names: Any) -> str:
    return ", ".join(names)


def plain_state(model: Any) -> dict[str, Tensor]:
    """The model's own weights and buffers that are saved, under the names that they have without adapters."""
    return dict(_plain(model, ""))


def _plain(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        module = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in module.named_children():
        yield from _plain(child, f"{prefix}{name}.")
