"""Surrogate objectives, KL estimators and the table of presets: pure functions on flat per-token tensors [T].

    loss = sum_t weight_t * (-surrogate_t + beta * kl_t - entropy_bonus * entropy_t)

`weight_t` includes the division by the number of tokens or sequences (grpo/batch.py), so nothing here depends on
micro-batches or ranks, nor on a model or config. Log-probs are of the sampled tokens, natural log, under the policy
being trained (`logprobs`), the policy at the start of the update (`old`) and the reference (`ref`).

To use a surrogate of your own, set `objective.surrogate: my_file.py:my_function`. It is called as
`my_function(logprobs, old, advantages, **settings)` and returns [T], to be maximised. Its settings are those of
SETTINGS that it declares as keyword-only parameters. One that declares `sequence` sees all tokens of a micro-batch.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo.user_code import load_object

ADVANTAGES = ("group", "group_mean", "batch", "rloo", "per_reward")  # the keys of grpo.advantages and grpo.batch
AGGREGATIONS = ("sequence_mean", "token_mean", "constant")
MISMATCH = ("none", "token_truncate", "sequence_truncate", "sequence_mask")
SETTINGS = ("clip_low", "clip_high", "ratio_cap", "tau_positive", "tau_negative", "sequence")


@dataclass(frozen=True)
class Objective:
    """Every choice that makes a variant of GRPO: a row of PRESETS. grpo.config.ObjectiveConfig explains each field."""

    advantages: str
    surrogate: str
    aggregation: str
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float = 3.0
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    beta: float = 0.0
    kl_estimator: str = "k3"
    kl_where: str = "loss"
    kl_corrected: bool = False
    ref_refresh_every: int = 0
    ref_mix: float = 1.0
    entropy_bonus: float = 0.0
    entropy_share: float = 1.0
    mask_truncated: bool = False
    mismatch: str = "none"
    mismatch_level: str = "mean"
    mismatch_cap: float = 2.0
    dynamic_sampling: bool = False
    max_draws: int = 4
    overlong_share: float = 0.0

    @property
    def needs_whole_sequences(self) -> bool:
        """The surrogate needs all tokens of a sequence: it cannot be computed on part of a micro-batch at a time."""
        return "sequence" in find_surrogate(self.surrogate).settings

    @property
    def kl_in_loss(self) -> bool:
        return self.beta > 0 and self.kl_where == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.beta > 0 and self.kl_where == "reward"

    @property
    def needs_frozen_pass(self) -> bool:
        """Old log-probs or entropies enter rewards or weights, so they are computed even for one optimizer step."""
        return self.mismatch != "none" or self.entropy_share < 1 or self.kl_in_reward

    @property
    def acts_without_advantage(self) -> bool:
        """There may be a gradient although every advantage is 0; of a user's own surrogate that is assumed."""
        return self.kl_in_loss or self.entropy_bonus != 0 or self.surrogate not in SURROGATES

    @property
    def needs_zero_advantage_groups(self) -> bool:
        """Groups whose advantages are all 0 must be computed, too: for their gradient, or for their old log-probs or
        entropies. Otherwise they are left out of the batch."""
        return self.acts_without_advantage or self.needs_frozen_pass


# grpo: beta 0.02, half the paper's 0.04, because short runs move little; not 0, so that the default uses a reference.
PRESETS = {
    "grpo": Objective("group", "clip", "sequence_mean", beta=0.02),
    "dr_grpo": Objective("group_mean", "clip", "constant"),
    "dapo": Objective("group", "clip", "token_mean", clip_high=0.28, dynamic_sampling=True, overlong_share=0.2),
    "gspo": Objective("group", "sequence", "sequence_mean", clip_low=3e-4, clip_high=4e-4),
    "cispo": Objective("group", "cispo", "token_mean", clip_high=4.0),
    "rloo": Objective("rloo", "reinforce", "constant"),
    "sapo": Objective("group", "sapo", "sequence_mean"),
}


