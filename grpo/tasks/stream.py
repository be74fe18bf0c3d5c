"""The problem stream: which problems a training step works on, and what it remembers of them.

A curriculum is a pure function that chooses which problems of a split an epoch visits. The order stays random, so that
no step is all easy or all hard. A problem's rate is the share of its completions that were correct at its last visit,
NaN before it. Rates and queue are tensors: with a million problems, lists would hold up every step and checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo.records import Problem

ENDLESS_STRIDE = 1 << 20  # problems of an endless split that are reserved for one seed
MIN_CHANCE = 0.1  # one epoch in ten: a rate that is never measured again stays wrong while the policy moves on
STATE = ("position", "seed", "epoch", "skipped", "queue", "rates")


def drop_solved(rates: Tensor, target: float, rng: random.Random) -> Tensor:
    """All but the problems that every completion solved; all of them again if none is left."""
    unsolved = rates != 1.0
    return unsolved if unsolved.any() else torch.ones_like(unsolved)


def target_rate(rates: Tensor, target: float, rng: random.Random) -> Tensor:
    """Each problem with chance 1 - |rate - target| / max(target, 1 - target), at least MIN_CHANCE; 1 for a new one.

    A rate of 0 or 1 has no spread and teaches nothing; the spread is largest at 0.5.
    """
    draws = torch.tensor([rng.random() for _ in range(len(rates))], dtype=torch.float64)
    nearness = 1 - (rates - target).abs() / max(target, 1 - target)
    return draws < nearness.nan_to_num(1.0).clamp_min(MIN_CHANCE)


CURRICULA: dict[str, Callable[[Tensor, float, random.Random], Tensor]] = {  # rates [N] fp64 -> which are kept, [N] bool
    "none": lambda rates, target, rng: torch.ones_like(rates, dtype=torch.bool),
    "drop_solved": drop_solved,
    "target_rate": target_rate,
}


def digest(problems: Sequence[Problem]) -> str:
    """A hash of the questions and answers in their order: saved rates and indices are valid for the same ones only."""
    texts = json.dumps([(problem.question, problem.answer) for problem in problems])
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


class ProblemStream:
    """Problems without end, a pure function of (split, seed) and, with a curriculum, of the rates remembered.

    A finite split is permuted anew every epoch, less what the curriculum leaves out of it. An endless one is read in
    order from (seed + 1) * ENDLESS_STRIDE: no two seeds share problems, and the first stride is left to exemplars. Its
    problems never come back, so ValueError with a curriculum.
    """

    def __init__(self, problems: Sequence[Problem], *, seed: int, curriculum: str = "none", target_rate: float = 0.5):
        self.problems, self.seed, self.position = problems, seed, 0
        self.curriculum, self.target_rate = CURRICULA[curriculum], target_rate
        self.is_endless = getattr(problems, "endless", False)
        if self.is_endless and curriculum != "none":
            raise ValueError(
                f"data.curriculum={curriculum}: the training split of this task is endless, so no problem is ever "
                "seen twice; use none, or a task with a finite training split"
            )
        self.rates = torch.full((0 if self.is_endless else len(problems),), math.nan, dtype=torch.float64)
        self.data = "" if self.is_endless else digest(problems)
        self.epoch = self.skipped = 0  # epochs begun, and problems that the last of them leaves out
        self.queue = torch.empty(0, dtype=torch.int64)  # what is left of the epoch: indices, the next one last
        self.taken: list[int] = []  # indices of the last take

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems; `index` is the position in the stream, unique over the run."""
        first, self.position = self.position, self.position + count
        if self.is_endless:
            start = (self.seed + 1) * ENDLESS_STRIDE + first
            self.taken = list(range(start, start + count))
        else:
            self.taken = [self._next() for _ in range(count)]
        return [replace(self.problems[i], index=first + n) for n, i in enumerate(self.taken)]

    def _next(self) -> int:
        while not len(self.queue):  # with few problems target_rate may happen to keep none
            rng = random.Random(f"{self.seed}/{self.epoch}")
            order = list(range(len(self.problems)))
            rng.shuffle(order)
            indices = torch.tensor(order[::-1])
            self.queue = indices[self.curriculum(self.rates, self.target_rate, rng)[indices]]
            self.epoch, self.skipped = self.epoch + 1, len(order) - len(self.queue)
        index, self.queue = int(self.queue[-1]), self.queue[:-1]
        return index

    def remember(self, rates: Sequence[float | None]) -> None:
        """Pass rates of the problems of the last take, in their order; None where nothing could be judged."""
        if not self.is_endless:
            for index, rate in zip(self.taken, rates, strict=True):
                if rate is not None:
                    self.rates[index] = rate

    def metrics(self) -> dict[str, float]:
        """For the log, where the split is finite; docs/metrics.md defines the keys."""
        if self.is_endless:
            return {}
        shares = {"solved": int((self.rates == 1.0).sum()), "skipped": self.skipped}
        return {"problems/epoch": self.epoch} | {f"problems/{k}": n / len(self.rates) for k, n in shares.items()}

    def state_dict(self) -> dict[str, Any]:
        copies = {"queue": self.queue.clone(), "rates": self.rates.clone()}
        state = {name: getattr(self, name) for name in STATE} | copies
        return state | {"problems": len(self.rates), "data": self.data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at the saved position; ValueError where the stream is not the one that was saved."""
        own = self.state_dict()
        for key in ("seed", "problems", "data"):
            if key in state and state[key] != own[key]:  # older checkpoints have no `data`
                raise ValueError(
                    f"the checkpoint's problem stream has {key}={state[key]}, this run {key}={own[key]}; "
                    "resume with the same data and seed"
                )
        vars(self).update({name: state[name] for name in STATE})
        if isinstance(self.rates, list):  # in older checkpoints, like the queue
            self.rates = [math.nan if rate is None else rate for rate in self.rates]
        # Copies: the tensors of a checkpoint are mapped from its file.
        self.rates = torch.as_tensor(self.rates, dtype=torch.float64).clone()
        self.queue = torch.as_tensor(self.queue, dtype=torch.int64).clone()
