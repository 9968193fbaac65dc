"""lm_heads that are cut along the vocabulary over the ranks of a process group, and a loss over logits cut with them.

Each rank has every token and its own part of each token's logits, and sees no other's. Of a token the ranks tell each
other what their parts sum up to; the chain rule makes the whole of it, KL(p‖q) = Σ P_r KL(p_r‖q_r) + KL(P‖Q) with the
parts' masses P_r and Q_r, in which nothing is a difference of large sums. Entries whose terms would be infinite leave
the KL's first side, and with K, its mass without them, Σ p log(p/q) over the others is K (KL(p/K‖q) + log K). Knows
nothing of hidden states and autograd.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # by name: an operator takes no group

from pocl_fast.loss.arguments import Settings, Tokens
from pocl_fast.loss.reference import Rows, transformed

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min
FAR = 2.0**125  # |log p/q| of an entry that one side alone has, four times that of any two finite logits
MATRICES = 13  # fp32 [n, V / ranks] that a chunk needs at a time, both sides' logits among them
BUDGET = {"cpu": 128 << 20, "cuda": 1 << 30}  # bytes of them
CHUNKS = (32, 4096)


@dataclass(frozen=True)
class VocabularyShards:
    """Which rows of the lm_heads each rank of a process group has: contiguous ones, in the order of the ranks.

    Each rank makes it by `of`, once, and gives it to every `linear_distillation_loss`, with its own rows of the
    weights (of a DTensor its local part is taken), its own entries of biases and of a `DenseTeacher`'s logits, and the
    whole of everything else: hidden states, labels (ids of the whole vocabulary) and options are the same on each rank.

    Every rank calls the loss, and of a loss a token (reduction "none") every rank calls backward. The results and the
    hidden states' gradient are the same on every rank; the gradients of weight and bias are each rank's own. A chunk's
    logits go through torch, not a kernel, which needs thirteen matrices of the chunk's part in memory.
    """

    group: dist.ProcessGroup = field(repr=False)
    student: tuple[int, ...]  # rows of each rank
    teacher: tuple[int, ...]  # the same; empty without a teacher

    @classmethod
    def of(
        cls, group: dist.ProcessGroup, student_weight: Tensor, teacher_weight: Tensor | None = None
    ) -> VocabularyShards:
        """Asks the ranks of the group for the rows of their parts: student [V / ranks, H], teacher [V_t / ranks, H_t].

        Of a teacher that is given by its logits: any tensor of as many rows as its part has entries. Raises ValueError,
        on every rank, where a part is empty or where the teacher is not cut at the token ids at which the student is.
        """
        rows = [len(student_weight), 0 if teacher_weight is None else len(teacher_weight)]
        gathered = torch.stack(_all_gather(torch.tensor(rows, device=student_weight.device), group)).tolist()
        student, teacher = (tuple(part) for part in zip(*gathered, strict=True))
        if not any(teacher):
            teacher = ()
        if min(student + teacher) < 1:
            raise ValueError(f"each rank needs a row of each lm_head; student's {student}, teacher's {teacher}")
        shared = min(sum(student), sum(teacher))
        if teacher and [min(x, shared) for x in _ends(student)] != [min(x, shared) for x in _ends(teacher)]:
            raise ValueError(
                f"the lm_heads must be cut at the same token ids; rows of the student's parts {student}, of the"
                f" teacher's {teacher}"
            )
        return cls(group, student, teacher)

    def check(self, student_rows: int, teacher_entries: int | None) -> None:
        """Raises ValueError where this rank's parts are others than `of` was given."""
        rank = dist.get_rank(self.group)
        if student_rows != self.student[rank]:
            raise ValueError(f"student_weight has {student_rows} rows, and vocabulary_shards {self.student[rank]}")
        if teacher_entries is not None and not self.teacher:
            raise ValueError("vocabulary_shards was made without a teacher; give VocabularyShards.of its weight too")
        if teacher_entries is not None and teacher_entries != self.teacher[rank]:
            raise ValueError(
                f"the teacher's part has {teacher_entries} entries, and vocabulary_shards {self.teacher[rank]}"
            )


def _ends(rows: tuple[int, ...]) -> list[int]:
    return [sum(rows[: rank + 1]) for rank in range(len(rows))]


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts


