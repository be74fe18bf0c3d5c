"""One whole training pass, part by part: python -m benchmarks.training_pass

Every micro-batch of one optimizer step (CUDA: the shape of Qwen2.5-0.5B in bf16, 64 prompts x 16; CPU: a small one):
forward through the layers, the folded log-prob head, backward, AdamW on the fp32 masters. Layers plain and compiled
take turns. The parts are timed alone: what the layers cost without the head, and the head without the layers. MFU
counts 6 flops a weight and row for the layers, 6 D V a completion token for the head, and the attention that is needed
(a token sees its prompt and its own completion), against the dense bf16 peak; none is given on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.common import default_device, make_parser, measured_on
from benchmarks.train_step import make_group, make_model
from grpo.batch import pack, weigh
from grpo.config import OptimConfig
from grpo.distributed import World, make_deterministic
from grpo.logprobs import PolicyModule
from grpo.objectives import resolve
from grpo.policy import Policy
from grpo.records import Batch, MicroBatch
from grpo.update import Updater, make_optimizer, update_policy
from kernels.measure import seconds

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # dense bf16, SXM
WORKLOADS = {  # prompts, group size, prompt tokens, shortest and longest completion, tokens of a micro-batch
    "tiny": (2, 4, 12, 4, 9, 64),
    "cpu": (4, 8, 200, 20, 60, 2048),
    "cuda": (64, 16, 700, 100, 200, 16_384),
}
ARRANGEMENTS = {"plain": False, "compiled": True}


def make_batch(device: torch.device, vocabulary: int, workload: str) -> Batch:
    """Random groups, packed and weighed; advantages alternate in sign."""
    prompts, size, prompt, shortest, longest, budget = WORKLOADS[workload]
    groups = [make_group(prompt, size, vocabulary, shortest, longest, seed=seed) for seed in range(prompts)]
    alone = {"max_over_ranks": lambda values: values, "device": device}
    batch = pack(groups, minibatches=1, passes=1, tokens_per_micro_batch=budget, **alone)
    advantages = torch.tensor([1.0, -0.5]).repeat(size // 2).expand(prompts, size)
    counted = torch.ones(prompts, size, dtype=torch.bool)
    sums = {"aggregation": "sequence_mean", "max_new_tokens": longest, "sum_over_ranks": lambda values: values}
    weigh(batch, advantages, counted, **sums)
    return batch


def flops(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Flops of forward and backward, for the layers with their attention and for the head."""
    config = model.config
    weights = sum(weight.numel() for weight in model.base_model.layers.parameters() if weight.dim() == 2)
    rows = sum(micro_batch.input_ids.numel() for micro_batch in batch.micro_batches)
    seen = 0  # pairs of query and key
    for micro_batch in batch.micro_batches:
        for prompt, completions in micro_batch.shared_prefix.groups:
            lengths = torch.tensor([span.stop - span.start for span in completions], dtype=torch.float64)
            prefix = prompt.stop - prompt.start
            seen += prefix * (prefix + 1) / 2 + float((lengths * prefix + lengths * (lengths + 1) / 2).sum())
    attention = 3 * 4 * seen * config.num_hidden_layers * config.hidden_size
    tokens = sum(len(micro_batch.source) for micro_batch in batch.micro_batches)
    head = 6.0 * tokens * config.hidden_size * config.vocab_size
    return {"layers": 6.0 * weights * rows + attention, "head": head}


def layers_only(module: PolicyModule, micro_batch: MicroBatch) -> Callable[[], None]:
    """Forward and backward up to the hidden states of completion tokens."""

    def run() -> None:
        with module._weights_for_this_pass():
            hidden = module.compute._hidden(micro_batch).flatten(0, 1)[micro_batch.source]
            hidden.backward(torch.ones_like(hidden))

    return run


def head_only(module: PolicyModule, micro_batch: MicroBatch, hidden: Tensor) -> Callable[[], None]:
    """The folded head with its gradients, given hidden states [T, D]."""

    def run() -> None:
        leaf = hidden.detach().requires_grad_()
        with module._weights_for_this_pass():
            loss_of = lambda logprobs, entropy, rows: -micro_batch.tokens.weight[rows] * logprobs
            module.compute.folded_loss(leaf, micro_batch.tokens, loss_of)[0].backward()

    return run


