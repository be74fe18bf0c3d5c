"""A run that is killed at any moment and started again ends as if nothing had happened: the same bits.

By default two places are hit on purpose, on one rank and on two, with several optimizer steps per rollout; `make slow`
kills 20 times at random.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo.metrics import read_metrics
from tests import trainee

ROOT = Path(__file__).parents[1]
RUN = ["--config", str(ROOT / "configs" / "demo.yaml"), "--num-steps=6", "--save-every=2", "--eval.every=3"]
RUN += ["--base.steps=30", "--base.habit-steps=5", "--base.validation-problems=20", "--eval.validation-problems=8"]
RUN += ["--rollout.prompts-per-step=4", "--rollout.group-size=4", "--batch.minibatches=2", "--batch.passes=2"]
# An untrained base is never right: without these nothing would be learnt, and any state would do to go on from.
RUN += ["--eval.test-problems=0", "--rewards.functions", f"{ROOT}/tests/reward_functions.py:length_of"]
RUN += ["--rewards.no-require-finish"]
IN_A_ROLLOUT, IN_AN_UPDATE = "grpo.rollout.step.forward", "grpo.update.forward"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a run that nothing disturbed for each number of ranks, and the base model in the cache."""
    place = tmp_path_factory.mktemp("resume")
    for ranks in (1, 2):
        processes = trainee.start(place, [*RUN, "--run-dir", f"whole{ranks}"], ranks=ranks)
        assert trainee.wait(processes, at_most_s=120) == 0, (place / "output.txt").read_text()
        assert all(row["grad_norm"] for row in read_metrics(place / f"whole{ranks}"))
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
@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_a_run_in_shares_goes_on_with_the_same_bits_too(folder, strategy):
    """In bf16, with the reference on the CPU."""
    run = [*RUN, f"--distributed.strategy={strategy}", "--model.precision=bf16", "--model.reference-offload"]
    for name, deaths in (("whole", ()), ("killed", ((IN_A_ROLLOUT, 3, 5),))):
        arguments = [*run, "--run-dir", f"{name}-{strategy}"]
        for dies_in in deaths:
            processes = trainee.start(folder, arguments, ranks=2, dies_in=dies_in)
            assert trainee.wait(processes, at_most_s=60) == -9, (folder / "output.txt").read_text()
        processes = trainee.start(folder, arguments, ranks=2)
        assert trainee.wait(processes, at_most_s=60) == 0, (folder / "output.txt").read_text()
    trainee.assert_same_run(folder / f"killed-{strategy}", folder / f"whole-{strategy}")


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


def torchrun(folder: Path, run_dir: str, *options: str, cores: int) -> subprocess.Popen:
    """A launcher of two ranks, or of one of two nodes, on so many cores."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py"), *RUN]
    return subprocess.Popen(
        [*command, "--run-dir", run_dir],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: trainee.stay_on_cores(cores),
    )


def kill_rank(rank: int, launchers: list[subprocess.Popen], metrics: Path, rows: int) -> None:
    """One of the launchers' ranks, once there are so many rows."""
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < rows:
        assert not any(launcher.poll() for launcher in launchers), [launcher.communicate()[0] for launcher in launchers]
        time.sleep(0.01)
    for launcher in launchers:
        for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
            if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
                return os.kill(int(child), signal.SIGKILL)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "victim"), [(1, 0), (3, 1)])
def test_torchrun_restarts_a_run_whose_rank_was_killed_and_nothing_is_lost(folder, rows, victim):
    """Before the first checkpoint and after it; the other rank is ended by torchrun."""
    run_dir = f"restarted{rows}"
    launcher = torchrun(folder, run_dir, "--nproc_per_node=2", "--max-restarts=1", cores=2)
    kill_rank(victim, [launcher], folder / run_dir / "metrics.jsonl", rows)
    output = launcher.communicate(timeout=200)[0]
    assert launcher.returncode == 0, output
    assert rows == 1 or "resuming from" in output
    trainee.assert_same_run(folder / run_dir, folder / "whole2")


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "victim"), [(1, 0), (3, 1), (99, None)])
def test_two_nodes_train_like_two_ranks_of_one_also_when_a_rank_is_killed(folder, rows, victim):
    """Two launchers that meet over a c10d rendezvous. Only the victim's counts the restart."""
    run_dir = f"nodes{rows}"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{probe.getsockname()[1]}", "--rdzv-id=two"]
    options = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=1", "--local-addr=localhost", *rendezvous]
    nodes = [torchrun(folder, run_dir, *options, cores=1) for _ in range(2)]
    if victim is not None:
        kill_rank(victim, nodes, folder / run_dir / "metrics.jsonl", rows)
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert rows != 3 or "resuming from" in "".join(outputs)
    trainee.assert_same_run(folder / run_dir, folder / "whole2")
