"""The problem stream: which problems a training step works on, and what it remembers of them.

A curriculum chooses, pure, which problems of a split an epoch visits. The order stays random, so that no step is all
easy or all hard. A problem's rate is the share of its completions that were correct at its last visit, or None.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from grpo.records import Problem

Rates = Sequence[float | None]

ENDLESS_STRIDE = 1 << 20  # problems of an endless split that one seed may call its own
LEAST_CHANCE = 0.1  # one epoch in ten: a rate that is never measured again stays wrong while the policy moves on
STATE = ("position", "seed", "epoch", "skipped", "queue", "rates")


def drop_solved(rates: Rates, target: float, rng: random.Random) -> list[bool]:
    """Without those that every completion solved; all of them again where none is left."""
    unsolved = [rate != 1.0 for rate in rates]
    return unsolved if any(unsolved) else [True] * len(rates)


def target_rate(rates: Rates, target: float, rng: random.Random) -> list[bool]:
    """Each with the chance 1 - |rate - target| / max(target, 1 - target), at least LEAST_CHANCE; 1 for a new one.

    A rate of 0 or 1 has no spread and teaches nothing; the spread is largest at 0.5.
    """
    widest = max(target, 1 - target)
    draws = [rng.random() for _ in rates]
    nearness = [1.0 if rate is None else 1 - abs(rate - target) / widest for rate in rates]
    return [draw < max(LEAST_CHANCE, near) for draw, near in zip(draws, nearness, strict=True)]


CURRICULA: dict[str, Callable[[Rates, float, random.Random], list[bool]]] = {
    "none": lambda rates, target, rng: [True] * len(rates),
    "drop_solved": drop_solved,
    "target_rate": target_rate,
}


def digest(problems: Sequence[Problem]) -> str:
    """The same for the same questions and answers in the same order: rates and places are of no use to others."""
    texts = json.dumps([(problem.question, problem.answer) for problem in problems])
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


class ProblemStream:
    """Problems without end, a pure function of (split, seed) and, with a curriculum, of the rates remembered.

    A finite split is permuted anew every epoch, less what the curriculum leaves out of it. An endless one is read in
    order from (seed + 1) * ENDLESS_STRIDE: no two seeds share problems, and the first stride stays with supervised
    training and exemplars. Its problems never come back, so ValueError with a curriculum.
    """

    def __init__(self, problems: Sequence[Problem], *, seed: int, curriculum: str = "none", target_rate: float = 0.5):
        self.problems, self.seed, self.position = problems, seed, 0
        self.curriculum, self.target_rate = CURRICULA[curriculum], target_rate
        self.is_endless = getattr(problems, "endless", False)
        if self.is_endless and curriculum != "none":
            raise ValueError(
                f"data.curriculum={curriculum}: the training split of this task is endless, so that no problem ever "
                "comes back; use none, or a task with a finite training split"
            )
        self.rates: list[float | None] = [] if self.is_endless else [None] * len(problems)  # at the last visit
        self.data = "" if self.is_endless else digest(problems)
        self.epoch = self.skipped = 0  # epochs begun, and problems that the last of them leaves out
        self.queue: list[int] = []  # what is left of it, as places in the split, the next one last
        self.taken: list[int] = []  # places of the last take

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems; `index` is the position in the stream, unique over the run."""
        first, self.position = self.position, self.position + count
        if self.is_endless:
            start = (self.seed + 1) * ENDLESS_STRIDE + first
            self.taken = list(range(start, start + count))
        else:
            self.taken = [self._next() for _ in range(count)]
        return [replace(self.problems[place], index=first + i) for i, place in enumerate(self.taken)]

    def _next(self) -> int:
        while not self.queue:  # an epoch may be empty where target_rate is unlucky with a few problems
            rng = random.Random(f"{self.seed}/{self.epoch}")
            order = list(range(len(self.problems)))
            rng.shuffle(order)
            is_kept = self.curriculum(self.rates, self.target_rate, rng)
            self.queue = [place for place in reversed(order) if is_kept[place]]
            self.epoch, self.skipped = self.epoch + 1, len(order) - len(self.queue)
        return self.queue.pop()

    def remember(self, rates: Rates) -> None:
        """Pass rates of the problems of the last take, in their order; None where nothing could be judged."""
        if not self.is_endless:
            for place, rate in zip(self.taken, rates, strict=True):
                self.rates[place] = self.rates[place] if rate is None else rate

    def metrics(self) -> dict[str, float]:
        """For the log, where the split is finite; docs/metrics.md defines the keys."""
        if self.is_endless:
            return {}
        shares = {"solved": self.rates.count(1.0), "skipped": self.skipped}
        return {"problems/epoch": self.epoch} | {f"problems/{k}": n / len(self.rates) for k, n in shares.items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: copy(getattr(self, name)) for name in STATE} | {"problems": len(self.rates), "data": self.data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at the saved position; ValueError where the stream is not the one that was saved."""
        own = self.state_dict()
        for key in ("seed", "problems", "data"):
            if key in state and state[key] != own[key]:  # `data` is younger than some checkpoints
                raise ValueError(
                    f"the checkpoint's problem stream has {key}={state[key]}, this run {key}={own[key]}; "
                    "resume with the same data and seed"
                )
        vars(self).update({name: state[name] for name in STATE})
