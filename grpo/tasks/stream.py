"""The problem stream: which problems a training step works on. Its whole state is one position."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from grpo.records import Problem

ENDLESS_STRIDE = 1 << 20  # problems of an endless split that one seed may call its own


class ProblemStream:
    """Problems without end, a pure function of (split, seed, position).

    A finite split is permuted anew every epoch. An endless one is read in order from (seed + 1) * ENDLESS_STRIDE:
    no two seeds share problems, and the first stride stays with supervised training and exemplars.
    """

    def __init__(self, problems: Sequence[Problem], *, seed: int):
        self.problems, self.seed, self.position = problems, seed, 0
        self.is_endless = getattr(problems, "endless", False)

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems; `index` is the position in the stream, unique over the run."""
        positions = range(self.position, self.position + count)
        self.position += count
        return [replace(self.problems[self._place(position)], index=position) for position in positions]

    def _place(self, position: int) -> int:
        if self.is_endless:
            return (self.seed + 1) * ENDLESS_STRIDE + position
        epoch, offset = divmod(position, len(self.problems))
        return _permutation(len(self.problems), self.seed, epoch)[offset]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "seed": self.seed, "problems": 0 if self.is_endless else len(self.problems)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on at the saved position; ValueError where the stream is not the one that was saved."""
        own = self.state_dict()
        for key in ("seed", "problems"):
            if state[key] != own[key]:
                raise ValueError(
                    f"the checkpoint's problem stream has {key}={state[key]}, this run {key}={own[key]}; "
                    "resume with the same data and seed"
                )
        self.position = state["position"]


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
