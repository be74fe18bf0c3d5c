"""Verdicts a second: one worker against the pool, alternately; then 10,000 completions of which 1 % hang.

python -m benchmarks.sandbox
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from statistics import median

from grpo.records import OK, TIMEOUT
from grpo.rewards import Reward
from grpo.rewards.code import tests_passed
from grpo.rewards.pool import Pool
from grpo.rewards.sandbox import find_sandbox

ROW = {"test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]}


def hang_on_request(completions: list[str], **columns: list) -> list[float]:
    """Sleeps where a completion says so."""
    if "hang" in completions:
        time.sleep(1000)
    return [1.0] * len(completions)


def verdicts_per_second(pool: Pool, rewards: dict[str, Reward], count: int) -> float:
    """Every program differs: the verdict on one seen before would come from the cache."""
    texts = [f"def add(a, b):\n    return a + b  # {time.perf_counter()} {i}" for i in range(count)]
    started = time.perf_counter()
    table = pool(texts, {"test_list": [ROW["test_list"]] * count}, rewards)
    assert all(row[0] == (1.0, OK) for row in table), "a correct program did not pass"
    return count / (time.perf_counter() - started)


def main() -> None:
    from benchmarks.common import measured_on  # not above: workers import this file, and need no torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=40, help="programs in each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds of one worker and the pool")
    options = parser.parse_args()
    sandbox = find_sandbox("auto", 10.0)
    rewards = {"tests": Reward(partial(tests_passed, sandbox=sandbox), 1.0, batch_size=1)}
    rates: dict[int, list[float]] = {1: [], 2: []}
    for size in [*rates] * options.rounds:
        with Pool(workers=size, timeout_s=60, step_timeout_s=600) as pool:
            verdicts_per_second(pool, rewards, size)  # starts the workers
            rates[size].append(verdicts_per_second(pool, rewards, options.programs))
    one, two = (median(values) for values in rates.values())
    texts, limit_s = ["hang" if i % 100 == 0 else "fine" for i in range(10_000)], 120.0
    with Pool(workers=2, timeout_s=1.0, step_timeout_s=limit_s) as pool:
        started = time.perf_counter()
        table = pool(texts, {}, {"hang": Reward(hang_on_request, 1.0)})
        seconds = time.perf_counter() - started
    expected = [TIMEOUT if text == "hang" else OK for text in texts]
    right = sum(row[0].status == status for row, status in zip(table, expected, strict=True))
    print(f"sandbox: {sandbox.backend}; {os.cpu_count()} cores")
    print(f"verdicts per second: one worker {one:.1f}, two {two:.1f}, ratio {two / one:.2f}")
    print(f"10,000 completions, 100 hang: {seconds:.1f} s of {limit_s:.0f} s, {right} statuses correct")
    result = {"sandbox": sandbox.backend, "rates": rates, "verdicts_per_second_1": one, "verdicts_per_second_2": two}
    result |= {"ratio": two / one, "hanging_seconds": seconds, "hanging_limit_s": limit_s, "statuses_right": right}
    print(json.dumps(result | measured_on()))


if __name__ == "__main__":
    main()
