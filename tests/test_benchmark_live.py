"""What benchmarks/live.py makes of its times."""

from __future__ import annotations

import random

import pytest

from benchmarks.live import FIRST_STEP, contender, median_and_interval, ratios


def test_what_steps_and_rounds_differ_in_cancels_in_every_square():
    rng = random.Random(0)
    works, speeds = [rng.uniform(0.2, 2) for _ in range(9)], [rng.uniform(0.5, 2) for _ in range(6)]
    cost = {"plain": 1.0, "drawn": 1.02, "drawn 20 times": 1.4}
    seconds = [[works[s] * speeds[t] * cost[contender(s + FIRST_STEP, t)] for s in range(9)] for t in range(6)]
    assert ratios(seconds, "drawn") == pytest.approx([1.02] * 6)
    assert ratios(seconds, "drawn 20 times") == pytest.approx([1.4] * 6)


def test_the_interval_of_a_median_is_between_order_statistics():
    assert median_and_interval([*range(100, 0, -1)]) == (50.5, 41, 60)
    assert median_and_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
