"""Where the time goes, kernel by kernel, and how fast the device is: python -m benchmarks.hot_spots

Three jobs under torch's profiler: one micro-batch of benchmarks.training_pass with plain layers (forward, folded head,
backward), the same without the head, and one rollout of benchmarks.rollout alone. Before them the two ceilings of the
device, to compare every figure with: a large copy (bytes read and written) and a large bf16 matmul of random numbers.
The last line is JSON. On CPU it shows torch's operators.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import rollout, training_pass
from benchmarks.common import default_device, make_parser, measured_on
from benchmarks.train_step import make_model
from grpo.logprobs import PolicyModule
from grpo.objectives import resolve
from grpo.policy import Policy
from grpo.update import weighted_loss
from kernels.measure import seconds

SIZES = {"cpu": (2**22, 256), "cuda": (2**31, 8192)}  # elements copied; side of a matmul


def ceilings(device: torch.device) -> dict[str, float]:
    """GB/s of a copy and TFLOP/s of a matmul, the best of five."""
    count, side = SIZES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source, target = (
        torch.empty(count, dtype=dtype, device=device).normal_(),
        torch.empty(count, dtype=dtype, device=device),
    )
    copy = min(seconds(device, lambda: target.copy_(source)) for _ in range(5))
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    matmul = min(seconds(device, lambda: left @ right) for _ in range(5))
    return {"copy_gb_per_s": 2 * source.nbytes / copy / 1e9, "matmul_tflop_per_s": 2 * side**3 / matmul / 1e12}


def jobs(device: torch.device, is_tiny: bool) -> dict[str, Callable[[], object]]:
    """What is profiled."""
    policy = Policy(make_model(device, torch.float32), None, "bf16" if device.type == "cuda" else "fp32")
    module = PolicyModule(policy, temperature=1.0, impl="auto")
    batch = training_pass.make_batch(device, policy.model.config.vocab_size, "tiny" if is_tiny else device.type)
    micro_batch = batch.micro_batches[0]
    loss_of = weighted_loss(resolve("dr_grpo"), micro_batch)
    work = rollout.WORKLOADS["tiny" if is_tiny else rollout.DEFAULT[device.type][0]]
    model = rollout.build_model(work, device)
    sampler = rollout.make_sampler(model, work)
    draw = rollout.contenders(model, work, sampler, has_peers=False)["rollout"]
    return {
        "micro-batch": lambda: module(micro_batch, loss_of)[0].backward(),
        "its layers": training_pass.layers_only(module, micro_batch),
        "rollout": lambda: draw(1),
    }


def hottest(work: Callable[[], object], device: torch.device, count: int) -> dict[str, object]:
    """Seconds without the profiler, then the kernels (CPU: operators) that take most: name, calls, milliseconds."""
    work()  # warms up
    alone = seconds(device, work)
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        seconds(device, work)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    on_device = [e for e in found.key_averages() if device.type in e.device_type.name.lower()]  # not their launches
    events = sorted(on_device, key=lambda event: -getattr(event, key))
    busy = sum(getattr(event, key) for event in events) / 1e3
    kernels = [{"name": e.key, "calls": e.count, "ms": getattr(e, key) / 1e3} for e in events[:count]]
    return {"seconds": alone, "busy_ms": busy, "launches": sum(event.count for event in events), "kernels": kernels}


def show(name: str, result: dict) -> None:
    print(
        f"\n{name}: {1e3 * result['seconds']:.1f} ms; the device is busy for {result['busy_ms']:.1f} ms under the "
        f"profiler, {result['launches']:,} launches"
    )
    for row in result["kernels"]:
        print(f"{row['ms']:>10.2f} ms {row['ms'] / result['busy_ms']:>5.0%} {row['calls']:>7}x  {row['name'][:80]}")


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--count", type=int, default=12, help="kernels to show per job")
    parser.add_argument("--tiny", action="store_true", help="small, to check that it runs")
    arguments = parser.parse_args()
    device = default_device()
    measured = ceilings(device)
    print(", ".join(f"{name.replace('_', ' ')} {value:,.0f}" for name, value in measured.items()))
    results = {}
    for name, work in jobs(device, arguments.tiny).items():
        results[name] = hottest(work, device, arguments.count)
        show(name, results[name])
    print(json.dumps({"ceilings": measured, "jobs": results} | measured_on(device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
