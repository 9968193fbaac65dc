"""Every objective in plain, obvious torch: the specification that the kernels are tested against.

A −inf logit is probability 0, on its own side alone: each side is normalised over all of its entries, and 0 · log 0 is
0. Only a term that would be infinite, p · log(p / 0) or q · log(q / 0), is left out of D's sum. A side of −inf alone is
no distribution, and D is 0. A finite mask, however low, is a number and costs its size. NaN or +inf on either side
makes D NaN, whatever the other side is there. A label whose logit is −inf has infinite CE. Differentiable by autograd,
in any floating-point dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pocl_fast.loss.arguments import Settings, Tokens

# of a teacher's rest, below which it is the rounding of fp32 log-probabilities; they miss 1 by 4 · 2^-23 at most. Where
# none of a list is −inf the rest is real, and even so small a one has a weight at a temperature above 1.
LEAST_MASS, LEAST_OF_FILTERED = 2.0**-23, 2.0**-20


class Rows(NamedTuple):
    """What a loss knows of each token; all [N], and 0 where the label is ignored."""

    loss: Tensor  # alpha · CE + (1 - alpha) · τ^power · D
    ce: Tensor  # cross-entropy of the label at temperature 1, over the student's own vocabulary; nats
    divergence: Tensor  # D over the shared vocabulary, without τ^power; nats
    student_entropy: Tensor  # of q, at temperature τ; nats
    teacher_entropy: Tensor  # of p
    accuracy: Tensor  # 1 where no logit of the student is above the label's
    agreement: Tensor  # 1 where some entry of D's vocabulary has the largest logit of both student and teacher


def distillation_rows(
    student_logits: Tensor,  # [N, V_s]
    teacher_logits: Tensor,  # [N, V_t]
    tokens: Tokens,
    settings: Settings,
) -> Rows:
    """The loss and the metrics of each token, not multiplied by its `row_scale`."""
    labels, temperature, alpha, _ = tokens
    counted = labels != settings.ignore_index
    V = min(student_logits.shape[1], teacher_logits.shape[1])
    s, t = student_logits, teacher_logits.to(student_logits.dtype)
    # ignored rows may hold anything, NaN included: replace them before any arithmetic
    s = torch.where(counted[:, None], s, torch.zeros_like(s))
    t = torch.where(counted[:, None], t, torch.zeros_like(t))
    s, t = transformed(s, *settings.transforms[:2]), transformed(t, *settings.transforms[2:])
    label = torch.where(counted, labels, torch.zeros_like(labels)).long()
    ce, correct = _cross_entropy(s, label)

    tau = temperature.to(s.dtype).reshape(-1, 1)
    s_shared, t_shared = s[:, :V], t[:, :V]
    P, Q = _distribution(_over(t_shared, tau)), _distribution(_over(s_shared, tau))
    D = _divergence(settings.divergence, P, Q, settings.teacher_share)

    loss = _total(ce, D, tau[:, 0], alpha, settings.temperature_power)
    both_largest = (s_shared == s_shared.amax(-1, keepdim=True)) & (t_shared == t_shared.amax(-1, keepdim=True))
    metrics = (
        Q.entropy(),
        P.entropy(),
        correct,
        (~Q.zero & ~P.zero & both_largest).any(-1).to(s.dtype),
    )
    return Rows(*(torch.where(counted, value, torch.zeros_like(value)) for value in (loss, ce, D, *metrics)))


def sparse_distillation_rows(
    student_logits: Tensor,  # [N, V]
    log_probs: Tensor,  # [N, K]: the teacher's, at temperature 1, of K entries; −inf where there are fewer
    indices: Tensor,  # [N, K]: which entries, distinct; where log_probs is −inf, anything
    tokens: Tokens,
    settings: Settings,
) -> Rows:
    """The loss and the metrics of each token where K entries of the teacher are known.

    tail "renormalise": D over those entries alone. "bucket": D over them and the rest as one more outcome, in which the
    teacher's remaining mass is spread evenly over the entries that are not listed; below
    `LEAST_MASS` it is 0, below `LEAST_OF_FILTERED` where an entry is absent.
    `student_entropy` and the student's largest logit are those of its whole vocabulary; `agreement` asks for an entry
    of D that also is the teacher's largest.
    """
    labels, temperature, alpha, _ = tokens
    counted = labels != settings.ignore_index
    s = torch.where(counted[:, None], student_logits, torch.zeros_like(student_logits))
    t = torch.where(counted[:, None], log_probs.to(s.dtype), torch.zeros_like(log_probs, dtype=s.dtype))
    s = transformed(s, *settings.transforms[:2])
    tau = temperature.to(s.dtype).reshape(-1, 1)
    absent = t == -torch.inf
    entries = torch.where(absent | ~counted[:, None], torch.zeros_like(indices), indices).long()
    s_listed = torch.where(absent, -torch.inf, s.gather(1, entries))
    x, y = _over(s_listed, tau), _over(t, tau)
    if settings.tail == "bucket":
        x_rest, y_rest = _rest(s, t, entries, absent, tau)
        x, y = torch.cat([x, x_rest], 1), torch.cat([y, y_rest], 1)
    elif settings.tail != "renormalise":
        raise ValueError(f"unknown tail {settings.tail!r}")
    P, Q = _distribution(y), _distribution(x)
    D = _divergence(settings.divergence, P, Q, settings.teacher_share)

    label = torch.where(counted, labels, torch.zeros_like(labels)).long()
    ce, correct = _cross_entropy(s, label)
    largest = (t == t.amax(-1, keepdim=True)) & (s_listed == s.amax(-1, keepdim=True))
    both_largest = ~absent & (s_listed != -torch.inf) & largest
    metrics = (_distribution(_over(s, tau)).entropy(), P.entropy(), correct, both_largest.any(-1).to(s.dtype))
    loss = _total(ce, D, tau[:, 0], alpha, settings.temperature_power)
    return Rows(*(torch.where(counted, value, torch.zeros_like(value)) for value in (loss, ce, D, *metrics)))


def _rest(s: Tensor, t: Tensor, entries: Tensor, absent: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """The logits at temperature τ of "some entry that is not listed", student and teacher, [N, 1] each."""
    listed = torch.zeros_like(s).scatter_add(1, entries, (~absent).to(s.dtype)) > 0
    others = (~listed).sum(-1, keepdim=True).clamp_min(1).to(s.dtype)
    nothing = (listed | (s == -torch.inf)).all(-1, keepdim=True)
    x = torch.where(listed, -torch.inf, _over(s, tau))
    x = torch.where(
        nothing, -torch.inf, torch.logsumexp(torch.where(nothing, torch.zeros_like(x), x), -1, keepdim=True)
    )
    mass = 1 - t.exp().sum(-1, keepdim=True)
    least = torch.where(absent.any(-1, keepdim=True), LEAST_OF_FILTERED, LEAST_MASS)
    none = (mass < least) | listed.all(-1, keepdim=True)
    y = torch.where(none, -torch.inf, (torch.where(none, 1.0, mass) / others).log() / tau + others.log())
    return x, y


def rows_of(
    student_logits: Tensor,  # [N, V_s]
    teacher: Tensor,  # [N, V_t] logits, or [N, K] log-probabilities
    indices: Tensor | None,  # [N, K]: of which entries those are
    tokens: Tokens,
    settings: Settings,
) -> Rows:
    """`sparse_distillation_rows` where there are indices, else `distillation_rows`."""
    if indices is None:
        return distillation_rows(student_logits, teacher, tokens, settings)
    return sparse_distillation_rows(student_logits, teacher, indices, tokens, settings)


def linear_distillation_rows(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    teacher: list[Tensor],  # dense: logits; linear: hidden, weight, maybe bias; topk: log_probs, indices; none: nothing
    teacher_kind: str,
    tokens: Tokens,
    settings: Settings,
) -> Rows:
    """`rows_of` lm_heads applied to hidden states; with no teacher, of CE alone."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)  # logits are not rounded
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if teacher_kind == "topk":
        return rows_of(logits, teacher[0], teacher[1], tokens, settings)
    if teacher_kind == "none":
        teacher_logits = logits.detach()
    elif teacher_kind == "linear":
        teacher_logits = torch.nn.functional.linear(*(x.to(dtype) for x in teacher))
    else:
        (teacher_logits,) = teacher
    return rows_of(logits, teacher_logits, None, tokens, settings)


