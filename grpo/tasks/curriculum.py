"""Which problems of a split an epoch visits, by what is remembered of them. Pure; called by grpo.tasks.stream.

A problem's rate is the share of its completions that were correct at its last visit; None where it has none yet.
Only the choice is made here: the order of an epoch stays random, so that no step is all easy or all hard.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Rates = Sequence[float | None]

LEAST_CHANCE = 0.1  # one epoch in ten: a rate that is never measured again stays wrong while the policy moves on


def all_problems(rates: Rates, target: float, rng: random.Random) -> list[bool]:
    return [True] * len(rates)


def drop_solved(rates: Rates, target: float, rng: random.Random) -> list[bool]:
    """Without those that every completion solved; all of them again where none is left."""
    unsolved = [rate != 1.0 for rate in rates]
    return unsolved if any(unsolved) else all_problems(rates, target, rng)


def target_rate(rates: Rates, target: float, rng: random.Random) -> list[bool]:
    """Each with the chance 1 - |rate - target| / max(target, 1 - target), at least LEAST_CHANCE; 1 for a new one.

    A rate of 0 or 1 has no spread and teaches nothing; the spread is largest at 0.5.
    """
    widest = max(target, 1 - target)
    draws = [rng.random() for _ in rates]
    nearness = [1.0 if rate is None else 1 - abs(rate - target) / widest for rate in rates]
    return [draw < max(LEAST_CHANCE, near) for draw, near in zip(draws, nearness, strict=True)]


CURRICULA: dict[str, Callable[[Rates, float, random.Random], list[bool]]] = {
    "none": all_problems,
    "drop_solved": drop_solved,
    "target_rate": target_rate,
}
