"""The teacher as training uses it: its outputs at the supervised positions of a batch, each sample computed once.

A model is a body and an lm_head; the body is its embeddings and layers. A frozen teacher's body computes the same
hidden states on each of the recipe's 20 passes, so they are kept on disk (see `TeacherCache`): 2·H bytes a supervised
token in bf16 instead of 2·V, and with the lm_head they give back the whole distribution. Knows models, samples and the
cache. Does not know how a teacher is loaded, nor what a step of training is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pocl_fast.data.encoded import EncodedSample
from pocl_fast.data.packed import Rows, pack, token_budget_batches
from pocl_fast.inputs.vocabulary import rows_of
from pocl_fast.loss.teacher_output import LinearTeacher, TopKTeacher
from pocl_fast.models.fingerprints import weights_fingerprint
from pocl_fast.models.lm_head import LmHead, check_head, lm_head
from pocl_fast.models.packed_forward import decoder_of, supervised_hidden
from pocl_fast.models.packing_check import packing_holds
from pocl_fast.models.parameters import num_parameters
from pocl_fast.models.placement import input_device
from pocl_fast.system import console, ranks
from pocl_fast.system.console import shared_progress
from pocl_fast.system.errors import InputError
from pocl_fast.system.writer_lock import Writers
from pocl_fast.teacher.cache import MissingSamples, TeacherCache
from pocl_fast.teacher.shards import HiddenEntries, TopK, TopKEntries

if TYPE_CHECKING:
    from pocl_fast.models.precision import Precision

CHUNK = 256  # rows whose logits are in memory at once, where logits are needed
FILL_TOKENS = 8192  # of a batch when the cache is filled ahead of training


class Teacher:
    """A frozen language model and its cache: gives the model's outputs at the supervised positions of packed samples.

    The ranks of a run share one cache: each must make its `Teacher`, once the group of ranks is there.
    """

    def __init__(
        self,
        model: Any,
        cache_folder: str | Path,
        *,
        cache_dtype: torch.dtype = torch.bfloat16,
        cache_mode: Literal["hidden", "topk"] = "hidden",
        top_k: int = 64,
        student_entries: int | None = None,
        precision: str = "",
        device: torch.device | str | None = None,
        keep_body: bool = False,
        packed: Rows | None = None,
        say: Callable[[str], object] = console.say,
    ) -> None:
        """`model` is a transformers causal language model whose packing is enabled.

        In mode "hidden" the cache keeps hidden states in `cache_dtype` (bfloat16, float32, or int8 with a scale a
        token), in mode "topk" the `top_k` largest log-probabilities; `say` gets a line with what that loses. A student
        whose lm_head has fewer rows compares the vocabulary's first `student_entries` alone: the top-k is then taken
        among these, normalised over them. What was computed in another `precision` is not read. Outputs lie on
        `device`, the teacher's own where left out. `keep_body` keeps the body in memory for samples that come up while
        training (see `live`). `packed` says how its batches are laid out, where that is known (see `packing_holds`).
        Raises `InputError` where the model's logits are not its lm_head applied to its last hidden states.
        """
        self._model: Any | None = model.requires_grad_(False).eval()
        self.config = model.config
        head = lm_head(model)
        self._input_device, self._dtype = input_device(model), head.weight.dtype
        self._device = head.weight.device if device is None else torch.device(device)
        # a loss is given hidden states with the lm_head; what is most likely is found where the teacher is
        self._head: LmHead | None = head.to(self._device) if cache_mode == "hidden" else head
        self.vocab_size, hidden_size = head.weight.shape
        self._say: Callable[[str], object] | None = say if ranks.is_first() else None  # until the first batch's loss
        check_head(model, "teacher")
        self._packed = packing_holds(model, self._say) if packed is None else packed
        self.rows = rows_of(model)
        self.parameters = num_parameters(model, adapters=False)
        entries = min(self.vocab_size, student_entries or self.vocab_size)
        if cache_mode == "topk" and not 1 <= top_k <= entries:
            raise InputError(f"a top-k of {top_k}: must be within 1 and the vocabulary's {entries} tokens")
        top = TopKEntries(top_k, entries if entries < self.vocab_size else None)
        self.fingerprint = teacher_fingerprint(model, precision)
        self.computed_in: Precision | None = None  # where whoever made it has chosen one, for the student too
        self.cache = TeacherCache(
            cache_folder,
            teacher=self.fingerprint,
            entries=top if cache_mode == "topk" else HiddenEntries(hidden_size, cache_dtype),
            writers=Writers.of_this_run(),
            say=say,
        )
        self._keep_body = keep_body

    @property
    def lm_head(self) -> LmHead:
        """Raises RuntimeError where a teacher with a top-k cache has released it with its body."""
        if self._head is None:
            raise RuntimeError("the lm_head of a teacher with a top-k cache was released with its body")
        return self._head

    @property
    def has_body(self) -> bool:
        """Whether the body is still in memory."""
        return self._model is not None

    @property
    def model(self) -> Any:
        """The whole model. Raises RuntimeError once its body was released."""
        if self._model is None:
            raise RuntimeError(
                "the teacher's body was released, as all training samples are in its cache: give Teacher keep_body=True"
                " where it is to be asked about other samples"
            )
        return self._model

    def output(self, samples: Sequence[EncodedSample]) -> LinearTeacher | TopKTeacher:
        """What a loss takes as its teacher at the supervised positions of the samples, in their order; the body runs
        only for new ones."""
        if isinstance(self.cache.entries, TopKEntries):
            return TopKTeacher(*self.top_k(samples))
        return self._linear(self.hidden(samples))

    @torch.no_grad()
    def live(self, samples: Sequence[EncodedSample]) -> LinearTeacher | TopKTeacher:
        """What `output` gives, but not rounded, computed anew and not written: for samples that will not come again, as
        a student's own answers. Raises RuntimeError once the body was released."""
        hidden = self._run(samples)
        if isinstance(self.cache.entries, TopKEntries):
            top = most_likely(self.lm_head, hidden, self.cache.entries.k, self.cache.entries.entries)
            return TopKTeacher(top.log_probs.to(self._device), top.indices.to(self._device))
        return self._linear(hidden.to(self._device, self._dtype))

    @torch.no_grad()
    def logits(self, samples: Sequence[EncodedSample]) -> Tensor:
        """[N, V_t] logits at the supervised positions of the samples, in their order."""
        return self.lm_head.logits(self.hidden(samples))

    @torch.no_grad()
    def hidden(self, samples: Sequence[EncodedSample]) -> Tensor:
        """[N, H] final hidden states at the supervised positions, the same bits whether just computed or read.

        Raises ValueError where the cache keeps top-k; `InputError` where it cannot be written, or a shard turns out to
        be damaged after the body was released.
        """
        return self._cached(samples, lambda: self.cache.read_hidden(samples, dtype=self._dtype, device=self._device))

    @torch.no_grad()
    def top_k(self, samples: Sequence[EncodedSample]) -> TopK:
        """[N, k] largest log-probabilities at the supervised positions and their tokens. Raises as `hidden` does."""
        return self._cached(samples, lambda: self.cache.read_top_k(samples, device=self._device))

    @torch.no_grad()
    def fill(self, samples: Sequence[EncodedSample]) -> None:
        """Computes what is missing in a pass of its own, and writes it; the ranks, all of which must call it, share the
        work."""
        self.cache.reserve(samples)
        missing = self.cache.missing(samples)
        first = ranks.from_first(lambda: {sample.fingerprint for sample in missing})
        missing = list({sample.fingerprint: sample for sample in samples if sample.fingerprint in first}.values())
        mine = [missing[i] for i in ranks.share([len(sample) for sample in missing])]
        with self.cache, shared_progress(len(missing), "cache", "samples") as done:
            for batch in token_budget_batches([len(sample) for sample in mine], max_tokens=FILL_TOKENS):
                self._compute([mine[i] for i in batch])
                done(len(batch) * ranks.world_size())  # the others are about as far
            self._exchange()

    def release_body_if_cached(self, samples: Sequence[EncodedSample]) -> bool:
        """Releases the body, in mode "topk" the lm_head too, once all of the samples are in the cache and on disk as
        they were computed. Returns whether the body is released. Every rank must call it; the body goes on all ranks
        or on none."""
        if self._model is None:
            return True
        self._exchange()
        if self._keep_body or not all(ranks.gather(self._on_disk(samples))):
            return False
        self._head = self.lm_head.detached() if isinstance(self.cache.entries, HiddenEntries) else None
        self._model = None
        return True

    def _on_disk(self, samples: Sequence[EncodedSample]) -> bool:
        """Whether no sample is missing, and the checksums of this rank's share of them hold."""
        if self.cache.missing(samples):
            return False
        self.cache.flush()
        return not self.cache.verify(samples[ranks.rank() :: ranks.world_size()])

    def _exchange(self) -> None:
        """Lets every rank read what each has computed."""
        if ranks.world_size() > 1:
            self.cache.flush()
            ranks.barrier()
            self.cache.refresh()

    def _linear(self, hidden: Tensor) -> LinearTeacher:
        head = self.lm_head
        return LinearTeacher(hidden, head.weight, head.bias, head.logit_scale, head.logit_softcap)

    def _cached(self, samples: Sequence[EncodedSample], read: Callable[[], Any]) -> Any:
        damage: MissingSamples | None = None
        while True:
            if missing := self.cache.missing(samples):
                if damage is not None and self._model is None:
                    raise InputError(
                        f"{damage} by the same command, run again: the teacher's body is no longer in memory"
                    ) from damage
                self._compute(missing)
            try:
                return read()
            except MissingSamples as error:  # the cache has forgotten the damaged shard: each turn has one less
                damage = error

    def _run(self, samples: Sequence[EncodedSample]) -> Tensor:
        """[N, H] final hidden states at the supervised positions, on the body's last device."""
        body = decoder_of(self.model)
        batch = pack(samples).to(self._input_device)
        return supervised_hidden(body, batch, packed=self._packed)

    def _compute(self, samples: Sequence[EncodedSample]) -> None:
        hidden = self._run(samples)
        entries = self.cache.entries
        if isinstance(entries, HiddenEntries):
            self.cache.put(samples, hidden)
        else:
            self.cache.put(samples, top := most_likely(self.lm_head, hidden, entries.k, entries.entries))
        if self._say is not None:
            loss = (
                rounding_loss(entries, lm_head(self._model), hidden[:CHUNK]).describe(entries.name)
                if isinstance(entries, HiddenEntries)
                else f"the {entries.k} most likely tokens hold {100 * top.log_probs.exp().sum(1).mean():.4g} % of the"
                " probability"
            )
            self._say(f"teacher cache: {loss} (first batch)")
            self._say = None