def transformed(x: Tensor, scale: float, softcap: float) -> Tensor:
    """softcap · tanh(scale · x / softcap), or scale · x where softcap is 0: a model's own logits from its lm_head's.
    Infinities, which are masks or errors, stay what they are."""
    if scale == 1.0 and not softcap:
        return x
    scaled = _finite(x * scale)
    return torch.where(x.isinf(), x, softcap * torch.tanh(scaled / softcap) if softcap else scaled)


def _over(x: Tensor, tau: Tensor) -> Tensor:
    """Logits at temperature τ; only those that are −inf become −inf."""
    return torch.where(x.isinf(), x, _finite(x / tau))


def _finite(x: Tensor) -> Tensor:
    """What masks of the lowest number become, so that no product with τ² or with a difference of two overflows."""
    return x.clamp_min(torch.finfo(x.dtype).min / 1024)


def mixture(log_p: Tensor, log_q: Tensor, teacher_share: float) -> Tensor:
    """log(share · p + (1 - share) · q), also where p and q are too small for their own logarithms' exponentials."""
    return torch.logaddexp(log_p + math.log(teacher_share), log_q + math.log1p(-teacher_share))


def _cross_entropy(s: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """CE at temperature 1, and 1 where no logit is above the label's."""
    empty = (s == -torch.inf).all(-1)  # no softmax: CE is infinite and nothing can lower it
    s_all = torch.where(empty[:, None], torch.zeros_like(s), s)
    ce = torch.where(empty, torch.inf, -torch.log_softmax(s_all, -1).gather(1, label[:, None])[:, 0])
    return ce, (~empty & (s.gather(1, label[:, None])[:, 0] == s.amax(-1))).to(s.dtype)


class _Distribution(NamedTuple):
    """Probabilities of each row [N, V] and their logarithms, with 0 for the logarithm of 0."""

    p: Tensor
    log_p: Tensor
    zero: Tensor  # where the logit is −inf; everywhere in a row of −inf alone, which is no distribution
    broken: Tensor  # [N]: whether a logit is NaN or +inf

    def entropy(self) -> Tensor:
        return -(self.p * self.log_p).sum(-1)


def _distribution(x: Tensor) -> _Distribution:
    zero = x == -torch.inf
    # log_softmax's gradient is NaN in a row of −inf alone
    log_p = _finite(torch.log_softmax(torch.where(zero.all(-1, keepdim=True), torch.zeros_like(x), x), -1))
    p, log_p = (torch.where(zero, torch.zeros_like(x), y) for y in (log_p.exp(), log_p))
    return _Distribution(p, log_p, zero, (x.isnan() | (x == torch.inf)).any(-1))


def _divergence(name: str, P: _Distribution, Q: _Distribution, teacher_share: float) -> Tensor:
    """D of each row, without its infinite terms; 0 where one side is no distribution, NaN where one is broken."""
    p, log_p, q, log_q = P.p, P.log_p, Q.p, Q.log_p
    both = ~P.zero & ~Q.zero
    if name == "forward_kl":
        terms = torch.where(both, p * (log_p - log_q), 0.0)
    elif name == "reverse_kl":
        terms = torch.where(both, q * (log_q - log_p), 0.0)
    elif name == "tvd":
        terms = 0.5 * (p - q).abs()  # subgradient 0 where they are equal
    elif name in ("jsd", "skew_forward_kl", "skew_reverse_kl"):
        log_m = torch.where(both, mixture(log_p, log_q, teacher_share), 0.0)
        log_m = torch.where(Q.zero & ~P.zero, log_p + math.log(teacher_share), log_m)
        log_m = torch.where(P.zero & ~Q.zero, log_q + math.log1p(-teacher_share), log_m)
        of_p, of_q = p * (log_p - log_m), q * (log_q - log_m)
        weighted = {"jsd": (teacher_share, 1 - teacher_share), "skew_forward_kl": (1, 0), "skew_reverse_kl": (0, 1)}
        w_p, w_q = weighted[name]
        terms = w_p * of_p + w_q * of_q
    else:
        raise ValueError(f"unknown divergence {name!r}")
    nothing = P.zero.all(-1) | Q.zero.all(-1)
    D = torch.where(nothing, 0.0, terms.sum(-1))
    return torch.where(P.broken | Q.broken, torch.nan, D)


def _total(ce: Tensor, D: Tensor, tau: Tensor, alpha: Tensor, temperature_power: int) -> Tensor:
    """The loss of each token from its two terms."""
    a = alpha.to(ce.dtype).reshape(-1)
    # a weight of 0 also silences a term that is infinite (a label whose logit is −inf), but never a NaN
    weighted_ce = torch.where((a == 0) & ~ce.isnan(), torch.zeros_like(ce), a * ce)
    return weighted_ce + (1 - a) * tau**temperature_power * D
