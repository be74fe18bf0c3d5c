"""An optimizer step and the refresh of the bf16 working copy, by strategy: python -m benchmarks.sharding

A random Qwen2 under `ddp`, under torch's ZeroRedundancyOptimizer and under `zero1`, by turns, over two gloo ranks of
one thread each, or over the ranks of torchrun: torchrun --nproc_per_node=8 -m benchmarks.sharding. Gradients are made
up: their reduction is the same in all three. Seconds of rank 0 behind a barrier; the last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import make_parser, measured_on
from grpo import distributed
from grpo.config import OptimConfig
from grpo.distributed import World
from grpo.logprobs import PolicyModule
from grpo.policy import Policy
from grpo.sharding import distribute
from grpo.update import make_optimizer
from kernels.measure import seconds

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "benchmarks.sharding"]
ADAMW = OptimConfig(lr=1e-6)
STRATEGIES = ("ddp", "zero1")
PARTS = ("optimizer", "refresh")


class Trainee:
    """A policy under one strategy, with gradients."""

    def __init__(self, strategy: str, width: int, world: World):
        torch.manual_seed(0)
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 6, "vocab_size": 24576}
        heads = {"num_attention_heads": max(2, width // 64), "num_key_value_heads": 2, "tie_word_embeddings": True}
        self.policy = Policy(Qwen2ForCausalLM(Qwen2Config(**shape, **heads)).to(world.device), None, "bf16")
        module = PolicyModule(self.policy, temperature=1.0, impl="auto")
        self.module = distribute(module, [self.policy], world, strategy if strategy in STRATEGIES else "ddp")
        for parameter in self.policy.trained:
            parameter.grad = torch.randn(parameter.shape, device=world.device)
        if strategy in STRATEGIES:
            kept = list(self.policy.local_parameters.values())
            self.optimizer = make_optimizer(self.policy.trained, ADAMW, local_parameters=kept)
        else:
            options = {name: getattr(ADAMW, name) for name in ("lr", "betas", "eps", "weight_decay")} | {"fused": True}
            self.optimizer = ZeroRedundancyOptimizer(self.policy.trained, torch.optim.AdamW, **options)

    def seconds(self, world: World) -> list[float]:
        """The seconds of each of PARTS."""
        return [taken(work, world) for work in (self.optimizer.step, self.policy.refresh)]


def taken(work: Callable[[], object], world: World) -> float:
    world.barrier()
    return seconds(world.device, work)


def measure(trainees: dict[str, Trainee], rounds: int, world: World) -> dict[str, dict[str, list[float]]]:
    """Raw seconds by strategy and part, after two rounds of warming up."""
    found = {name: [] for name in trainees}
    for _ in range(rounds + 2):
        for name, trainee in trainees.items():
            found[name].append(trainee.seconds(world))
    return {name: dict(zip(PARTS, zip(*rows[2:], strict=True), strict=True)) for name, rows in found.items()}


def report(found: dict[str, dict[str, list[float]]], facts: dict) -> None:
    """The table, then the JSON line."""
    print(f"{facts['parameters'] / 1e6:.1f} M parameters in {facts['tensors']} tensors, {facts['ranks']} ranks")
    print(f"{'':<24}{'median s':>10}{'fastest':>10}{'slowest':>10}" + "".join(f"{part:>12}" for part in PARTS))
    medians = {}
    for name, parts in found.items():
        both = [sum(row) for row in zip(*parts.values(), strict=True)]
        medians[name] = {"both": statistics.median(both)} | {part: statistics.median(parts[part]) for part in PARTS}
        columns = "".join(f"{medians[name][part]:>12.3f}" for part in PARTS)
        print(f"{name:<24}{medians[name]['both']:>10.3f}{min(both):>10.3f}{max(both):>10.3f}{columns}")
    print(json.dumps({"median_seconds": medians, **facts, "seconds": found}))


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=384, help="of the model: 384 is 22 M parameters")
    parser.add_argument("--rounds", type=int, default=10, help="alternating rounds, for medians")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, *TORCHRUN, *sys.argv[1:]], env=environment, check=False).returncode
    world = distributed.start()
    names = ("ddp", "ZeroRedundancyOptimizer", "zero1")
    trainees = {name: Trainee(name, arguments.width, world) for name in names}
    found = measure(trainees, arguments.rounds, world)
    if world.is_writer:
        trained = trainees["ddp"].policy.trained
        facts = {"parameters": sum(parameter.numel() for parameter in trained), "tensors": len(trained)}
        report(found, facts | {"ranks": world.size} | measured_on(world.device))
    distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
