"""On-policy data: when a batch's responses are the student's own, and when earlier ones come again.

- "gkd": GKD (arXiv 2306.13649, algorithm 1; TRL's GKDTrainer): with probability `lmbda` a batch's responses are sampled
  from the student at temperature 1, from the batch's prompts; else they are the data's.
- "mixed": the mixed policy of DistiLLM's code (github.com/jongwooko/distillm, finetune.py): with probability
  `mixed_alpha` the student answers the batch's prompts, the answers go into the replay buffer, and as many are drawn
  from it to train on. (MiniLLM's teacher-mixed sampling, arXiv 2306.08543, is another method: it mixes the two models'
  distributions token by token.)
- "adaptive": DistiLLM (arXiv 2402.03898, section 3.2; the same file): a threshold φ, from 0, grows by 0.1 up to 1 when
  the dev loss is `loss_eps` or more above the loss at its last growth (at first: above the loss before training). With
  probability 1 − φ a batch is the data; with φ (1 − step / total steps) ("decreasing"), and with φ until the buffer is
  full, the student answers and the answers go into the buffer; else the batch is drawn from the buffer.

Where a batch is the student's its loss is the divergence alone, as in GKD and DistiLLM: a student's cross-entropy on
its own samples teaches nothing. The student answers the last question of a conversation, and is trained on that answer
alone. Knows samples and chances. Does not know models or losses: it is given a function that
generates.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np

from pocl_fast.answers.answerer import AnswerLimits, Generate, answered
from pocl_fast.data.encoded import EncodedSample
from pocl_fast.system import ranks
from pocl_fast.system.errors import InputError
from pocl_fast.training.micro_batches import MicroBatch

Source = Literal["data", "student", "replay"]
THRESHOLD_STEP = 0.1  # by what φ grows, as in DistiLLM's code


@dataclass(frozen=True)
class Policy:
    """The options of on-policy data; see the module. Raises `InputError` for values out of range."""

    rollouts: Literal["none", "gkd", "mixed", "adaptive"] = "none"
    lmbda: float = 0.5  # gkd: the probability of the student's own answers
    mixed_alpha: float = 0.5  # mixed: the same
    loss_eps: float = 0.1  # adaptive: nats the dev loss must have risen by
    replay_ratio: Literal["decreasing", "increasing", "constant"] = "decreasing"  # adaptive: of φ's fresh answers
    replay_capacity: int = 1000  # mixed and adaptive: samples

    def __post_init__(self) -> None:
        known = {"rollouts": ("none", "gkd", "mixed", "adaptive"), "replay_ratio": tuple(_SHARE)}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} {getattr(self, name)!r}: must be one of {', '.join(choices)}")
        for name in ("lmbda", "mixed_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} {getattr(self, name)}: a probability is within 0 and 1")
        if not self.loss_eps >= 0:
            raise InputError(f"loss_eps {self.loss_eps}: must not be negative")
        if self.replay_capacity < 1:
            raise InputError(f"replay_capacity {self.replay_capacity}: must be at least 1 sample")

    @classmethod
    def of(cls, options: object) -> Policy:
        """The policy in options that have these fields."""
        return cls(**{one.name: getattr(options, one.name) for one in fields(cls)})


# of the batches that φ gives to the student's answers, the share of fresh ones by how much of the training is done
_SHARE = {"decreasing": lambda done: 1 - done, "increasing": lambda done: done, "constant": lambda done: 0.5}


class Batch(NamedTuple):
    """What a step trains on, one sample for each it was given, and where the responses are from."""

    samples: list[EncodedSample]
    source: Source


class Rollouts:
    """Decides step by step what is trained on, and keeps what the student has answered.

    All of it follows from the seed, the step, the samples and what the student answers: a resumed run with the state of
    its checkpoint goes on as if it had not stopped. The ranks of a run decide alike and share one replay buffer.
    """

    def __init__(
        self, policy: Policy, generate: Generate, limits: AnswerLimits, *, total_steps: int, seed: int = 0
    ) -> None:
        self.policy, self.limits = policy, limits
        self._generate, self._total_steps, self._seed = generate, total_steps, seed
        self.threshold = 0.0  # φ
        self._accepted_loss: float | None = None
        self._buffer: deque[EncodedSample] = deque(maxlen=policy.replay_capacity)
        self.generated = self.replayed = 0  # samples, of all ranks
        self.seconds = 0.0  # this rank has generated
        self._logged = (0.0, time.perf_counter())  # seconds generated at the last `logs`, and when that was

    @property
    def wants_first_loss(self) -> bool:
        """Whether `dev_loss` is to be told the loss before training."""
        return self.policy.rollouts == "adaptive"

    def micro_batches(self, batches: Sequence[MicroBatch], step: int) -> list[MicroBatch]:
        """The micro-batches of a step as they are trained on; every rank must call, once a step."""
        made = self.batch([sample for batch in batches for sample in batch.samples], step)
        if made.source == "data":
            return list(batches)
        given = iter(made.samples)
        return [batch.with_samples([next(given) for _ in batch.samples], live=True) for batch in batches]

    def batch(self, samples: Sequence[EncodedSample], step: int) -> Batch:
        """What step `step` (from 0) trains on in place of its samples; to be called once a step, by every rank with its
        own samples of it, and with all of them where it accumulates several micro-batches.

        A sample from the replay buffer may be an answer to another prompt than the one in its place.
        """
        source = self._decide(step)
        if source == "data":
            return Batch(list(samples), "data")
        made = list(samples)
        if source == "student":
            made = self._answer(samples, step)
            self._keep(made)
            if self.policy.rollouts != "mixed":
                return Batch(made, "student")
        return Batch(self._replay(made, step), "replay")

    def dev_loss(self, value: float) -> None:
        """To be told the mean dev loss in nats: once before training, and after each evaluation. Raises ValueError
        where it is not finite."""
        if not math.isfinite(value):
            raise ValueError(f"a dev loss of {value}")
        if self._accepted_loss is None:
            self._accepted_loss = value
        elif self.policy.rollouts == "adaptive" and value >= self._accepted_loss + self.policy.loss_eps:
            self.threshold = min(1.0, round(self.threshold + THRESHOLD_STEP, 9))
            self._accepted_loss = value

    def logs(self) -> dict[str, float]:
        """What happened since the last call: the share of the time spent generating, and the counts."""
        before, since = self._logged
        self._logged = (self.seconds, time.perf_counter())
        share = (self.seconds - before) / max(self._logged[1] - since, 1e-9)
        logs = {"generation_share": share, "generated": float(self.generated)}
        if self.policy.rollouts == "adaptive":
            logs["rollout_threshold"] = self.threshold
        return logs

    def state_dict(self) -> dict[str, Any]:
        """All that changes, for JSON."""
        return {
            "threshold": self.threshold,
            "accepted_loss": self._accepted_loss,
            "generated": self.generated,
            "replayed": self.replayed,
            "seconds": self.seconds,
            "buffer": [_record(sample) for sample in self._buffer],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. A buffer larger than the capacity keeps its newest."""
        self.threshold, self._accepted_loss = float(state["threshold"]), state["accepted_loss"]
        self.generated, self.replayed = int(state["generated"]), int(state["replayed"])
        self.seconds = float(state["seconds"])
        self._logged = (self.seconds, time.perf_counter())
        self._buffer = deque(map(_sample, state["buffer"]), maxlen=self.policy.replay_capacity)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _decide(self, step: int) -> Source:
        policy = self.policy
        if policy.rollouts == "none":
            return "data"
        chance = _random(self._seed, step, "source").random()
        if policy.rollouts == "gkd":
            return "student" if chance < policy.lmbda else "data"
        if policy.rollouts == "mixed":
            return "student" if chance < policy.mixed_alpha else "data"
        if chance >= self.threshold:
            return "data"
        fresh = self.threshold * _SHARE[policy.replay_ratio](min(1.0, step / max(1, self._total_steps)))
        return "student" if chance < fresh or len(self._buffer) < policy.replay_capacity else "replay"

    def _answer(self, samples: Sequence[EncodedSample], step: int) -> list[EncodedSample]:
        start = time.perf_counter()  # without samples too: what generates may need every rank's weights
        seed = _key(self._seed, step, "answers")
        answers = self._generate([s.prompt_ids for s in samples], [s.index for s in samples], seed)
        self.seconds += time.perf_counter() - start
        return [answered(sample, answer, self.limits) for sample, answer in zip(samples, answers, strict=True)]

    def _keep(self, made: list[EncodedSample]) -> None:
        """Counts what all ranks made; into the buffer with it where one is used, in an order that no number of ranks
        changes."""
        if self.policy.rollouts == "gkd":
            self.generated += sum(ranks.gather(len(made)))
            return
        everyone = sorted((sample for part in ranks.gather(made) for sample in part), key=lambda sample: sample.index)
        self.generated += len(everyone)
        self._buffer.extend(everyone)

    def _replay(self, places: list[EncodedSample], step: int) -> list[EncodedSample]:
        """A sample of the buffer for each place: none twice in the batch of all ranks while there are enough."""
        parts = ranks.gather([sample.index for sample in places])
        ordered = sorted((index, rank, i) for rank, part in enumerate(parts) for i, index in enumerate(part))
        drawn = _random(self._seed, step, "replay").permutation(len(self._buffer)).tolist()
        chosen = {(rank, i): drawn[k % len(drawn)] for k, (_, rank, i) in enumerate(ordered)}
        self.replayed += len(ordered)
        return [self._buffer[chosen[ranks.rank(), i]] for i in range(len(places))]


def _key(seed: int, step: int, purpose: str) -> int:
    """63 bits for a counter-based generator."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {purpose}".encode(), digest_size=8).digest(), "little") >> 1


def _random(seed: int, step: int, purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=_key(seed, step, purpose)))


def _record(sample: EncodedSample) -> dict[str, Any]:
    """For JSON; tokens as one string, a list of numbers would be a line each in an indented file."""
    names = {"prompt": sample.prompt_ids, "response": sample.response_ids, "supervised": chain(*sample.supervised)}
    texts = {name: " ".join(map(str, numbers)) for name, numbers in names.items()}
    return {"index": sample.index, "truncated": sample.truncated, **texts}


def _sample(record: Mapping[str, Any]) -> EncodedSample:
    names = ("prompt", "response", "supervised")
    prompt, response, borders = (tuple(map(int, record[name].split())) for name in names)
    spans = tuple(zip(borders[::2], borders[1::2], strict=True))
    return EncodedSample(record["index"], prompt, response, record["truncated"], spans)
