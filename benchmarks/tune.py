"""Which tile sizes are fastest on this device: python -m benchmarks.tune

Tries the constants at the top of each kernel.py and of modes.py, one after the other, each with several values while
the others are at their best so far. A value whose result differs from the first one's, or that does not compile or fit,
is reported and not taken. The constants to write down come last, and then JSON. Nothing is changed on disk. On CPU:
only chunks of the log-prob head.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.common import default_device, make_parser, measured_on
from kernels.linear_logprob import bench as head_bench
from kernels.linear_logprob import modes
from kernels.linear_logprob.rows import LogitTransform
from kernels.measure import stopwatch

REPEATS = 7


@dataclass
class Trial:
    """One value of one constant."""

    job: str
    constant: str
    value: object
    milliseconds: float | None
    trouble: str = ""


def outputs(call: Callable[[], object]) -> list[Tensor]:
    found = call()
    return [tensor.clone() for tensor in (found if isinstance(found, tuple) else (found,))]


def sweep(
    job: str,
    call: Callable[[], object],
    owner: ModuleType,
    constant: str,
    values: list,
    device: torch.device,
    *,
    in_graph: bool = True,
) -> Iterator[Trial]:
    """Try every value; afterwards the constant has the fastest. Its present value comes first, and the others must give
    the same result. in_graph: on CUDA timed as a graph, without launch overhead."""
    now = getattr(owner, constant)
    expected, best = None, (float("inf"), now)
    for value in [now, *(value for value in values if value != now)]:
        setattr(owner, constant, value)
        try:
            found = outputs(call)
            expected = expected or found
            same = [torch.allclose(a, b, rtol=2e-2, atol=2e-2) for a, b in zip(found, expected, strict=True)]
            trouble = "" if all(same) else "another result"
            run = stopwatch(call, device, in_graph=in_graph)
            taken = statistics.median(run() for _ in range(REPEATS))
        except Exception as error:  # of many kinds: does not compile, does not fit
            trouble, taken = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}", None
        if not trouble and taken < best[0]:
            best = taken, value
        yield Trial(job, constant, value, taken, trouble)
    setattr(owner, constant, best[1])


def tiles() -> list[dict[str, int]]:
    """Values of TILE (rows, columns, width, warps, stages, most registers of a thread) that compile for sm_90 with few
    spills or none. A multiprocessor holds one block of the first ones; of those with 128 registers, of small tiles and
    of 128 x 128 with 4 warps it holds two or three, so that one computes while another is in its epilogue."""
    sizes = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 128, 8, 2), (128, 256, 64, 8, 3)]
    sizes += [(128, 128, 32, 8, 4, 128), (128, 128, 64, 8, 3, 128), (128, 128, 64, 4, 3)]
    sizes += [(64, 128, 64, 4, 3), (128, 64, 64, 8, 3), (64, 256, 64, 4, 4)]
    names = ("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_WIDTH", "num_warps", "num_stages", "maxnreg")
    return [dict(zip(names, size, strict=False)) for size in sizes]


def head_sweeps(device: torch.device, shape: tuple[int, int, int]) -> Iterator[Iterator[Trial]]:
    """Chunks of mode C; with Triton also the tiles of A and C, the rows' kernels and whether C's matmul is fused."""
    impl, width = "triton" if device.type == "cuda" else "torch", f"D={shape[1]}"
    if device.type == "cuda":
        from kernels.linear_logprob import kernel

        inputs = head_bench.make_inputs(*shape, "values", device)
        forward = lambda: kernel.fused(inputs.hidden, inputs.weight, None, inputs.target, LogitTransform(1.0), None)[:2]
        yield sweep(f"mode A, {width}", forward, kernel, "TILE", tiles(), device)
        yield sweep(f"mode A, {width}", forward, kernel, "SPAN", [1024, 2048, 4096, 8192, 16384], device)
        rows = min(shape[0], modes.rows_per_chunk(shape[2], "cuda"))
        chunk, buffer = inputs.hidden[:rows], torch.empty(rows, shape[2], dtype=torch.float16, device=device)
        keep = lambda: kernel.fused(chunk, inputs.weight, None, inputs.target[:rows], LogitTransform(1.0), buffer)[:2]
        yield sweep(f"a chunk of mode C, {width}", keep, kernel, "TILE", tiles(), device)
        logits, target = torch.randn(rows, shape[2], device=device), inputs.target[:rows]
        blocks = [{"BLOCK": block, "num_warps": warps} for block in (2048, 4096, 8192) for warps in (4, 8, 16)]
        measure_rows = lambda: kernel.statistics(logits, target, LogitTransform(1.0))[:2]
        yield sweep("statistics of rows", measure_rows, kernel, "ROW_BLOCK", blocks, device)
    inputs = head_bench.make_inputs(*shape, "training", device)

    def train() -> Tensor:
        return head_bench.run_once(head_bench.folded(impl), inputs)

    chunks = [{device.type: 2**power} for power in ((26, 27, 28, 29, 30) if device.type == "cuda" else (12, 25))]
    yield sweep(f"mode C, {width}", train, modes, "CHUNK_ELEMENTS", chunks, device, in_graph=False)
    if device.type == "cuda":
        yield sweep(f"mode C, {width}", train, kernel, "MAX_FUSED_WIDTH", [0, 8192], device, in_graph=False)


def decoding_sweeps(device: torch.device) -> Iterator[Iterator[Trial]]:
    """The kernels of a decode step, at the shapes of their benches."""
    from kernels.decode_attention import bench, kernel
    from kernels.sample_token import kernel as sampling

    shape = bench.SHAPES["cuda"][0]
    tensors, layout = bench.make_inputs(shape, device)
    attend = lambda: kernel.decode_attention(*tensors, **layout)
    values = {
        "TILE_ROWS": [{2: rows, 4: 16} for rows in (16, 32, 64, 128)],
        "BLOCK_BYTES": [4096, 8192, 16384],
        "MIN_PREFIX_CHUNK": [64, 128, 256, 512],
        "PROGRAMS": [132, 264, 528, 1056],
    }
    for constant, candidates in values.items():
        yield sweep(f"decode attention, {shape.name}", attend, kernel, constant, candidates, device)
    rows = shape.groups * shape.seats
    logits = torch.randn(rows, 151_936, device=device).bfloat16()
    uniforms = torch.rand(rows, dtype=torch.float64, device=device)
    sample = lambda: sampling.sample_token(logits, uniforms, temperature=1.0)[1]
    yield sweep(f"sampling, {rows} rows", sample, sampling, "TILE", [1024, 2048, 4096, 8192, 16384], device)


def show(trials: list[Trial]) -> None:
    print(f"\n{trials[0].job}: {trials[0].constant}, the current value first")
    for trial in trials:
        taken = "" if trial.milliseconds is None else f"{trial.milliseconds:.4f} ms"
        print(f"{taken:>14}  {trial.value}  {trial.trouble}", flush=True)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("T", "D", "V"), help="of the head")
    arguments = parser.parse_args()
    device = default_device()
    shape = tuple(arguments.shape or head_bench.SHAPES[device.type][0])
    sweeps, every = [head_sweeps(device, shape)], []
    if device.type == "cuda":
        sweeps.append(decoding_sweeps(device))
    for sweep_of in (one for several in sweeps for one in several):
        trials = list(sweep_of)
        show(trials)
        every += trials
    best = {}
    for trial in every:
        if trial.milliseconds is not None and not trial.trouble:
            key = f"{trial.job}: {trial.constant}"
            best[key] = min(best.get(key, trial), trial, key=lambda one: one.milliseconds)
    print("\nfastest")
    for key, trial in best.items():
        first = next(one for one in every if f"{one.job}: {one.constant}" == key)
        print(f"  {key} = {trial.value}   {trial.milliseconds:.4f} ms, now {first.milliseconds or float('nan'):.4f}")
    print(json.dumps({"trials": [asdict(one) for one in every]} | measured_on(device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
