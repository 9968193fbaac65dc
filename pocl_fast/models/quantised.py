"""Quantised models kept on disk: a model is quantised once, and later loads read the quantised weights alone.

Knows what a quantised model was made from, and how close it is to the full one. Does not know what it is for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.models.fingerprints import hub_revision, source_fingerprint
from pocl_fast.models.loading import load_model, make_savable, require_bitsandbytes, resolve
from pocl_fast.models.placement import Placement, input_device
from pocl_fast.models.probing import DEVICE_ERRORS
from pocl_fast.system import console, ranks
from pocl_fast.system.errors import InputError, first_line
from pocl_fast.system.files import write_json
from pocl_fast.system.seal import damage, seal

PROBE_TOKENS = 256  # tokens of last answers at which the full model's logits are kept: 156 MB of a vocabulary of 152k
MOSTLY = 0.9  # a smaller share of the layers' weights is said: less memory is saved than the name promises
_RECORD = "quantised.json"
_FORMAT = "2"  # of `_Made` as it is recorded: 1 had another name for `fidelity`


@dataclass(frozen=True)
class Fidelity:
    """How close a quantised model's predictions are to the full model's, over the response tokens of some samples."""

    kl: float  # mean KL(full || quantised), nats a token
    agreement: float  # share of tokens at which both models have the same most likely token
    tokens: int

    def describe(self) -> str:
        return (
            f"KL {self.kl:.2g} nats a token to the full model, the same first choice at {100 * self.agreement:.1f} % of"
            f" {self.tokens} tokens"
        )


@dataclass(frozen=True)
class _Recipe:
    """What a quantised model is made from."""

    source: str
    quantization: Literal["8bit", "4bit"]
    dtype: torch.dtype
    device: torch.device
    trust_remote_code: bool

    @cached_property
    def identity(self) -> dict[str, str | None]:
        """Two recipes give the same model, with the same fields in its record, exactly where these are equal."""
        return {
            "format": _FORMAT,
            "source": source_fingerprint(self.source),
            "revision": hub_revision(self.source, trust_remote_code=self.trust_remote_code),
            "quantization": self.quantization,
            "dtype": str(self.dtype),
            "device": self.device.type,  # kernels that round differently
            **{name: version(name) for name in ("bitsandbytes", "transformers", "torch")},
        }

    def folder_name(self) -> str:
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.quantization}-{key}"


@dataclass(frozen=True)
class _Made:
    """What is recorded of a quantised model beside its weights."""

    seconds: float  # that loading and quantising the full weights took
    fidelity: Fidelity | None  # None where no samples were given

    def write(self, folder: Path, recipe: _Recipe) -> None:
        write_json(folder / _RECORD, {"made_from": recipe.identity, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> _Made:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        found = record["fidelity"]
        return cls(record["seconds"], None if found is None else Fidelity(**found))


def load_quantised(
    source: str,
    quantization: Literal["8bit", "4bit"],
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    probe_samples: Sequence[EncodedSample] = (),
    say: Callable[[str], object] = console.say,
    trust_remote_code: bool = False,
) -> Any:
    """The quantised model behind `source`, as `load_model` gives it. The first call, of any process, quantises the full
    weights and keeps the result in `folder`; later calls read that alone.

    The first call also measures how close the quantised model is to the full one on `probe_samples`. The full model is
    loaded in `dtype` for that, and has left memory before the quantised one is loaded. Rank 0 tells `say` the load
    times and this closeness. A kept model is found by its source's files, quantisation, dtype, kind of device and
    library versions; a damaged one is named and made again. Every rank must call. Raises `InputError` where the model
    cannot be loaded or `folder` cannot be written.
    """
    require_bitsandbytes(quantization)
    recipe = _Recipe(source, quantization, dtype, torch.device(device), trust_remote_code)
    target = Path(folder) / recipe.folder_name()

    def make() -> str:
        with _alone(target, say):
            if _whole(target, say):
                return "loaded"
            _make(recipe, target, probe_samples)
            return "made"

    start = time.perf_counter()
    outcome = ranks.from_first(make)
    if outcome == "made":
        start = time.perf_counter()
    placement = Placement({"": str(device)})
    model = load_model(str(target), dtype=dtype, placement=placement, trust_remote_code=trust_remote_code)
    seconds = time.perf_counter() - start
    part = quantised_part(model)
    if part.share == 0:
        raise InputError(
            f"{source} in {quantization}: bitsandbytes finds no layer in {type(model).__name__} that it quantises;"
            " load it as it is (teacher_quantization none)"
        )
    if ranks.is_first():
        if part.share < MOSTLY:
            say(f"{source} in {quantization}: {part.describe(dtype)}")
        made = _Made.read(target)
        size = sum(path.stat().st_size for path in target.iterdir()) / 2**20
        times = f"{seconds:.2f} s to load from {target} ({size:.0f} MiB), {made.seconds:.1f} s from the full weights"
        say(f"{source} in {quantization}: {times}" + (f"; {made.fidelity.describe()}" if made.fidelity else ""))
    return model


def _whole(target: Path, say: Callable[[str], object]) -> bool:
    if not target.exists():
        return False
    if (wrong := damage(target)) is None:
        return True
    say(f"the quantised model {target} is made again: {wrong}")
    return False


@contextlib.contextmanager
def _alone(target: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Waits until no other process is making this model."""
    with _written(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.with_name(target.name + ".lock"), "w")  # noqa: SIM115 (closed below)
    with lock:  # closing it lets go
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process, which is making {target}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _written(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot keep the quantised model in {target}: {getattr(error, 'strerror', None) or error}. Free some"
            " space, or give another folder"
        ) from error


