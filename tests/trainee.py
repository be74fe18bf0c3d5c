"""`train.py` in processes of its own, forked from one that has imported everything, to be killed at any moment."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from grpo import checkpoint
from grpo.metrics import read_metrics
from tests.ranks import CONTEXT

CLOCK = ("seconds/", "tokens_per_second")  # what two equal runs may differ in


def start(folder: Path, arguments: list[str], *, ranks: int = 1, dies_in: tuple[str, int, int] | None = None) -> list:
    """The processes of a run, one a rank, as torchrun starts them again: it goes on by itself from its checkpoint.

    Their output goes to folder/output.txt. dies_in: (function, rows, calls): rank 0 is killed in the function's so many
    calls after metrics.jsonl has so many rows.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RESTART_COUNT": "1"}
    processes = []
    for rank in range(ranks):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        processes.append(CONTEXT.Process(target=_train, args=(folder, environment, arguments, dies_in), daemon=False))
        processes[-1].start()
    return processes


def stay_on_cores(count: int) -> None:
    """Of those that this process may use: a rank takes as many threads as it has cores, and sums depend on them.

    Tests that run side by side begin at either end. macOS cannot do so.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        is_second = os.environ.get("PYTEST_XDIST_WORKER") == "gw1"
        os.sched_setaffinity(0, cores[-count:] if is_second else cores[:count])


def wait(processes: list, *, at_most_s: float) -> int | None:
    """The status of the first process that fails, with which torchrun would kill the others; 0 where all ended well,
    None where they are not done by then."""
    end = time.monotonic() + at_most_s
    while time.monotonic() < end:
        statuses = [process.exitcode for process in processes]
        if any(statuses):
            kill(processes)
            return next(filter(None, statuses))
        if all(status == 0 for status in statuses):
            return 0
        time.sleep(0.01)
    return None


def kill(processes: list) -> None:
    """With signal 9, all at once."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The same metrics but for the clock, the same best step and the same weights at the end, to the last bit."""
    assert rows_without_clock(ours) == rows_without_clock(theirs)
    assert checkpoint.best(ours).name == checkpoint.best(theirs).name
    a, b = (load_file(checkpoint.newest_intact(run) / "model.safetensors") for run in (ours, theirs))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def rows_without_clock(run_dir: Path) -> list[dict]:
    """What two equal runs have in common."""
    return [{key: value for key, value in row.items() if not key.startswith(CLOCK)} for row in read_metrics(run_dir)]


def _train(folder: Path, environment: dict, arguments: list[str], dies_in: tuple[str, int, int] | None) -> None:
    import train

    os.environ |= environment
    os.chdir(folder)
    torch.set_num_threads(1)
    stay_on_cores(int(environment["WORLD_SIZE"]))  # several ranks: a thread each
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if dies_in and environment["RANK"] == "0":
        _kill_in(*dies_in, folder / arguments[arguments.index("--run-dir") + 1] / "metrics.jsonl")
    sys.exit(train.main(arguments))


def _kill_in(function: str, rows: int, calls: int, metrics: Path) -> None:
    """Patch the function of that dotted name."""
    module, _, name = function.rpartition(".")
    original, left = getattr(sys.modules[module], name), calls

    def counting(*arguments, **options):
        nonlocal left
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= rows:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(sys.modules[module], name, counting)
