"""A run that is killed at any moment and started again ends as if nothing had happened: the same bits.

By default two places are hit on purpose, on one rank and on two, with several optimizer steps per rollout; `make slow`
kills 20 times at random.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests import trainee

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
RUN = ["--config", str(DEMO), "--base.steps=30", "--base.habit-steps=5", "--base.validation-problems=20"]
RUN += ["--rollout.prompts-per-step=4", "--rollout.group-size=4", "--batch.minibatches=2", "--batch.passes=2"]
RUN += ["--eval.every=3", "--eval.validation-problems=8", "--eval.test-problems=0", "--num-steps=6", "--save-every=2"]
IN_A_ROLLOUT, IN_AN_UPDATE = "grpo.rollout.engine.forward", "grpo.update.forward"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a run that nothing disturbed for each number of ranks, and the base model in the cache."""
    place = tmp_path_factory.mktemp("resume")
    for ranks in (1, 2):
        processes = trainee.start(place, [*RUN, "--run-dir", f"whole{ranks}"], ranks=ranks)
        assert trainee.wait(processes, at_most_s=120) == 0, (place / "output.txt").read_text()
    return place


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_in_mid_rollout_and_mid_update_ends_with_the_same_bits(folder, ranks):
    """The first time before there is any checkpoint."""
    arguments = [*RUN, "--run-dir", f"killed{ranks}"]
    for dies_in in ((IN_AN_UPDATE, 1, 2), (IN_A_ROLLOUT, 3, 5)):
        processes = trainee.start(folder, arguments, ranks=ranks, dies_in=dies_in)
        assert trainee.wait(processes, at_most_s=60) == -9, (folder / "output.txt").read_text()
    assert trainee.wait(trainee.start(folder, arguments, ranks=ranks), at_most_s=60) == 0
    trainee.assert_same_run(folder / f"killed{ranks}", folder / f"whole{ranks}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "kills"), [(1, 20), (2, 6)])
def test_kill_9_at_random_moments_costs_no_bit(folder, ranks, kills):
    """One run after the other, each started again and again until it comes through, until so many kills are spent."""
    moments, run = random.Random(ranks), 0
    while kills:
        run += 1
        arguments = [*RUN, "--save-every=1", "--keep-last=9", "--run-dir", f"random{ranks}-{run}"]
        status = None
        while status is None:
            processes = trainee.start(folder, arguments, ranks=ranks)
            seconds = moments.uniform(1, 6) if kills else 120
            status = trainee.wait(processes, at_most_s=seconds)
            if status is None:
                trainee.kill(processes)
                kills -= 1
            assert not status, (folder / "output.txt").read_text()[-3000:]
        trainee.assert_same_run(folder / f"random{ranks}-{run}", folder / f"whole{ranks}")
