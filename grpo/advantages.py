"""Rewards of all ranks, [P, G] -> advantages, [P, G]. Pure functions and the table of their names.

Rewards of all ranks are gathered first, so that statistics never depend on the number of ranks.
A completion that could not be scored takes no part in its group's statistics and gets advantage 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SPREAD_TOLERANCE = 1e-6  # rewards closer than this count as equal: dividing by std must not blow up rounding noise
STD_OFFSET = 1e-4


def group_mean_and_spread(rewards: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each group's scored rewards, and whether it has *spread*: whether these rewards differ.

    rewards: [P, G] fp32; scored: [P, G] bool.  Returns [P, 1] fp32 and [P, 1] bool; a group with fewer than two
    scored completions has no spread.
    """
    count = scored.sum(1, keepdim=True)
    mean = torch.where(scored, rewards, 0.0).sum(1, keepdim=True) / count.clamp_min(1)
    highest = torch.where(scored, rewards, -torch.inf).amax(1, keepdim=True)
    lowest = torch.where(scored, rewards, torch.inf).amin(1, keepdim=True)
    return mean, (highest - lowest > SPREAD_TOLERANCE) & (count >= 2)


def group_mean(rewards: Tensor, scored: Tensor) -> Tensor:
    """r - mean_g (Dr. GRPO, arXiv:2503.20783: no division by the standard deviation).  [P, G] -> [P, G]."""
    mean, has_spread = group_mean_and_spread(rewards, scored)
    return torch.where(scored & has_spread, rewards - mean, 0.0)


def group(rewards: Tensor, scored: Tensor) -> Tensor:
    """(r - mean_g) / (std_g + 1e-4) (GRPO, arXiv:2402.03300 section 4.1.2).  [P, G] -> [P, G].

    std is the sample standard deviation (ddof 1), a choice that the paper leaves open: if one of eight succeeds, its
    advantage is 2.4742; the population standard deviation would make it 2.6450.
    """
    centred = group_mean(rewards, scored)
    degrees = (scored.sum(1, keepdim=True) - 1).clamp_min(1)
    std = (centred.square().sum(1, keepdim=True) / degrees).sqrt()
    return centred / (std + STD_OFFSET)


def batch(rewards: Tensor, scored: Tensor) -> Tensor:
    """(r - mean_g) / (std + 1e-4), std over all scored rewards of the step, ddof 1 (arXiv:2508.08221).

    A group whose rewards differ little keeps small advantages. std is of raw rewards, not of centred ones.
    """
    count = scored.sum().clamp_min(2)
    mean = rewards.sum() / count
    std = (torch.where(scored, rewards - mean, 0.0).square().sum() / (count - 1)).sqrt()
    return group_mean(rewards, scored) / (std + STD_OFFSET)


def rloo(rewards: Tensor, scored: Tensor) -> Tensor:
    """r_i - mean of the others' rewards = n / (n - 1) * (r_i - mean_g), n scored in the group (arXiv:2402.14740)."""
    count = scored.sum(1, keepdim=True)
    return group_mean(rewards, scored) * count / (count - 1).clamp_min(1)


def per_reward(components: Tensor, weights: Tensor, scored: Tensor) -> Tensor:
    """Each reward component normalised in its group, then the weighted sum scaled over the step (GDPO,
    arXiv:2601.05242), so that a component with a small range is not drowned by one with a large range.

    x = sum_k w_k (r_k - mean_g r_k) / (std_g r_k + 1e-4),  A = x / (std of x over the step + 1e-4); ddof 1.
    The paper also subtracts the mean of x. It is 0 by construction, and subtracting its rounding error would give
    groups without spread an advantage. components: [P, G, K], NaN where a component abstained (the completion is then
    out of that component's statistics, which adds 0); weights: [K]; scored: [P, G] bool.  Returns [P, G].
    """
    judged = scored[..., None] & ~components.isnan()
    normalised = [
        group(torch.where(judged[..., k], components[..., k], 0.0), judged[..., k]) for k in range(len(weights))
    ]
    total = (torch.stack(normalised, -1) * weights).sum(-1)
    std = (total.square().sum() / (scored.sum() - 1).clamp_min(1)).sqrt()
    return total / (std + STD_OFFSET)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "group": group,
    "group_mean": group_mean,
    "batch": batch,
    "rloo": rloo,
    "per_reward": per_reward,
}


def normalise(
    name: str, rewards: Tensor, scored: Tensor, *, components: Tensor | None = None, weights: Sequence[float] = ()
) -> Tensor:
    """Advantages by the named formula.  rewards: [P, G]; scored: [P, G] bool; returns [P, G] fp32.

    Only `per_reward` uses components [P, G, K] and weights [K], and not their weighted sum, `rewards`.
    """
    if name == "per_reward":
        return per_reward(components, torch.tensor(weights), scored)
    return ADVANTAGES[name](torch.where(scored, rewards, 0.0), scored)


def overlong_penalty(lengths: Tensor, max_new_tokens: int, share: float) -> Tensor:
    """0 up to (1 - share) of the limit, then falling linearly to -1 at the limit (DAPO, arXiv:2503.14476 section 3.4).

    lengths: [P, G] tokens; returns [P, G] fp32, to be added to the rewards. share 0: no penalty.
    """
    buffer = share * max_new_tokens
    return -((lengths - max_new_tokens + buffer) / buffer).clamp(0, 1) if share else torch.zeros(lengths.shape)


def nonzero_groups_first(advantages: Tensor, num_groups: int) -> list[int]:
    """Indices of the first num_groups groups with a non-zero advantage, filled up with the first others if too few.

    advantages: [drawn, G].  The indices are in the order drawn (DAPO's dynamic sampling, arXiv:2503.14476).
    """
    order = zero_advantage_groups(advantages).to(torch.int8).argsort(stable=True)
    return sorted(order[:num_groups].tolist())


def zero_advantage_share(advantages: Tensor) -> float:
    """Share of groups whose advantages, of [P, G], are all 0."""
    return zero_advantage_groups(advantages).float().mean().item()


def zero_advantage_groups(advantages: Tensor) -> Tensor:
    """Which groups have only advantages of 0, and so no policy gradient.  [P, G] -> [P] bool."""
    return (advantages == 0).all(1)
