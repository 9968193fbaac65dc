"""Quantised teachers, kept as they are after quantisation: the next load reads those files alone.

Knows what a quantised model was made from, and how far it is from the full one. Does not know what it is for.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from pocl_fast.data.encoding import EncodedSample
from pocl_fast.models.fingerprints import hub_revision, source_fingerprint
from pocl_fast.models.loading import load_model, require_bitsandbytes, resolve
from pocl_fast.models.placement import Placement, input_device
from pocl_fast.system import console, ranks
from pocl_fast.system.errors import InputError
from pocl_fast.system.files import write_json
from pocl_fast.system.seal import damage, seal

PROBE_TOKENS = 256  # supervised tokens at which the full model's logits are kept: 156 MB of a vocabulary of 152k
_RECORD = "quantised.json"


@dataclass(frozen=True)
class Divergence:
    """How far the quantised model is from the full one, over the supervised tokens of some samples."""

    kl: float  # mean KL of the quantised distribution from the full one, nats a token
    agreement: float  # share of tokens at which both have the same first choice
    tokens: int

    def describe(self) -> str:
        return (
            f"KL {self.kl:.2g} nats a token to the full model, the same first choice at {100 * self.agreement:.1f} % of"
            f" {self.tokens} tokens"
        )


@dataclass(frozen=True)
class _Made:
    """What is known of a quantised model that is kept."""

    seconds: float  # that loading it took from the full weights
    divergence: Divergence | None  # None where no samples were given

    @classmethod
    def read(cls, folder: Path) -> _Made:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        found = record["divergence"]
        return cls(record["seconds"], None if found is None else Divergence(**found))


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
    """The quantised model behind `source`, as `load_model` gives it; kept in `folder` the first time, read from there
    from then on, by whatever process.

    The first time its divergence from the full model is measured on `probe_samples`: the full one, in `dtype`, is
    loaded before it and has left memory by then. `say` (of rank 0) is told load times and divergence. What is kept is
    found by the source's files, quantisation, dtype, kind of device and library versions; a damaged one is named and
    made again. Every rank must call it. Raises `InputError` where the model cannot be loaded or the folder not be
    written.
    """
    require_bitsandbytes(quantization)
    made_from = _made_from(source, quantization, dtype, torch.device(device), trust_remote_code)
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    target = Path(folder) / f"{quantization}-{key}"

    def make() -> str:
        with _alone(target, say):
            if _whole(target, say):
                return "loaded"
            options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
            _make(source, quantization, target, device, probe_samples, made_from, options)
            return "made"

    start = time.perf_counter()
    outcome = ranks.from_first(make)
    if outcome == "made":
        start = time.perf_counter()
    placement = Placement({"": str(device)})
    model = load_model(str(target), dtype=dtype, placement=placement, trust_remote_code=trust_remote_code)
    seconds = time.perf_counter() - start
    if ranks.is_first():
        made = _Made.read(target)
        size = sum(path.stat().st_size for path in target.iterdir()) / 2**20
        times = f"{seconds:.2f} s to load from {target} ({size:.0f} MiB), {made.seconds:.1f} s from the full weights"
        say(f"{source} in {quantization}: {times}" + (f"; {made.divergence.describe()}" if made.divergence else ""))
    return model


def _made_from(
    source: str, quantization: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> dict[str, str | None]:
    return {
        "source": source_fingerprint(source),
        "revision": hub_revision(source, trust_remote_code=trust_remote_code),
        "quantization": quantization,
        "dtype": str(dtype),
        "device": device.type,  # kernels that round differently
        **{name: version(name) for name in ("bitsandbytes", "transformers", "torch")},
    }


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


def _make(
    source: str,
    quantization: Literal["8bit", "4bit"],
    target: Path,
    device: torch.device | str,
    probe_samples: Sequence[EncodedSample],
    made_from: dict[str, str | None],
    options: dict[str, Any],
) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    probes = _first_tokens(probe_samples, PROBE_TOKENS)
    with _plain_weights(source, device, probes, options) as (weights, want, seconds):
        start = time.perf_counter()
        model = load_model(weights, device=device, quantization=quantization, **options)
        seconds += time.perf_counter() - start
    with _written(target):
        model.save_pretrained(partial)  # before it first runs: on a CPU that packs 4-bit weights in another way
    divergence = None if want is None else divergence_of(want, response_logits(model, probes))
    del model
    with _written(target):
        known = None if divergence is None else asdict(divergence)
        write_json(partial / _RECORD, {"made_from": made_from, "seconds": seconds, "divergence": known})
        seal(partial, target)


@contextlib.contextmanager
def _plain_weights(
    source: str, device: torch.device | str, probes: Sequence[EncodedSample], options: dict[str, Any]
) -> Iterator[tuple[str, Tensor | None, float]]:
    """A source of the full weights as safetensors, what the full model says on the probes, and the seconds that making
    such a source took. The full model has left memory by then."""
    gguf = resolve(source).gguf_file is not None
    want, seconds = None, 0.0
    with tempfile.TemporaryDirectory(prefix="pocl-fast-") if gguf else contextlib.nullcontext(source) as weights:
        if gguf or probes:
            start = time.perf_counter()
            # on a GPU as much of it as fits: that it does not is why it is quantised
            spread = Placement("auto") if torch.device(device).type == "cuda" and not gguf else None
            full = load_model(source, placement=spread, **options)
            if gguf:
                full.save_pretrained(weights)
                seconds = time.perf_counter() - start
            want = response_logits(full, probes) if probes else None
            del full
        yield weights, want, seconds


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


def divergence_of(full: Tensor, quantised: Tensor) -> Divergence:
    """Of a quantised model's logits [N, V] from the full one's at the same positions."""
    total = 0.0
    for rows, others in zip(full.split(64), quantised.split(64), strict=True):
        log_p, log_q = torch.log_softmax(rows.double(), -1), torch.log_softmax(others.double(), -1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    agreement = float((full.argmax(-1) == quantised.argmax(-1)).double().mean())
    return Divergence(total / len(full), agreement, len(full))
