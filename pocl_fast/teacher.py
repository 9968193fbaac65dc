"""The teacher as training sees it: logits at the supervised positions of a batch, from a body that runs once a sample.

A frozen teacher gives the same hidden states on each of the recipe's 20 passes, so they are kept on disk: 2·H bytes a
supervised token in bf16 instead of 2·V, and with the lm_head they give back the whole distribution.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pocl_fast.errors import InputError
from pocl_fast.heads import check_head, lm_head
from pocl_fast.models import weights_fingerprint
from pocl_fast.packing import pack, packing_error, supervised_hidden
from pocl_fast.samples import EncodedSample
from pocl_fast.teachers import LinearTeacher

PACKING_TOLERANCE = (
    1e-2  # relative; families that do not support packing are off by 0.1 and more, bf16 rounding is 4e-3
)


class TeacherCache:
    """Final hidden states at supervised positions, on disk, by sample.

    Keyed by the teacher's weights and the sample's tokens, so that a changed teacher, tokenizer, template or length
    limit never finds an old entry. Shards are complete or absent (written to a temporary name, then renamed).
    """

    def __init__(
        self, folder: str | Path, *, teacher: str, dtype: torch.dtype = torch.bfloat16, shard_bytes: int = 1 << 25
    ) -> None:
        """`teacher` identifies the teacher's weights; `shard_bytes` are collected in memory before a shard is
        written."""
        self.folder = Path(folder) / f"{teacher[:16]}-{str(dtype).removeprefix('torch.')}"
        self.dtype = dtype
        self._shard_bytes = shard_bytes
        self._places: dict[str, tuple[Any, int, int]] = {}  # key -> opened shard, first row, rows
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._next_shard = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            self._open_shard(path)

    @staticmethod
    def key(sample: EncodedSample) -> str:
        """Identifies a sample by its tokens and by which of them are the response."""
        digest = hashlib.sha256(str(len(sample.prompt_ids)).encode())
        digest.update(array("q", sample.prompt_ids + sample.response_ids).tobytes())
        return digest.hexdigest()[:32]

    def __contains__(self, sample: EncodedSample) -> bool:
        key = self.key(sample)
        return key in self._places or key in self._pending

    def get(self, sample: EncodedSample) -> Tensor:
        """[N, H] hidden states of a sample that is in the cache."""
        key = self.key(sample)
        if key in self._pending:
            return self._pending[key]
        shard, first, rows = self._places[key]
        return shard.get_slice("hidden")[first : first + rows]

    def put(self, sample: EncodedSample, hidden: Tensor) -> None:
        """Adds the [N, H] hidden states of one sample, rounded to the cache's dtype."""
        stored = hidden.detach().to(self.dtype).cpu().clone()
        self._pending[self.key(sample)] = stored
        self._pending_bytes += stored.nbytes
        if self._pending_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending as one shard."""
        if not self._pending:
            return
        path = self.folder / f"shard-{self._next_shard:05d}.safetensors"
        partial = path.with_suffix(f".partial-{os.getpid()}")
        rows = [[key, len(hidden)] for key, hidden in self._pending.items()]
        try:
            save_file({"hidden": torch.cat(list(self._pending.values()))}, partial, metadata={"rows": json.dumps(rows)})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise InputError(
                f"cannot write the teacher cache {path}: {error}. Free some space and run the command again"
            ) from error
        self._pending.clear()
        self._pending_bytes = 0
        self._open_shard(path)

    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("shard-*.safetensors"))

    def _open_shard(self, path: Path) -> None:
        self._next_shard = max(self._next_shard, int(path.stem.split("-")[1]) + 1)
        try:
            shard = safe_open(path, framework="pt")
            rows = json.loads(shard.metadata()["rows"])
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError):
            print(f"teacher cache: {path.name} is damaged and is computed again", flush=True)
            path.unlink()
            return
        first = 0
        for key, count in rows:
            self._places[key] = (shard, first, count)
            first += count


class Teacher:
    """A frozen language model that gives its logits at the supervised positions of packed samples."""

    def __init__(self, model: Any, cache_folder: str | Path, *, cache_dtype: torch.dtype = torch.bfloat16) -> None:
        """`model` is a transformers causal language model whose packing is enabled. Raises `InputError` where its
        logits are not its lm_head applied to its last hidden states."""
        self._model: Any | None = model.requires_grad_(False).eval()
        self.config = model.config
        self.lm_head = lm_head(model)
        self._packed = packing_error(model, self.config.vocab_size) < PACKING_TOLERANCE
        check_head(model)
        self.cache = TeacherCache(cache_folder, teacher=weights_fingerprint(model), dtype=cache_dtype)

    @property
    def vocab_size(self) -> int:
        return self.lm_head.weight.shape[0]

    def output(self, samples: Sequence[EncodedSample]) -> LinearTeacher:
        """What a loss takes as its teacher at the supervised positions of the samples, in their order; the body runs
        only for new ones."""
        head = self.lm_head
        return LinearTeacher(self.hidden(samples), head.weight, head.bias, head.logit_scale, head.logit_softcap)

    @torch.no_grad()
    def logits(self, samples: Sequence[EncodedSample]) -> Tensor:
        """[N, V_t] logits at the supervised positions of the samples, in their order."""
        return self.lm_head.logits(self.hidden(samples))

    @torch.no_grad()
    def hidden(self, samples: Sequence[EncodedSample]) -> Tensor:
        """[N, H] final hidden states at the supervised positions, the same bits whether just computed or read."""
        new = [sample for sample in samples if sample not in self.cache]
        if new:
            if self._model is None:
                raise RuntimeError("the teacher's body was released before every sample was cached")
            batch = pack(new).to(self.lm_head.weight.device)
            hidden = supervised_hidden(self._model.get_decoder(), batch, packed=self._packed)
            for sample, rows in zip(new, hidden.split(batch.counts), strict=True):
                self.cache.put(sample, rows)
        return torch.cat([self.cache.get(sample) for sample in samples]).to(
            self.lm_head.weight.device, self.lm_head.weight.dtype
        )

    def release_body_if_cached(self, samples: Sequence[EncodedSample]) -> bool:
        """Frees all but the lm_head once every one of the samples is in the cache; says whether the body is gone."""
        if self._model is not None and all(sample in self.cache for sample in samples):
            self.cache.flush()
            self.lm_head = self.lm_head.detached()
            self._model = None
        return self._model is None
