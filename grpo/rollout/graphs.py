"""Decode steps as CUDA graphs: one launch replays hundreds of kernels, and Python is out of the loop.

A graph is captured for each number of rows that occurs, when it first occurs: the largest first, because rows leave,
and all from one memory pool. Weights are captured by address, so an optimizer that writes in place needs no new graph.
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

WARM_UP_STEPS = 2  # that a size runs before its capture: kernels are compiled and libraries initialised by then


def are_usable(device: torch.device) -> bool:
    """Whether steps on this device can be captured."""
    return device.type == "cuda"


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """Of every warm-up and capture: cuBLAS keeps a workspace, on Hopper of 32 MiB, for each stream that it has seen."""
    return torch.cuda.Stream()


def on_side_stream(run: Callable[[], None]) -> None:
    """Run as a capture will: on a stream of its own, between all work before and all work after."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


def capture(run: Callable[[], None], pool: tuple[int, int] | None) -> tuple[Callable[[], None], tuple[int, int]]:
    """What replays `run`, and the memory pool to share with the next. `run` is recorded, not executed."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog thread asks for events meanwhile, which a global capture would not survive.
    with torch.cuda.graph(graph, pool=pool, stream=side_stream(), capture_error_mode="thread_local"):
        run()
    return graph.replay, graph.pool()


class Graphs:
    """Runs a step by its graph; where it cannot be captured, eagerly from then on, with a warning that says why."""

    def __init__(self, step: DecodeStep):
        self.step = step
        self.steps_run = Counter()
        self.forget()
        self.can_capture = True

    def forget(self) -> None:
        """Drop every graph: they hold the addresses of the weights as these are now."""
        self.replays: dict[int, Callable[[], None]] = {}
        self.pool = None
        self.addresses = self._addresses()

    def check(self) -> None:
        """Call before every rollout: weights may have changed in place, but if any has moved the graphs must go."""
        if self._addresses() != self.addresses:
            self.forget()

    def _addresses(self) -> list[tuple[str, int]]:
        model = self.step.model
        named = itertools.chain(model.named_parameters(), model.named_buffers())
        return [(name, tensor.data_ptr()) for name, tensor in named]

    def __call__(self, layout: Decode) -> None:
        """One step. Every layout of one size must have the same bounds and addresses."""
        size = len(layout.place)
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
        except RuntimeError as error:  # what CUDA raises for a wait for the device, or for memory
            self.can_capture = False
            reason = str(error).splitlines()[0]
            warnings.warn(f"rollout decodes without CUDA graphs, which is slower: {reason}", stacklevel=2)