def _make(recipe: _Recipe, target: Path, probe_samples: Sequence[EncodedSample]) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    probes = _first_tokens(probe_samples, PROBE_TOKENS)
    with _plain_weights(recipe, probes) as (weights, want, seconds):
        start = time.perf_counter()
        model = load_model(
            weights,
            dtype=recipe.dtype,
            device=recipe.device,
            quantization=recipe.quantization,
            trust_remote_code=recipe.trust_remote_code,
        )
        seconds += time.perf_counter() - start
    with _written(target):
        make_savable(model, console.say, "teacher")
        model.save_pretrained(partial)  # before it first runs: on a CPU that packs 4-bit weights in another way
    _check_runs(model, recipe)
    made = _Made(seconds, None if want is None else fidelity(want, response_logits(model, probes)))
    del model
    with _written(target):
        made.write(partial, recipe)
        seal(partial, target)


@contextlib.contextmanager
def _plain_weights(recipe: _Recipe, probes: Sequence[EncodedSample]) -> Iterator[tuple[str, Tensor | None, float]]:
    """A source of the full weights as safetensors, the full model's logits on the probes, and the seconds that making
    such a source took. The full model has left memory by then."""
    source = recipe.source
    where = resolve(source)
    gguf, plain = where.gguf_file is not None, where.is_plain
    want, seconds = None, 0.0
    with contextlib.nullcontext(source) if plain else tempfile.TemporaryDirectory(prefix="pocl-fast-") as weights:
        if probes or not plain:
            start = time.perf_counter()
            # on a GPU as much of it as fits: that it does not is why it is quantised
            spread = Placement("auto") if recipe.device.type == "cuda" and not gguf else None
            full = load_model(source, dtype=recipe.dtype, placement=spread, trust_remote_code=recipe.trust_remote_code)
            if not plain:
                full.save_pretrained(weights)
                seconds = time.perf_counter() - start
            want = response_logits(full, probes) if probes else None
            del full
        yield weights, want, seconds


class QuantisedPart(NamedTuple):
    """How much of a model's layers bitsandbytes has quantised: it takes linear layers alone."""

    share: float  # of the weights of two and more dimensions, embeddings and lm_head aside
    whole: tuple[str, ...]  # names of weights that it left whole, largest first

    def describe(self, dtype: torch.dtype) -> str:
        return (
            f"only {100 * self.share:.0f} % of the layers' weights are quantised, as bitsandbytes takes linear layers"
            f" alone; {self.whole[0]} and {len(self.whole) - 1} more stay in {str(dtype).removeprefix('torch.')}"
        )


def quantised_part(model: Any) -> QuantisedPart:
    """What of a model in 8 or 4 bits is quantised."""
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    layers = {name: one for name, one in model.named_modules() if isinstance(one, kinds)}
    tables = [one for one in model.modules() if isinstance(one, torch.nn.Embedding)]
    ends = [id(one.weight) for one in (*tables, model.get_output_embeddings())]
    whole = {
        name: weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and id(weight) not in ends and name.rpartition(".")[0] not in layers
    }
    done = sum(one.in_features * one.out_features for one in layers.values())
    names = sorted(whole, key=lambda name: -whole[name])
    return QuantisedPart(done / max(1, done + sum(whole.values())), tuple(names))


@torch.no_grad()
def _check_runs(model: Any, recipe: _Recipe) -> None:
    """Raises `InputError` where a quantised model does not run: a family may use its layers' weights by itself (Mamba),
    and on a CPU 4 bits need sizes that are multiples of 64."""
    try:
        model(input_ids=torch.tensor([[1, 2, 3]], device=input_device(model)), use_cache=False)
    except DEVICE_ERRORS:
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, AssertionError) as error:
        raise InputError(
            f"{recipe.source} does not run in {recipe.quantization}: bitsandbytes' layers do not fit"
            f" {type(model).__name__} or its sizes ({first_line(error)}). Load it as it is (teacher_quantization none)"
        ) from error


def _first_tokens(samples: Sequence[EncodedSample], most: int) -> list[EncodedSample]:
    """The first samples, of at most so many response tokens together."""
    kept: list[EncodedSample] = []
    for sample in samples:
        if most == 0:
            break
        part = sample.response_ids[:most]
        kept.append(EncodedSample(sample.index, sample.prompt_ids, part, sample.truncated))
        most -= len(part)
    return kept


@torch.no_grad()
def response_logits(model: Any, samples: Sequence[EncodedSample]) -> Tensor:
    """[N, V] fp32 logits on the CPU at the positions that predict the samples' responses, in their order."""
    rows = []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.response_ids], device=input_device(model))
        logits = model(input_ids=ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1]
        rows.append(logits.float().cpu())
    return torch.cat(rows)


def fidelity(full: Tensor, quantised: Tensor) -> Fidelity:
    """How close a quantised model's logits [N, V] are to the full model's at the same positions."""
    total = 0.0
    for rows, others in zip(full.split(64), quantised.split(64), strict=True):
        log_p, log_q = torch.log_softmax(rows.double(), -1), torch.log_softmax(others.double(), -1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    agreement = float((full.argmax(-1) == quantised.argmax(-1)).double().mean())
    return Fidelity(total / len(full), agreement, len(full))