def measure(device: torch.device, arguments: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, object]]:
    """Seconds of every contender by repeat, and the facts to report beside them."""
    precision = "bf16" if device.type == "cuda" else "fp32"
    policy = Policy(make_model(device, torch.float32), None, precision)
    policy.model.train()
    batch = make_batch(device, policy.model.config.vocab_size, arguments.workload or device.type)
    optimizer = make_optimizer(list(policy.masters.parameters()), OptimConfig(lr=1e-6))
    world, objective = World(0, 1, device), resolve("dr_grpo")
    work: dict[str, Callable[[], object]] = {}
    for name in arguments.arrangement:
        module = PolicyModule(policy, temperature=1.0, impl="auto", compile=ARRANGEMENTS[name])
        updater = Updater(module, optimizer, objective, world, 1.0, policy.refresh)
        work[f"step, layers {name}"] = lambda updater=updater: update_policy(updater, batch, step=1, lr=1e-6)
        parts = [layers_only(module, micro_batch) for micro_batch in batch.micro_batches]
        work[f"layers {name}"] = lambda parts=parts: [part() for part in parts]
    width, dtype = policy.model.config.hidden_size, policy.model.dtype
    heads = [
        head_only(module, m, torch.randn(len(m.source), width, device=device).to(dtype)) for m in batch.micro_batches
    ]
    work["head"] = lambda: [head() for head in heads]
    failures = {}
    for name, run in list(work.items()):
        try:
            run()  # warms up, and compiles
        except Exception as error:  # of many kinds; the other arrangement is measured all the same
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}"[:500]
            del work[name]
    graphs = counters["stats"]["unique_graphs"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(arguments.repeats):
        for name, run in work.items():
            taken[name].append(seconds(device, run))
    facts = {"deterministic": arguments.deterministic, "workload": arguments.workload or device.type}
    facts["failures"] = failures
    facts |= {"flops": flops(policy.model, batch), "micro_batches": len(batch.micro_batches), "graphs": graphs}
    facts["recompiled_while_timed"] = counters["stats"]["unique_graphs"] - graphs
    facts["completion_tokens"] = sum(len(micro_batch.source) for micro_batch in batch.micro_batches)
    facts["rows"] = sum(micro_batch.input_ids.numel() for micro_batch in batch.micro_batches)
    if device.type == "cuda":
        facts["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return taken, facts


def report(device: torch.device, taken: dict[str, list[float]], facts: dict[str, object]) -> None:
    """The table, then the JSON line."""
    where, needed = measured_on(device), facts["flops"]
    peak = next((value for name, value in PEAK_FLOPS.items() if name in where["device"]), None)
    counts = f"{facts['rows']:,} rows, {facts['completion_tokens']:,} completion tokens"
    print(f"{counts}, {facts['micro_batches']} micro-batches, {device.type}")
    print(f"{'part':<22}{'median s':>10}{'min':>10}{'max':>10}{'TFLOP':>10}{'MFU':>8}")
    summary = {}
    for name, values in taken.items():
        median = statistics.median(values)
        count = sum(needed.values()) if name.startswith("step") else needed[name.split()[0]]
        mfu = count / median / peak if peak else None
        summary[name] = {"seconds": values, "median": median, "flops": count, "mfu": mfu}
        shown = f"{mfu:.0%}" if mfu else "-"
        print(f"{name:<22}{median:>10.3f}{min(values):>10.3f}{max(values):>10.3f}{count / 1e12:>10.2f}{shown:>8}")
    print(f"graphs compiled: {facts['graphs']}, while timed: {facts['recompiled_while_timed']}")
    print(json.dumps(summary | facts | where))


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="alternating rounds, for medians")
    parser.add_argument("--arrangement", choices=ARRANGEMENTS, nargs="+", default=list(ARRANGEMENTS))
    parser.add_argument("--deterministic", action="store_true", help="as with `deterministic: true` in a config")
    parser.add_argument("--workload", choices=WORKLOADS, help="default: that of the device")
    arguments = parser.parse_args()
    if arguments.deterministic:
        make_deterministic()
    device = default_device()
    taken, facts = measure(device, arguments)
    report(device, taken, facts)
    return int(bool(facts["failures"]))


if __name__ == "__main__":
    sys.exit(main())
