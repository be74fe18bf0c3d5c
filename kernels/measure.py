"""What the benches of ops share: contenders take turns; on CUDA each is timed as a CUDA graph of several calls.

So launch overhead stays out of the comparison, as it does in a decode step that is captured as a graph.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import distributions
from pathlib import Path

import torch

from kernels import resolve

CALLS = 10  # in one graph


def alternate(
    contenders: dict[str, Callable], device: torch.device, repeats: int, *, in_graph: bool = True
) -> dict[str, list[float]]:
    """Milliseconds of each contender's call, in `repeats` alternating rounds: elapsed on CUDA, process time on CPU.

    in_graph: on CUDA, time a graph of CALLS calls, so without launch overhead.
    """
    clocks = {name: stopwatch(call, device, in_graph=in_graph) for name, call in contenders.items()}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in clocks.items():
            taken[name].append(run())
    return taken


def stopwatch(call: Callable, device: torch.device, *, in_graph: bool = True) -> Callable[[], float]:
    """A function that makes one call and returns its milliseconds, as `alternate` counts them."""
    if device.type == "cpu":
        return _eager(call)
    return _graph(call) if in_graph else lambda: 1e3 * seconds(device, call)


def seconds(device: torch.device, work: Callable) -> float:
    """Wall-clock seconds of `work`, with the device idle before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def _eager(call: Callable) -> Callable[[], float]:
    call()  # warms up

    def run() -> float:
        start = time.process_time()
        call()
        return 1e3 * (time.process_time() - start)

    return run


def _graph(call: Callable) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and allocates the workspaces of matmuls
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
    """Print a table. num_bytes: the least that any contender must read."""
    print(f"\n{title}: at least {num_bytes / 2**20:.1f} MiB to read")
    print(f"{'':<24}{'median ms':>12}{'min':>12}{'max':>12}{'GB/s':>10}")
    for name, values in taken.items():
        median = statistics.median(values)
        print(f"{name:<24}{median:>12.4f}{min(values):>12.4f}{max(values):>12.4f}{num_bytes / median / 1e6:>10.0f}")


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """Peak MiB that `run` adds to what is in use before it: of the allocator on CUDA, else resident (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = resident_mib("VmRSS")
    run()
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """Resident MiB of this process, now (VmRSS) or at its highest (VmHWM; ru_maxrss would count the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


def device_name(device: torch.device) -> str:
    """Name of the GPU or processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def versions(names: Iterable[str]) -> dict[str, str]:
    """The installed version of each package."""
    return {name: next((found.version for found in distributions(name=name)), "not installed") for name in names}


def hardware(device: torch.device) -> dict[str, object]:
    """Device, threads and versions, for the JSON line."""
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