@dataclass(frozen=True)
class RoundingLoss:
    """What storing hidden states in fewer bits changes."""

    hidden: float  # norm of the difference / norm
    divergence: float  # mean KL of the distribution from the unrounded one, nats

    def describe(self, name: str) -> str:
        kl = f"{self.divergence:.1e} nats"
        return f"{name} changes hidden states by {self.hidden:.1e} of their norm and the distribution by {kl} (mean KL)"


@torch.no_grad()
def rounding_loss(entries: HiddenEntries, head: LmHead, hidden: Tensor) -> RoundingLoss:
    """The loss of storing hidden states [N, H] as these entries, seen through the lm_head."""
    hidden = hidden.to(head.weight.device)
    stored = entries.decode(entries.encode(hidden), hidden.dtype)
    difference = (stored.double() - hidden.double()).norm() / hidden.double().norm()
    total = 0.0
    for rows, rounded in zip(hidden.split(CHUNK // 4), stored.split(CHUNK // 4), strict=True):
        log_p, log_q = (torch.log_softmax(head.logits(x.to(head.weight.dtype)).double(), -1) for x in (rows, rounded))
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return RoundingLoss(float(difference), total / len(hidden))


@torch.no_grad()
def most_likely(head: LmHead, hidden: Tensor, k: int, entries: int | None = None) -> TopK:
    """The k most likely tokens after hidden states [N, H], without the logits of all N at once; with `entries` those of
    the vocabulary's first ones, as if there were no others."""
    parts = []
    for rows in hidden.split(CHUNK):
        logits = head.logits(rows.to(head.weight))[:, :entries].float()
        top = logits.topk(k)
        parts.append((top.values - logits.logsumexp(-1, keepdim=True), top.indices.to(torch.int32)))
    return TopK(torch.cat([values for values, _ in parts]), torch.cat([indices for _, indices in parts]))


def teacher_fingerprint(model: Any, precision: str = "") -> str:
    """Identifies a teacher's outputs: by its weights, the precision it runs in, and its configuration without names of
    folders and versions."""
    settings = json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(f"{weights_fingerprint(model)} {settings} {precision}".encode()).hexdigest()


def _lasting(settings: Any) -> Any:
    passing = ("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache")
    if not isinstance(settings, dict):
        return settings
    return {str(k): _lasting(v) for k, v in settings.items() if k not in passing and not str(k).startswith("_")}
