"""Run a function on several gloo ranks, or on ranks that are threads. Processes are forked from one server that has
imported torch and transformers already: importing them costs 8 s a process."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "transformers", "transformers.models.qwen2.modeling_qwen2", "train"])


def run_ranks(world_size: int, function: Callable, *arguments: object, timeout_s: float = 120) -> list:
    """`function(world, *arguments)` on every rank; the results in the order of ranks. A failing rank fails the test."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    results = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_rank, args=(results, rank, world_size, port, function, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        gathered = dict(results.get(timeout=timeout_s) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    for value in gathered.values():
        if isinstance(value, str) and value.startswith("Traceback"):
            raise AssertionError(value)
    return [gathered[rank] for rank in range(world_size)]


def _rank(results, rank: int, world_size: int, port: int, function: Callable, arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    from grpo import distributed

    torch.set_num_threads(1)
    try:
        results.put((rank, function(distributed.start(), *arguments)))
    except Exception:
        results.put((rank, traceback.format_exc()))
        raise
    finally:
        distributed.stop()


class Ranks:
    """W ranks as threads of this process: what a collective returns is what the real one would."""

    def __init__(self, size):
        self.size, self.barrier, self.items = size, threading.Barrier(size, timeout=20), [None] * size

    def run(self, work):
        with ThreadPoolExecutor(self.size) as pool:
            return [future.result() for future in [pool.submit(work, rank) for rank in range(self.size)]]

    def gather(self, rank, item):
        self.items[rank] = item
        self.barrier.wait()
        of_all_ranks = list(self.items)
        self.barrier.wait()
        return of_all_ranks

    def sum(self, rank, values):
        return torch.stack(self.gather(rank, values.double())).sum(0)

    def max(self, rank, values):
        return torch.stack(self.gather(rank, values)).amax(0)