class VocabularyShard:
    """This rank's part of the student's vocabulary, and the loss over its logits."""

    def __init__(self, group_name: str, rows: list[int]) -> None:
        self.group = _resolve_process_group(group_name)  # type: ignore[arg-type]
        self.rows, self.V = rows, sum(rows)
        self.start = sum(rows[: dist.get_rank(self.group)])

    def chunk(self, device: torch.device) -> int:
        """Tokens whose logits are in memory at a time; the same on every rank, so that it cannot ask what is free."""
        budget = BUDGET.get(device.type, BUDGET["cuda"])
        return max(CHUNKS[0], min(CHUNKS[1], budget // (4 * MATRICES * max(self.rows)) // 32 * 32))

    def add_up_(self, x: Tensor) -> None:
        """x += the other ranks' x."""
        dist.all_reduce(x, group=self.group)

    def distillation_rows(
        self,
        student: Tensor,  # [n, V / ranks] fp32
        teacher: Tensor,  # [n, V_t / ranks], any dtype
        tokens: Tokens,  # labels are ids of the whole vocabulary
        settings: Settings,
        *,
        needs_grad: bool,
        reduced: bool,
        grad: Tensor | None,  # [n, V / ranks], where the gradient goes if it is wanted; may be `student` itself
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss and stats [7, n] fp32 of the whole vocabulary, and `grad`: a backend's `distillation_rows`, in torch.

        Tells the other ranks 12 numbers a token; for a mixture or total variation then 2 more.
        """
        tau = tokens.temperature.double().reshape(-1)
        label = self._label(tokens.labels, settings.ignore_index, student.shape[1])
        s = transformed(student, *settings.transforms[:2])
        pair = _Pair(s, transformed(teacher.float(), *settings.transforms[2:]), tau, settings.divergence)
        label_logit = torch.where(label.mine, s.gather(1, label.column)[:, 0], 0.0)
        part = _Part(_log_sum(s), s.amax(-1), label_logit, *pair.sums(settings.divergence))
        own = torch.stack([x.double() for x in part])
        whole = _whole(_Part(*torch.stack(_all_gather(own, self.group), 1)), settings.divergence)
        pair.normalise(whole)
        D, slope = self._divergence(settings, pair, whole)
        if needs_grad and grad is not None:
            grad.copy_(_gradient(s, slope, label, whole, tokens, settings))
        stats = _stats(D, label.counted, whole, tokens, settings)
        loss = torch.where(label.counted, stats[0] * tokens.row_scale, 0.0)
        return loss.sum() if reduced else loss, stats, grad

    def _label(self, labels: Tensor, ignore_index: int, columns: int) -> _Label:
        counted, column = labels != ignore_index, labels.long() - self.start
        mine = counted & (column >= 0) & (column < columns)
        return _Label(counted, mine, torch.where(mine, column, 0)[:, None])

    def _divergence(self, settings: Settings, pair: _Pair, whole: _Part) -> tuple[Tensor, Tensor]:
        """D of the whole vocabulary [n], and τ ∂D/∂s of this part [n, S]."""
        broken = (whole.log_sum_q + whole.log_sum_p).isnan()  # by a NaN or +inf, which shall show
        if settings.divergence in ("forward_kl", "reverse_kl"):
            D, slope = _kl(settings.divergence, pair, whole)
        else:
            D, u = _mixture(settings.divergence, settings.teacher_share, pair)
            D, mean = sums = torch.stack([D.double(), (pair.q * u).sum(-1).double()])
            self.add_up_(sums)
            nothing = (whole.log_sum_q == -INF) | (whole.log_sum_p == -INF)  # to compare: a side of −inf alone
            D, slope = D.masked_fill(nothing, 0.0), u.sub_(_column(mean)).mul_(pair.q)
            slope.masked_fill_(nothing[:, None], 0.0)
        return D.masked_fill(broken, torch.nan), slope


class _Label(NamedTuple):
    """Where the labels of n tokens lie in this rank's part."""

    counted: Tensor  # [n]: whether it is not ignored
    mine: Tensor  # [n]: whether it is in this part
    column: Tensor  # [n, 1]: where; 0 if elsewhere


class _Part(NamedTuple):
    """What one rank tells of its part, [n] each; of all ranks [ranks, n]; of the whole [n]. fp64."""

    log_sum: Tensor  # of the student's exponentials, at temperature 1, over its own vocabulary
    largest: Tensor  # of the same logits
    label: Tensor  # the label's logit; 0 where it is in another part
    log_sum_q: Tensor  # over the shared vocabulary, at temperature τ
    log_sum_p: Tensor
    entropy_q: Tensor
    entropy_p: Tensor
    divergence: Tensor  # of a KL, over the part, of the first side without what is left out
    log_kept: Tensor  # the mass of that side, of all it has in the part, without what is left out
    largest_q: Tensor
    largest_p: Tensor
    agree: Tensor  # 1 where some entry has both largest logits


def _whole(parts: _Part, divergence: str) -> _Part:
    """What the parts [ranks, n] make together, [n]."""
    log_sum_q, log_sum_p = parts.log_sum_q.logsumexp(0), parts.log_sum_p.logsumexp(0)
    log_Q, log_P = parts.log_sum_q - _finite(log_sum_q), parts.log_sum_p - _finite(log_sum_p)
    Q, P = log_Q.exp(), log_P.exp()
    log_first, log_second = (log_Q, log_P) if divergence == "reverse_kl" else (log_P, log_Q)
    log_kept = (log_first + parts.log_kept).logsumexp(0)
    log_first = log_first + parts.log_kept - _finite(log_kept)
    D = torch.where(log_first == -INF, 0.0, log_first.exp() * (parts.divergence + log_first - log_second)).sum(0)
    largest_q, largest_p = parts.largest_q.amax(0), parts.largest_p.amax(0)
    has_both = (parts.largest_q == largest_q) & (parts.largest_p == largest_p) & (parts.agree == 1)
    return _Part(
        log_sum=parts.log_sum.logsumexp(0),
        largest=parts.largest.amax(0),
        label=parts.label.sum(0),
        log_sum_q=log_sum_q,
        log_sum_p=log_sum_p,
        entropy_q=(Q * parts.entropy_q + torch.special.entr(Q)).sum(0),
        entropy_p=(P * parts.entropy_p + torch.special.entr(P)).sum(0),
        divergence=D,
        log_kept=log_kept,
        largest_q=largest_q,
        largest_p=largest_p,
        agree=has_both.any(0).double(),
    )


class _Pair:
    """q and p [n, S] over the entries that this rank has of the shared vocabulary, and log p/q: of the part alone,
    until `normalise` makes them parts of the whole. A logit of −inf is a probability of 0; where one side alone has
    it, log p/q is ±FAR, where both have it 0. Of a KL the first side is 0 too where its term is left out."""

    def __init__(self, s: Tensor, t: Tensor, tau: Tensor, divergence: str) -> None:
        S = min(s.shape[1], t.shape[1])
        s, t, tau = s[:, :S], t[:, :S], _column(tau)
        no_q, no_p = s == -INF, t == -INF
        self.largest_q, self.largest_p = s.amax(-1), t.amax(-1)
        both_largest = (s == self.largest_q[:, None]) & (t == self.largest_p[:, None])
        self.agree = (both_largest & ~no_q & ~no_p).any(-1)
        # masks of the lowest number may overflow, and 0 · ∞ is NaN
        self.log_ratio = ((t - s) / tau).clamp_(-FAR / 4, FAR / 4)
        self.log_ratio.masked_fill_(no_q, FAR).masked_fill_(no_p, -FAR).masked_fill_(no_q & no_p, 0.0)
        self.q, self.p = (x.div(tau).clamp_(min=LOWEST).masked_fill_(no, -INF) for x, no in ((s, no_q), (t, no_p)))
        self.log_sum_q, self.log_sum_p = _softmax_(self.q), _softmax_(self.p)
        self.log_ratio -= _column(_finite(self.log_sum_p) - _finite(self.log_sum_q))
        self.entropy_q, self.entropy_p = (torch.special.entr(x).sum(-1) for x in (self.q, self.p))
        self.left_out: Tensor | None = None  # entries of q whose terms of reverse KL are left out
        self.log_kept = torch.zeros_like(self.log_sum_q)
        disjoint = (no_q | no_p).all(-1)
        if divergence == "forward_kl":
            self.log_kept, _ = _leave_out(self.p, no_q, disjoint)
            self.log_ratio -= _column(_finite(self.log_kept))
        elif divergence == "reverse_kl":
            self.log_kept, self.left_out = _leave_out(self.q, no_p, disjoint)
            self.log_ratio += _column(_finite(self.log_kept))

    def sums(self, divergence: str) -> tuple[Tensor, ...]:
        """The last nine of `_Part`, of this part."""
        if divergence == "forward_kl":  # terms of which none is negative; the differences' own sum is 0
            D = (self.p * self.log_ratio).add_(self.difference()).sum(-1)
        elif divergence == "reverse_kl":
            D = (self.q * self.log_ratio).add_(self.difference()).sum(-1).neg_()
        else:
            D = torch.zeros_like(self.largest_q)
        of_kl = D, self.log_kept
        largest = self.largest_q, self.largest_p
        return self.log_sum_q, self.log_sum_p, self.entropy_q, self.entropy_p, *of_kl, *largest, self.agree.double()

    def normalise(self, whole: _Part) -> None:
        """Makes q and p, without what is left out, sum to 1 over all parts."""
        shift_q, shift_p = self.log_sum_q - _finite(whole.log_sum_q), self.log_sum_p - _finite(whole.log_sum_p)
        of_kept = self.log_kept - _finite(whole.log_kept)
        if self.left_out is not None:
            self.left_out *= _column(shift_q.exp())
            shift_q = shift_q + of_kept
        else:
            shift_p = shift_p + of_kept
        self.q *= _column(shift_q.exp())
        self.p *= _column(shift_p.exp())
        self.log_ratio += _column(_finite(shift_p) - _finite(shift_q))

    def difference(self) -> Tensor:
        """q − p, exact where they are close."""
        shrunk = self.log_ratio.abs().neg_().expm1_()
        return shrunk.mul_(torch.where(self.log_ratio >= 0, self.p, -self.q))


def _leave_out(first: Tensor, out: Tensor, disjoint: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the entries `out` from a KL's first side, whose others then sum to 1. What the logarithm of these others'
    sum was, [n] fp64; and what was taken, [n, S]."""
    left_out = first.masked_fill(~out, 0.0)
    first.masked_fill_(out, 0.0)
    less, kept = left_out.sum(-1).double(), first.sum(-1).double()
    log_kept = torch.where(less < 0.5, torch.log1p(-less), kept.log())  # with all digits of the one that is small
    log_kept.masked_fill_(disjoint, -INF)
    first.div_(_column(_finite(log_kept).exp()))
    return log_kept, left_out


def _kl(divergence: str, pair: _Pair, whole: _Part) -> tuple[Tensor, Tensor]:
    """D [n], and τ ∂D/∂s of this part [n, S], of a KL whose first side was normalised without what is left out."""
    nothing, K = whole.log_kept == -INF, whole.log_kept.exp()
    E = (whole.divergence + whole.log_kept).masked_fill(nothing, 0.0)
    if divergence == "forward_kl":
        return K * E, pair.difference().mul_(_column(K))
    # over q: log q/p + 1 where the term is kept, and 0 where it is left out, less their mean
    slope = pair.log_ratio.add_(_column(whole.divergence + (E + 1) * torch.expm1(whole.log_kept))).neg_().mul_(pair.q)
    assert pair.left_out is not None
    return K * E, slope.mul_(_column(K)).sub_(pair.left_out.mul_(_column(K * (E + 1))))


def _mixture(divergence: str, share: float, pair: _Pair) -> tuple[Tensor, Tensor]:
    """This part of D [n], and u = ∂D/∂q [n, S] up to a constant, for m = share · p + (1 - share) · q."""
    if divergence == "tvd":
        difference = pair.difference()
        u = difference.sign().mul_(0.5).add_(difference, alpha=0.0)  # the sign of a NaN is 0
        return 0.5 * difference.abs_().sum(-1), u
    # m is the larger of p and q times 1 + (the other's share) · (e^−|log p − log q| − 1)
    log_larger = pair.log_ratio.abs().neg_().expm1_()
    log_larger = log_larger.mul_(torch.where(pair.log_ratio >= 0, 1 - share, share)).log1p_()
    log_p_m = pair.log_ratio.clamp_max(0.0).sub_(log_larger)  # log p/m
    log_q_m = log_larger.add_(pair.log_ratio.clamp_min(0.0)).neg_()
    # to Σ p log(p/m) the terms m − p are added, whose sum is 0: no term is negative then. In jsd they cancel
    if divergence == "skew_forward_kl":
        D = (pair.p * log_p_m).add_(pair.difference(), alpha=1 - share).sum(-1)
        return D, log_p_m.expm1_().mul_(share - 1)
    if divergence == "skew_reverse_kl":
        D = (pair.q * log_q_m).sub_(pair.difference(), alpha=share).sum(-1)
        return D, log_q_m.sub_(log_q_m.expm1().mul_(1 - share))
    if divergence == "jsd":
        D = log_p_m.mul_(pair.p).mul_(share).add_(pair.q * log_q_m, alpha=1 - share).sum(-1)
        return D, log_q_m.mul_(1 - share)
    raise ValueError(f"unknown divergence {divergence!r}")


def _gradient(s: Tensor, slope: Tensor, label: _Label, whole: _Part, tokens: Tokens, settings: Settings) -> Tensor:
    """The gradient of the scaled losses by this part's logits, [n, V / ranks] fp32. Overwrites `slope`."""
    tau, a = tokens.temperature.double().reshape(-1), tokens.alpha.double().reshape(-1)
    scale = torch.where(label.counted, tokens.row_scale.double(), 0.0)
    of_ce = torch.where(label.mine & (whole.largest != -INF), -a * scale, 0.0)
    out = (s - _column(_finite(whole.log_sum))).exp_().mul_(_column(a * scale))
    out.scatter_add_(1, label.column, _column(of_ce))
    out[:, : slope.shape[1]] += slope.mul_(_column((1 - a) * tau ** (settings.temperature_power - 1) * scale))
    _through_transform_(out, s, *settings.transforms[:2])
    return out.masked_fill_(~label.counted[:, None], 0.0)


def _stats(D: Tensor, counted: Tensor, whole: _Part, tokens: Tokens, settings: Settings) -> Tensor:
    """`reference.Rows` of n tokens, [7, n] fp32."""
    tau, a = tokens.temperature.double().reshape(-1), tokens.alpha.double().reshape(-1)
    empty = whole.largest == -INF  # no softmax: CE is infinite and nothing can lower it
    ce = torch.where(empty, INF, whole.log_sum - whole.label)
    weighted_ce = torch.where((a == 0) & ~ce.isnan(), 0.0, a * ce)
    rows = Rows(
        loss=weighted_ce + (1 - a) * tau**settings.temperature_power * D,
        ce=ce,
        divergence=D,
        student_entropy=whole.entropy_q,
        teacher_entropy=whole.entropy_p,
        accuracy=~empty & (whole.label >= whole.largest),
        agreement=whole.agree,
    )
    return torch.stack([torch.where(counted, row.double(), 0.0).float() for row in rows])


def _through_transform_(grad: Tensor, transformed_logits: Tensor, scale: float, softcap: float) -> None:
    """grad, by the transformed logits, becomes that by the logits."""
    if softcap:
        slope = (transformed_logits / softcap).square_().neg_().add_(1.0)
        grad *= slope.masked_fill_(transformed_logits.isinf(), 1.0)
    if scale != 1.0:
        grad *= scale


def _log_sum(x: Tensor) -> Tensor:
    """log Σ exp(x) of each row, fp64."""
    return _softmax_(x.clone())


def _softmax_(x: Tensor) -> Tensor:
    """Makes a softmax of each row of x [n, S], 0 where all of it is −inf, and returns log Σ exp(x), [n] fp64."""
    largest = _finite(x.amax(-1))
    total = x.sub_(largest[:, None]).exp_().sum(-1)
    x.div_(torch.where(total == 0, 1.0, total)[:, None])
    return largest.double() + total.double().log()


def _column(x: Tensor) -> Tensor:
    """[n] as [n, 1] fp32, to multiply a matrix by."""
    return x.float()[:, None]


def _finite(log_sum: Tensor) -> Tensor:
    """0 for −inf, the logarithm of a sum of nothing: what is subtracted from −inf then leaves −inf."""
    return torch.where(log_sum == -INF, 0.0, log_sum)
