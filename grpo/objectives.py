"""Surrogates, KL estimators and the table of presets: pure functions on flat per-token tensors [T].

    loss = sum_t weight_t * (-surrogate_t + beta * kl_t)

`weight_t` is final and carries the mean (grpo/batch.py), so nothing here knows of micro-batches or ranks. No model
and no config object enters. Log-probs are of the sampled tokens, natural log, under the policy being trained
(`logprobs`), the policy at the start of the update (`old`) and the frozen reference (`ref`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """One row of the table: every choice that makes a variant of GRPO."""

    advantages: str  # a name in grpo.advantages.ADVANTAGES
    surrogate: str  # a name in SURROGATES
    aggregation: str  # a name in grpo.batch.AGGREGATIONS
    clip_low: float
    clip_high: float
    beta: float  # coefficient of the KL to the reference; 0: no reference is loaded
    kl_estimator: str  # a name in KL_ESTIMATORS


# grpo: beta 0.02, half the paper's 0.04: short runs move little, and the reference is exercised by default.
PRESETS = {
    "grpo": Objective("group", "clip", "sequence_mean", clip_low=0.2, clip_high=0.2, beta=0.02, kl_estimator="k3"),
    "dr_grpo": Objective("group_mean", "clip", "constant", clip_low=0.2, clip_high=0.2, beta=0.0, kl_estimator="k3"),
}


def clipped_surrogate(
    logprobs: Tensor, old: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Per-token PPO-clip objective, to be maximised (arXiv:2402.03300 Eq. 3, without its KL term).

    min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),  r = exp(logprobs - old).
    clip_high > clip_low is DAPO's clip-higher (arXiv:2503.14476).
    logprobs, old, advantages: [T], fp32, natural log.  Returns [T]; nothing is masked here.
    """
    ratio = torch.exp(logprobs - old)
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def kl_k2(logprobs: Tensor, ref: Tensor) -> Tensor:
    """d^2 / 2, d = ref - logprobs: biased as a value, but on-policy its gradient is that of KL(policy || ref).  [T]."""
    return (ref - logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref: Tensor) -> Tensor:
    """exp(d) - d - 1, d = ref - logprobs (arXiv:2402.03300 Eq. 4; k3 of joschu.net/blog/kl-approx.html).  [T].

    Unbiased for KL(policy || ref) as a value; as a loss its on-policy gradient is that of KL(ref || policy).
    """
    difference = ref - logprobs
    return torch.exp(difference) - difference - 1


SURROGATES: dict[str, Callable[..., Tensor]] = {"clip": clipped_surrogate}
KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k2": kl_k2, "k3": kl_k3}


def resolve(preset: str, **overrides: object) -> Objective:
    """The preset's row with every override that is not None put over it. Unknown names are refused with the nearest."""
    row = _lookup(PRESETS, preset, "preset")
    objective = replace(row, **{name: value for name, value in overrides.items() if value is not None})
    _lookup(SURROGATES, objective.surrogate, "surrogate")
    _lookup(KL_ESTIMATORS, objective.kl_estimator, "kl_estimator")
    for name in ("clip_low", "clip_high", "beta"):
        if getattr(objective, name) < 0:
            raise ValueError(f"objective.{name}={getattr(objective, name)} is negative; use 0 or more")
    return objective


def _lookup(table: dict, name: str, what: str) -> object:
    if name not in table:
        nearest = difflib.get_close_matches(name, table, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown {what} {name!r}; nearest is {nearest!r}; there are {', '.join(table)}")
    return table[name]


def token_loss(
    objective: Objective, logprobs: Tensor, *, old: Tensor | None, ref: Tensor | None, advantages: Tensor
) -> Tensor:
    """Loss per token, unweighted: -surrogate + beta * kl.

    All [T] fp32. old None: the policy has not moved since it was measured, so old = stop_gradient(logprobs) and the
    ratio is exactly 1 without a pass of its own. ref None only where beta is 0.
    """
    old = logprobs.detach() if old is None else old
    surrogate = SURROGATES[objective.surrogate]
    loss = -surrogate(logprobs, old, advantages, clip_low=objective.clip_low, clip_high=objective.clip_high)
    if objective.beta:
        loss = loss + objective.beta * KL_ESTIMATORS[objective.kl_estimator](logprobs, ref)
    return loss


@torch.no_grad()
def clipped_low_and_high(
    objective: Objective, logprobs: Tensor, old: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the clip stops the gradient: ratio below 1 - clip_low with A < 0, or above 1 + clip_high with A > 0.

    All [T].  Returns two [T] bool masks, low and high.
    """
    ratio = torch.exp(logprobs - old)
    low = (ratio < 1 - objective.clip_low) & (advantages < 0)
    high = (ratio > 1 + objective.clip_high) & (advantages > 0)
    return low, high
