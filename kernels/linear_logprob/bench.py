"""Time, memory and error of the log-prob head beside its peers: python -m kernels.linear_logprob.bench

Three jobs: values without a gradient; a frozen head, with the gradient of the hidden states; training, with that of
the weight too. A token's loss is its coefficient times the probability ratio. Contenders take turns within every
repeat. Times are elapsed on CUDA, process time (one thread) on CPU; the peak is what a run adds to the memory of its
inputs; the limit is what the matmuls alone would take at 800 TFLOP/s.
"""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.linear_logprob.reference import linear_logprob as reference
from kernels.measure import alternate, bench_parser, hardware, peak_mib, versions

MATMULS = {"values": 1, "frozen head": 2, "training": 3}  # of 2TDV flops each: the least that a job can do with
SUSTAINED_FLOPS = 800e12  # of one H100, dense bf16
SHAPES = {  # device: (rows T, width D, vocabulary V)
    "cpu": [(512, 896, 8_192), (192, 896, 151_936)],
    "cuda": [(16_384, 896, 151_936), (16_384, 4_096, 151_936)],
}
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")
BLOCK_ELEMENTS = {"cuda": 2**28, "cpu": 2**24}  # logits that `recomputed` holds at a time


class Inputs(NamedTuple):
    """hidden [T, D], weight [V, D], target [T], coefficient [T] fp32."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    coefficient: Tensor


Contender = Callable[[Inputs], Tensor]  # -> loss, a scalar


def ratio_loss(logprobs: Tensor, coefficient: Tensor) -> Tensor:
    return coefficient * torch.exp(logprobs - logprobs.detach())


def by_logprobs(logprobs_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
    """The contender that takes its log-probs from a function (hidden, weight, target) -> [T]."""
    return lambda inputs: ratio_loss(logprobs_of(*inputs[:3]), inputs.coefficient).sum()


@by_logprobs
def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All logits at once."""
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    return torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]


