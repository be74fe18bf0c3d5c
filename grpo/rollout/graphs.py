"""Decode steps as CUDA graphs: one launch replays hundreds of kernels, and Python is out of the loop.

A graph is captured for each number of rows that occurs, after a short warm-up; usually the largest first, because rows
end one by one. All share one memory pool. Graphs hold the addresses of weights: updates in place need no new graph.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable

import torch

from grpo.rollout.slab import Decode
from grpo.rollout.step import DecodeStep

WARM_UP_STEPS = 2  # of each size before its capture, so that kernels are compiled and libraries initialised by then


def are_usable(device: torch.device) -> bool:
    """Whether steps on this device can be captured."""
    return device.type == "cuda"


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One stream for all warm-ups and captures: cuBLAS keeps a workspace (Hopper: 32 MiB) for every stream it sees."""
    return torch.cuda.Stream()


def on_side_stream(run: Callable[[], None]) -> None:
    """Run as a capture will: on the side stream, after all earlier and before all later work of the current one."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


def capture(run: Callable[[], None], pool: tuple[int, int] | None) -> tuple[Callable[[], None], tuple[int, int]]:
    """Record `run` without executing it. Returns what replays it, and the memory pool to give to the next capture."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog thread queries events meanwhile, which would invalidate a global capture.
    with torch.cuda.graph(graph, pool=pool, stream=side_stream(), capture_error_mode="thread_local"):
        run()
    return graph.replay, graph.pool()


class Graphs:
    """Runs a step by its graph. After a failed capture it warns why, and what has no graph yet runs eagerly."""

    def __init__(self, step: DecodeStep):
        self.step = step
        self.steps_run = Counter()
        self.forget()
        self.can_capture = True

    def forget(self) -> None:
        """Drop every graph, and note the addresses of the weights, which the next graphs will hold."""
        self.replays: dict[int, Callable[[], None]] = {}
        self.pool = None
        self.addresses = self._addresses()

    def check(self) -> None:
        """Call before every rollout: weights may change in place, but if any has moved, the graphs are stale."""
        if self._addresses() != self.addresses:
            self.forget()

    def _addresses(self) -> list[tuple[str, int]]:
        model = self.step.model
        named = itertools.chain(model.named_parameters(), model.named_buffers())
        return [(name, tensor.data_ptr()) for name, tensor in named]

    def __call__(self, layout: Decode) -> None:
        """One step. Every layout of one size must have the same bounds and addresses."""
        size = len(layout.seat_index)
        if self.can_capture and size not in self.replays and self.steps_run[size] >= WARM_UP_STEPS:
            self._capture(size, layout)
        self.steps_run[size] += 1
        if size in self.replays:
            self.replays[size]()
        elif self.can_capture:
            on_side_stream(lambda: self.step(layout))
        else:
            self.step(layout)

    def _capture(self, size: int, layout: Decode) -> None:
        try:
            self.replays[size], self.pool = capture(lambda: self.step(layout), self.pool)
        except RuntimeError as error:  # CUDA's for a synchronisation while capturing, or out of memory
            self.can_capture = False
            reason = str(error).splitlines()[0]
            warnings.warn(f"rollout decodes without CUDA graphs, which is slower: {reason}", stacklevel=2)