def clipped_surrogate(
    logprobs: Tensor, old: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Per-token PPO-clip objective, to be maximised (arXiv:2402.03300 Eq. 3, without its KL term).

    min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),  r = exp(logprobs - old).
    clip_high > clip_low is DAPO's clip-higher (arXiv:2503.14476).
    logprobs, old, advantages: [T], fp32, natural log.  Returns [T]; nothing is masked here.
    """
    return _pessimistic_bound(torch.exp(logprobs - old), advantages, clip_low, clip_high)


def dual_clipped_surrogate(
    logprobs: Tensor, old: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, ratio_cap: float
) -> Tensor:
    """As `clipped_surrogate`, but never below ratio_cap * A where A < 0 (arXiv:1912.09729).

    A token with A < 0 has no gradient above ratio_cap; `clipped_surrogate` would push it down the harder the larger its
    ratio.  ratio_cap > 1 + clip_high.
    """
    surrogate = clipped_surrogate(logprobs, old, advantages, clip_low=clip_low, clip_high=clip_high)
    return torch.where(advantages < 0, torch.maximum(surrogate, ratio_cap * advantages), surrogate)


def sequence_surrogate(
    logprobs: Tensor, old: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, sequence: Tensor
) -> Tensor:
    """One ratio per sequence, clipped as a whole (GSPO, arXiv:2507.18071 Eq. 5).

    min(s A, clip(s, 1 - clip_low, 1 + clip_high) A),  s = exp(mean over the sequence of (logprobs - old)).
    s is a geometric mean of ratios and hence near 1: clip_low and clip_high are about 3e-4 and 4e-4.  sequence: [T],
    each token's sequence, of which all tokens must be present.  Returns [T], equal within a sequence.
    """
    ratio = torch.exp(mean_by_sequence(logprobs - old, sequence))
    return _pessimistic_bound(ratio, advantages, clip_low, clip_high)


def sequence_token_surrogate(
    logprobs: Tensor, old: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, sequence: Tensor
) -> Tensor:
    """Same value as `sequence_surrogate`, but each token gets only its own gradient (GSPO-token, arXiv:2507.18071).

    s_t = stop[s] * exp(logprobs - stop[logprobs]).  With one advantage per sequence and sequence_mean the gradient is
    that of `sequence_surrogate`.
    """
    ratio = torch.exp(mean_by_sequence((logprobs - old).detach(), sequence)) * torch.exp(logprobs - logprobs.detach())
    return _pessimistic_bound(ratio, advantages, clip_low, clip_high)


def cispo_surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, *, clip_high: float) -> Tensor:
    """stop[min(r, 1 + clip_high)] * A * logprobs: the weight is capped, but no token loses its gradient.

    CISPO, arXiv:2506.13585, which caps the weight from above only. r = exp(logprobs - old). The cap is 1 + clip_high,
    not clip_high: a cap below 1 would shrink every gradient.
    """
    return torch.exp(logprobs - old).clamp(max=1 + clip_high).detach() * advantages * logprobs


def sapo_surrogate(
    logprobs: Tensor, old: Tensor, advantages: Tensor, *, tau_positive: float, tau_negative: float
) -> Tensor:
    """(4 / tau) * sigmoid(tau (r - 1)) * A, a soft gate in place of the clip (SAPO, arXiv:2511.20347).

    tau is tau_positive for A > 0, else tau_negative. At r = 1 the gradient is that of r A; away from it the gradient
    fades instead of stopping.
    """
    tau = torch.where(advantages > 0, tau_positive, tau_negative)
    return 4 / tau * torch.sigmoid(tau * (torch.exp(logprobs - old) - 1)) * advantages


def reinforce_surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """A * logprobs: without a ratio, so right only for the first optimizer step after sampling."""
    return advantages * logprobs


def mean_by_sequence(values: Tensor, sequence: Tensor) -> Tensor:
    """The mean over its sequence, at every token.  values, sequence: [T]; returns [T]."""
    sums = torch.zeros_like(values).index_add(0, sequence, values)  # T bounds their number: no GPU sync to count them
    counts = torch.zeros_like(values).index_add(0, sequence, torch.ones_like(values))
    return (sums / counts.clamp_min(1))[sequence]


def _pessimistic_bound(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


SURROGATES: dict[str, Callable[..., Tensor]] = {
    "clip": clipped_surrogate,
    "dual_clip": dual_clipped_surrogate,
    "sequence": sequence_surrogate,
    "sequence_token": sequence_token_surrogate,
    "cispo": cispo_surrogate,
    "sapo": sapo_surrogate,
    "reinforce": reinforce_surrogate,
}
CLIP_RANGE = {  # surrogate: what clip_high bounds, and a usual value
    "clip": ("the ratio of a token", 0.2),
    "dual_clip": ("the ratio of a token", 0.2),
    "sequence": ("the mean ratio of a sequence", 4e-4),
    "sequence_token": ("the mean ratio of a sequence", 4e-4),
    "cispo": ("the weight of a token, which is capped at 1 + clip_high", 4.0),
}


def kl_k1(logprobs: Tensor, ref: Tensor) -> Tensor:
    """-d, d = ref - logprobs: unbiased for KL(policy || ref) as a value; as a loss, gradient 0 on-policy.  [T]."""
    return logprobs - ref


def kl_k2(logprobs: Tensor, ref: Tensor) -> Tensor:
    """d^2 / 2, d = ref - logprobs: biased as a value, but on-policy its gradient is that of KL(policy || ref).  [T]."""
    return (ref - logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref: Tensor) -> Tensor:
    """exp(d) - d - 1, d = ref - logprobs (arXiv:2402.03300 Eq. 4; k3 of joschu.net/blog/kl-approx.html).  [T].

    Unbiased for KL(policy || ref) as a value; as a loss its on-policy gradient is that of KL(ref || policy).
    """
    difference = ref - logprobs
    return torch.exp(difference) - difference - 1


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def corrected_kl(name: str, logprobs: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    """The estimator times the ratio r, so that its gradient is that of KL(policy || ref) on tokens drawn by `old`. [T].

    For k1 and k3 r is differentiated, too: d/dlogprobs is r (logprobs - ref + 1), where the 1 vanishes in expectation,
    and r (logprobs - ref). For k2 it is not: the gradient of k2 is logprobs - ref already.
    """
    ratio = torch.exp(logprobs - old)
    return KL_ESTIMATORS[name](logprobs, ref) * (ratio.detach() if name == "k2" else ratio)


@dataclass(frozen=True)
class Surrogate:
    """A surrogate and the SETTINGS that it takes as keyword arguments."""

    function: Callable[..., Tensor]
    settings: tuple[str, ...]


@functools.cache
def find_surrogate(name: str) -> Surrogate:
    """The surrogate of this name in SURROGATES, or a user's own (`path/to/file.py:name`). ValueError for an unknown
    name or a wrong signature."""
    function = load_object(name) if ":" in name else _lookup(SURROGATES, name, "surrogate")
    parameters = inspect.signature(function).parameters.values()
    settings = tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
    unknown = [setting for setting in settings if setting not in SETTINGS]
    if unknown or len(parameters) - len(settings) != 3:
        raise ValueError(
            f"surrogate {name!r} takes ({', '.join(parameter.name for parameter in parameters)}); it must take "
            f"(logprobs, old, advantages, *, ...) with keyword-only names out of {', '.join(SETTINGS)}"
        )
    return Surrogate(function, settings)


def resolve(preset: str, **overrides: object) -> Objective:
    """The preset's row, with every override that is not None in place of its value.

    ValueError for an unknown name (with the nearest), a negative number, or a contradiction (with the reason).
    """
    row = _lookup(PRESETS, preset, "preset")
    stated = {name: value for name, value in overrides.items() if value is not None}
    objective = replace(row, **stated)
    _lookup(ADVANTAGES, objective.advantages, "advantages")
    _lookup(AGGREGATIONS, objective.aggregation, "aggregation")
    _lookup(KL_ESTIMATORS, objective.kl_estimator, "kl_estimator")
    _lookup(MISMATCH, objective.mismatch, "mismatch")
    find_surrogate(objective.surrogate)
    for name in ("clip_low", "clip_high", "beta"):
        if getattr(objective, name) < 0:
            raise ValueError(f"objective.{name}={getattr(objective, name)} is negative; use 0 or more")
    bounded, usual = CLIP_RANGE.get(objective.surrogate, (None, None))
    bounded_by_preset, _ = CLIP_RANGE.get(row.surrogate, (None, None))
    if "clip_high" not in stated and bounded not in (None, bounded_by_preset) and objective.clip_high != usual:
        raise ValueError(
            f"objective.clip_high={objective.clip_high} of preset {preset!r} has another meaning for surrogate "
            f"{objective.surrogate!r}, where clip_high bounds {bounded}; set it explicitly, for example to {usual}"
        )
    for reason in contradictions(objective):
        raise ValueError(reason)
    return objective


def contradictions(objective: Objective) -> Iterator[str]:
    """A message, with reason and remedy, for each combination of settings that makes no sense."""
    wants, estimator = find_surrogate(objective.surrogate).settings, objective.kl_estimator
    if objective.kl_in_loss and estimator == "k1" and not objective.kl_corrected:
        yield "objective.kl_estimator=k1 in the loss has zero expected gradient; set kl_corrected, or use k2 or k3"
    if objective.kl_in_reward and estimator != "k1":
        yield f"objective.kl_estimator={estimator} with kl_where=reward: only k1 gives the gradient of a KL; use k1"
    if objective.kl_in_reward and objective.kl_corrected:
        yield "objective.kl_corrected with kl_where=reward: the surrogate's ratio corrects it already; leave it off"
    if objective.kl_in_reward and objective.advantages == "per_reward":
        yield "objective.advantages=per_reward normalises each reward, which would undo beta; use kl_where=loss"
    if objective.overlong_share > 0 and objective.advantages == "per_reward":
        yield "objective.overlong_share with advantages=per_reward: per_reward ignores the penalty; set it to 0"
    if objective.ref_refresh_every and not objective.beta:
        every = objective.ref_refresh_every
        yield f"objective.ref_refresh_every={every} with beta=0: there is no reference to refresh; set beta, or use 0"
    if "ratio_cap" in wants and objective.ratio_cap <= 1 + objective.clip_high:
        yield f"objective.ratio_cap={objective.ratio_cap} must be above 1 + clip_high={1 + objective.clip_high}"
    if objective.surrogate == "sequence" and objective.entropy_share < 1:
        yield (
            "objective.entropy_share < 1 with surrogate sequence: its ratio carries the gradient to every token, "
            "masked or not; use sequence_token"
        )
    if objective.surrogate == "sequence" and objective.mismatch == "token_truncate":
        yield (
            "objective.mismatch=token_truncate with surrogate sequence: its ratio would spread each token's weight "
            "over the sequence; use sequence_truncate, or surrogate sequence_token"
        )


def check_steps(objective: Objective, optimizer_steps: int) -> None:
    """ValueError if the surrogate is not valid for this many optimizer steps on one rollout."""
    if objective.surrogate == "reinforce" and optimizer_steps > 1:
        raise ValueError(
            f"objective.surrogate=reinforce has no ratio, so it cannot make batch.passes * batch.minibatches="
            f"{optimizer_steps} optimizer steps on one rollout; use 1, or surrogate clip"
        )


def _lookup(table: dict | tuple, name: str, what: str) -> object:
    if name not in table:
        alike = difflib.get_close_matches(name, table, n=1) or [row for row in table if name in row.split("_")]
        nearest = f"; the nearest is {alike[0]}" if alike else ""
        custom = ", or path/to/file.py:function for your own" if what == "surrogate" else ""
        raise ValueError(f"unknown {what} {name!r}{nearest}; there are {', '.join(table)}{custom}")
    return table[name] if isinstance(table, dict) else name


def token_loss(
    objective: Objective,
    logprobs: Tensor,
    *,
    old: Tensor | None,
    ref: Tensor | None,
    advantages: Tensor,
    entropy: Tensor | None = None,
    sequence: Tensor | None = None,
) -> Tensor:
    """Loss per token, unweighted: -surrogate + beta * kl - entropy_bonus * entropy.

    All [T] fp32. old None: the policy has not moved in this update, so old = stop_gradient(logprobs) and the ratio is
    exactly 1, without a further forward pass. ref is needed only for a KL in the loss, entropy (with its gradient) only
    for a bonus, sequence only where the objective needs whole sequences. ValueError for a user's faulty surrogate.
    """
    old = logprobs.detach() if old is None else old
    row = find_surrogate(objective.surrogate)
    settings = {name: sequence if name == "sequence" else getattr(objective, name) for name in row.settings}
    surrogate = row.function(logprobs, old, advantages, **settings)
    if not isinstance(surrogate, Tensor) or surrogate.shape != logprobs.shape:
        found = f"shape {tuple(surrogate.shape)}" if isinstance(surrogate, Tensor) else repr(surrogate)
        raise ValueError(
            f"surrogate {objective.surrogate!r} returned {found} for log-probs of shape {tuple(logprobs.shape)}; "
            "return one value per token"
        )
    if logprobs.requires_grad and not surrogate.requires_grad:
        raise ValueError(f"surrogate {objective.surrogate!r} returned a tensor without a gradient to the log-probs")
    loss = -surrogate
    if objective.kl_in_loss:
        name = objective.kl_estimator
        kl = corrected_kl(name, logprobs, old, ref) if objective.kl_corrected else KL_ESTIMATORS[name](logprobs, ref)
        loss = loss + objective.beta * kl
    if objective.entropy_bonus:
        assert entropy.requires_grad or not logprobs.requires_grad, "the head was not asked for the entropy's gradient"
        loss = loss - objective.entropy_bonus * entropy
    return loss


@torch.no_grad()
def clipped_low_and_high(
    objective: Objective, logprobs: Tensor, old: Tensor, advantages: Tensor, sequence: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the clip acts: ratio below 1 - clip_low with A < 0, or above 1 + clip_high with A > 0.

    The ratio is the sequence's if the surrogate needs whole sequences. Without the setting a mask is all False; cispo's
    cap also acts where A < 0, which is not counted here.  All [T].  Returns two [T] bool masks, low and high.
    """
    wants = find_surrogate(objective.surrogate).settings
    difference = logprobs - old
    ratio = torch.exp(mean_by_sequence(difference, sequence) if "sequence" in wants else difference)
    low = (ratio < 1 - objective.clip_low) & (advantages < 0) & ("clip_low" in wants)
    high = (ratio > 1 + objective.clip_high) & (advantages > 0) & ("clip_high" in wants)
    return low, high
