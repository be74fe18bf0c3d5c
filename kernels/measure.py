"""What the benches of small ops share: contenders take turns, on CUDA each as a graph of several calls.

So launch overhead, which a decode step captured as a graph has not either, stays out of the comparison.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version

import torch

from kernels import resolve

CALLS = 10  # in a graph


def alternate(
    contenders: dict[str, Callable], device: torch.device, repeats: int, *, in_graph: bool = True
) -> dict[str, list[float]]:
    """Milliseconds of a call, `repeats` times by turns: of the clock on CUDA, of the process on CPU.

    in_graph: on CUDA without the launches.
    """
    time_one = _eager if device.type == "cpu" else _graph if in_graph else _waited_for
    clocks = {name: time_one(call) for name, call in contenders.items()}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in clocks.items():
            taken[name].append(run())
    return taken


def _eager(call: Callable) -> Callable[[], float]:
    call()  # warms up

    def run() -> float:
        start = time.process_time()
        call()
        return 1e3 * (time.process_time() - start)

    return run


def _waited_for(call: Callable) -> Callable[[], float]:
    def run() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    return run


def _graph(call: Callable) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills the workspaces of matmuls
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / CALLS

    return run


def show(title: str, taken: dict[str, list[float]], num_bytes: int) -> None:
    """A table; num_bytes: the least that must be read."""
    print(f"\n{title}: at least {num_bytes / 2**20:.1f} MiB to read")
    print(f"{'':<24}{'median ms':>12}{'least':>12}{'most':>12}{'GB/s':>10}")
    for name, values in taken.items():
        median = statistics.median(values)
        print(f"{name:<24}{median:>12.4f}{min(values):>12.4f}{max(values):>12.4f}{num_bytes / median / 1e6:>10.0f}")


def device_name(device: torch.device) -> str:
    """Of the hardware."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of packages."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware(device: torch.device) -> dict[str, object]:
    """Where it was measured, for the last line."""
    facts = {"device": device_name(device), "threads": torch.get_num_threads(), "python": platform.python_version()}
    return facts | versions(("torch", "triton"))


def bench_parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """The options that every bench of an op has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=repeats)
    return parser


def run_bench(description: str, op: str, shapes: dict[str, list], measure: Callable[..., dict]) -> None:
    """A small op's bench: `measure(shape, device, repeats)` shows a table for each shape; the last line is JSON."""
    options = bench_parser(description, repeats=9).parse_args()
    device = options.device
    if device.type == "cpu":
        torch.set_num_threads(1)
        print(f"without triton: {resolve(op, 'auto', device).why}")
    results = [measure(shape, device, options.repeats) for shape in shapes[device.type]]
    print(json.dumps({**hardware(device), "results": results}))