@by_logprobs
def recomputed(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """reference.py on a block of rows at a time, each computed again in the backward pass."""
    rows = max(1, BLOCK_ELEMENTS[hidden.device.type] // len(weight))
    block = lambda hidden, target: reference(hidden, weight, target, temperature=1.0)[0]
    pairs = zip(hidden.split(rows), target.split(rows), strict=True)
    return torch.cat([checkpoint(block, *pair, use_reentrant=False) for pair in pairs])


def any_loss(impl: str) -> Contender:
    """Mode A, B or D of modes.py, depending on what needs a gradient."""
    return by_logprobs(lambda *inputs: kernels.linear_logprob(*inputs, temperature=1.0, impl=impl)[0])


def folded(impl: str) -> Contender:
    """Mode C of modes.py."""

    def run(inputs: Inputs) -> Tensor:
        loss_of = lambda logprobs, entropy, rows: ratio_loss(logprobs, inputs.coefficient[rows])
        return kernels.linear_logprob_loss(*inputs[:3], loss_of, temperature=1.0, impl=impl)[0]

    return run


def trl_chunked() -> Contender:
    """What TRL's GRPO runs since 1.16."""
    importlib.import_module("trl.trainer.utils")  # its backward imports this: better missing now
    head = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    options = (1.0, 32_768, None, 1.0, ("entropy",))
    return by_logprobs(lambda hidden, weight, target: head.apply(hidden, weight, None, target, *options)[0])


def liger_scaled() -> Contender:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    head = module.LigerFusedLinearScaledCrossEntropyFunction
    return by_logprobs(lambda *inputs: -head.apply(*inputs, 1.0, -100, 1, True)[0])


def liger_grpo(length: int = 128) -> Contender:
    """Rows as sequences of 128 tokens with one advantage each: another loss, so its gradient is not compared."""
    make = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    function = make(beta=0.0, compiled=True, use_ref_model=False, loss_type="bnpo")

    def run(inputs: Inputs) -> Tensor:
        target = inputs.target.view(-1, length)
        hidden = inputs.hidden.view(*target.shape, -1)
        return function(hidden, inputs.weight, target, torch.ones_like(target), inputs.coefficient[::length])[0]

    return run


def apple_cce() -> Contender:
    head = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return by_logprobs(lambda *inputs: -head(*inputs, reduction="none"))


PEERS = {  # name: (how to make it, whether it needs CUDA, jobs)
    "torch.compile": (lambda: torch.compile(eager), True, ("training",)),
    "TRL chunked log-prob": (trl_chunked, False, tuple(MATMULS)),
    "Liger scaled CE": (liger_scaled, True, tuple(MATMULS)),
    "Liger fused GRPO": (liger_grpo, True, ("training",)),
    "Apple CCE": (apple_cce, True, tuple(MATMULS)),
}


def contenders(device: torch.device) -> tuple[dict[str, dict[str, Contender]], dict[str, str]]:
    """Job -> name -> function; and name -> why it was left out."""
    jobs = {job: {"eager": eager, "recomputed": recomputed} for job in MATMULS}
    for impl in ("torch", "triton") if device.type == "cuda" else ("torch",):
        jobs["values"][f"A {impl}"] = jobs["frozen head"][f"B {impl}"] = jobs["training"][f"D {impl}"] = any_loss(impl)
        jobs["frozen head"][f"C {impl}"] = jobs["training"][f"C {impl}"] = folded(impl)
    skipped = {}
    for name, (make, needs_cuda, own_jobs) in PEERS.items():
        if needs_cuda and device.type != "cuda":
            skipped[name] = "needs CUDA"
            continue
        try:
            function = make()
        except ImportError as error:
            skipped[name] = str(error)
        else:
            jobs |= {job: jobs[job] | {name: function} for job in own_jobs}
    return jobs, skipped


def make_inputs(rows: int, width: int, vocabulary: int, job: str, device: torch.device) -> Inputs:
    here = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(rows, width, **here).to(dtype)
    weight = (torch.randn(vocabulary, width, **here) * 3 / width**0.5).to(dtype)
    target = torch.randint(0, vocabulary, (rows,), **here)
    coefficient = torch.randn(rows, **here) / rows
    return Inputs(hidden.requires_grad_(job != "values"), weight.requires_grad_(job == "training"), target, coefficient)


def run_once(function: Contender, inputs: Inputs) -> Tensor | None:
    """Forward and, where anything needs a gradient, backward. Returns the hidden states' gradient."""
    inputs.hidden.grad = inputs.weight.grad = None
    with torch.set_grad_enabled(inputs.hidden.requires_grad):
        loss = function(inputs)
    if loss.requires_grad:
        loss.backward()
    return inputs.hidden.grad


def exact_gradient(inputs: Inputs, rows: int = 64) -> Tensor:
    """The hidden states' gradient, from all logits in fp32, or in fp64 if the weight is small enough to be copied."""
    dtype = torch.float64 if inputs.weight.numel() <= 2**25 and not inputs.hidden.is_cuda else torch.float32
    hidden = inputs.hidden.detach()[:rows].to(dtype).requires_grad_()
    few = Inputs(hidden, inputs.weight.detach().to(dtype), inputs.target[:rows], inputs.coefficient[:rows].to(dtype))
    return torch.autograd.grad(eager(few), hidden)[0]


def measure(
    job: str, functions: dict[str, Contender], shape: tuple[int, int, int], repeats: int, device: torch.device
) -> list[dict[str, object]]:
    """A row for every contender of one job at one shape.

    limit_fraction: on CUDA, time of the matmuls alone / time taken.  gradient_error: ||found - exact|| / ||exact|| over
    64 rows of the hidden states' gradient.
    """
    rows, width, vocabulary = shape
    inputs = make_inputs(*shape, job, device)
    exact = exact_gradient(inputs) if job != "values" else None
    peaks, errors = {}, {}
    for name, function in functions.items():  # also warms up
        try:
            inputs.hidden.grad = inputs.weight.grad = None
            peaks[name] = peak_mib(partial(run_once, function, inputs), device)
        except (RuntimeError, ImportError, TypeError, ValueError) as error:
            if name not in PEERS:
                raise
            print(f"without {name}: {error}")  # a peer that does not run here must not cost our own numbers
            continue
        if exact is not None and name != "Liger fused GRPO":
            found = inputs.hidden.grad[: len(exact)].to(exact.dtype)
            errors[name] = ((found - exact).norm() / exact.norm()).item()
    calls = {name: partial(run_once, functions[name], inputs) for name in peaks}
    limit_ms = 1e3 * MATMULS[job] * 2 * rows * width * vocabulary / SUSTAINED_FLOPS
    results = []
    for name, milliseconds in alternate(calls, device, repeats, in_graph=False).items():
        median = statistics.median(milliseconds)
        result = {"rows": rows, "width": width, "vocabulary": vocabulary, "job": job, "contender": name}
        result |= {"milliseconds": milliseconds, "median_ms": median, "peak_mib": peaks[name]}
        result |= {"limit_fraction": limit_ms / median if device.type == "cuda" else None}
        results.append(result | {"gradient_error": errors.get(name)})
    return results


def show(results: list[dict]) -> None:
    """The table of one job at one shape."""
    first = results[0]
    print(f"\n{first['job']}: T={first['rows']:,} D={first['width']:,} V={first['vocabulary']:,}")
    print(f"{'':<24}{'median ms':>10}{'min':>10}{'max':>10}{'peak MiB':>10}{'of limit':>10}{'gradient error':>16}")
    for row in results:
        limit = "" if row["limit_fraction"] is None else f"{row['limit_fraction']:.0%}"
        error = "" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"
        times = (row["median_ms"], min(row["milliseconds"]), max(row["milliseconds"]))
        cells = [f"{row['contender']:<24}", *(f"{time:>10.1f}" for time in times), f"{row['peak_mib']:>10.0f}"]
        print("".join(cells) + f"{limit:>10}{error:>16}")


def main() -> None:
    """Measure every job and shape that is asked for, and after each print a JSON line of all so far."""
    parser = bench_parser(__doc__, repeats=5)
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("T", "D", "V"))
    parser.add_argument("--job", choices=MATMULS, nargs="+", default=list(MATMULS))
    options = parser.parse_args()
    device = options.device
    if device.type == "cpu":
        torch.set_num_threads(1)
    jobs, skipped = contenders(device)
    for name, reason in skipped.items():
        print(f"without {name}: {reason}")
    facts, results = hardware(device) | {"versions": versions(PACKAGES), "skipped": skipped}, []
    for shape in options.shape or SHAPES[device.type]:
        for job in options.job:
            found = measure(job, jobs[job], tuple(shape), options.repeats, device)
            show(found)
            results += found
            print(json.dumps(facts | {"results": results}), flush=True)


if __name__ == "__main__":
    main()
