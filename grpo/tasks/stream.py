"""The problem stream: which problems a training step works on, and what it remembers of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from grpo.records import Problem
from grpo.tasks.curriculum import CURRICULA

ENDLESS_STRIDE = 1 << 20  # problems of an endless split that one seed may call its own


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

    def remember(self, rates: Sequence[float | None]) -> None:
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
        names = ("position", "seed", "epoch", "skipped")
        lists = {"queue": list(self.queue), "rates": list(self.rates)}
        return {name: getattr(self, name) for name in names} | lists | {"problems": len(self.rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at the saved position; ValueError where the stream is not the one that was saved."""
        own = self.state_dict()
        for key in ("seed", "problems"):
            if state[key] != own[key]:
                raise ValueError(
                    f"the checkpoint's problem stream has {key}={state[key]}, this run {key}={own[key]}; "
                    "resume with the same data and seed"
                )
        self.position, self.epoch, self.skipped = state["position"], state["epoch"], state["skipped"]
        self.queue, self.rates = list(state["queue"]), list(state["rates"])
