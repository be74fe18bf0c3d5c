"""Tokens per second of a rollout, beside transformers' own: python -m benchmarks.rollout

The same random weights, prompts and numbers of new tokens for all; pure sampling (temperature 1, no truncation), no
end-of-sequence token. `generate` gets num_return_sequences, and so does `generate_batch` (continuous batching), which
then prefills a prompt once. Only the rollout returns log-probs. Contenders take turns within every repeat; speed-ups
are medians over the repeats. Seconds are process time on CPU (one thread), elapsed time on CUDA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, Qwen2Config
from transformers.utils import logging as transformers_logging

from benchmarks.common import default_device, measured_on
from grpo.config import RolloutConfig
from grpo.distributed import make_deterministic
from grpo.records import Problem
from grpo.rollout import Sampler
from kernels.measure import device_name, peak_mib

MIB = 2**20
PAGE = 256  # tokens in a cache block of continuous batching
# What a decode step can reach: bytes/s of device memory, and 60 % of the dense bf16 matmul peak, FLOP/s.
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}
MATMUL = 0.6 * 989e12


@dataclass(frozen=True)
class Workload:
    """A model shape and what it is asked for."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool
    prompts: int
    group_size: int
    prompt_tokens: int = 700
    new_tokens: int = 256
    has_peers: bool = True  # transformers' own are measured, too


WORKLOADS = {
    "tiny": Workload("tiny", 64, 128, 2, 4, 2, 512, True, prompts=2, group_size=2, prompt_tokens=9, new_tokens=6),
    "27M": Workload("27M", 512, 1408, 8, 8, 2, 8192, True, prompts=4, group_size=8, new_tokens=128),
    "0.5B": Workload("Qwen2.5-0.5B shape", 896, 4864, 24, 14, 2, 151_936, True, prompts=32, group_size=8),
    "7B": Workload("Qwen2.5-7B shape", 3584, 18944, 28, 28, 4, 152_064, False, 32, 8, has_peers=False),
}
DEFAULT = {"cpu": ["27M"], "cuda": ["0.5B", "7B"]}


class NoText:
    """A tokenizer for a model without words: its end-of-sequence token is never drawn."""

    eos_token_id = -1
    all_special_ids = all_special_tokens = ()
    added_tokens_decoder = {}

    def batch_decode(self, sequences: list[list[int]], **options: object) -> list[str]:
        return [""] * len(sequences)


def build_model(work: Workload, device: torch.device) -> PreTrainedModel:
    """Random weights in that shape; bf16 on CUDA, fp32 on CPU."""
    config = Qwen2Config(
        hidden_size=work.hidden_size,
        intermediate_size=work.intermediate_size,
        num_hidden_layers=work.num_layers,
        num_attention_heads=work.num_heads,
        num_key_value_heads=work.num_kv_heads,
        vocab_size=work.vocab_size,
        tie_word_embeddings=work.tied,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    return model


def contenders(
    model: PreTrainedModel, work: Workload, sampler: Sampler, *, has_peers: bool
) -> dict[str, Callable[[int], int]]:
    """Name -> function that makes the rollout of a number and returns how many tokens it sampled."""
    prompts = torch.randint(work.vocab_size, (work.prompts, work.prompt_tokens), generator=torch.Generator()).tolist()
    problems = [Problem(str(i), "", "", index=i, prompt_ids=tuple(ids)) for i, ids in enumerate(prompts)]
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=work.new_tokens,
        num_return_sequences=work.group_size,
        eos_token_id=None,
        pad_token_id=0,
    )

    def rollout(number: int) -> int:
        groups = sampler.generate(problems, number)
        return sum(len(completion.ids) for group in groups for completion in group.completions)

    def generate(number: int) -> int:
        ids = torch.tensor(prompts, device=model.device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return output[:, work.prompt_tokens :].numel()

    # Told how much memory it needs: by default it takes, and clears, most of it in every call.
    rows, length = work.prompts * work.group_size, work.prompt_tokens + work.new_tokens
    sizes = ContinuousBatchingConfig(num_blocks=rows * -(-length // PAGE), max_batch_tokens=8192)

    def continuous_batching(number: int) -> int:
        results = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=sizes)
        count = sum(len(result.generated_tokens) for result in results.values())
        return count * (rows // len(results))  # transformers 5.17 waits for all and returns the first of each prompt

    peers = {"generate": generate, "continuous_batching": continuous_batching} if has_peers else {}
    return {"rollout": rollout, **peers}


def seconds_of(run: Callable[[int], int], number: int, device: torch.device, expected: int) -> float:
    """Seconds of one rollout; RuntimeError if it sampled another number of tokens than expected."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started = clock()
    count = run(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - started
    if count != expected:
        raise RuntimeError(f"sampled {count} tokens, not {expected}: the comparison would not be fair")
    return seconds


def roofline(model: PreTrainedModel, work: Workload, bandwidth: float) -> float:
    """Tokens/s of a decode step that reads weights, keys and values once, and writes logits once and reads them twice.

    Reading weights overlaps with the matmuls that use them; half of the new tokens are stored on average.
    """
    rows, size = work.prompts * work.group_size, 2
    used = sum(parameter.numel() for parameter in model.parameters())
    used -= 0 if work.tied else work.vocab_size * work.hidden_size  # of the embedding only a few rows are read
    head_dim = work.hidden_size // work.num_heads
    kv_bytes = 2 * work.num_layers * work.num_kv_heads * head_dim * size
    stored = work.prompts * work.prompt_tokens + rows * work.new_tokens / 2
    matmuls = max(used * size / bandwidth, 2 * used * rows / MATMUL)
    return rows / (matmuls + (stored * kv_bytes + 3 * rows * work.vocab_size * size) / bandwidth)


def make_sampler(model: PreTrainedModel, work: Workload, *, cuda_graph: bool = True, compile: bool = False) -> Sampler:
    """Ours, which decodes all rows together."""
    limits = {"max_sequences": work.prompts * work.group_size, "prefill_tokens": 16384, "cuda_graph": cuda_graph}
    rollout = RolloutConfig(group_size=work.group_size, max_new_tokens=work.new_tokens, **limits)
    return Sampler(model, NoText(), rollout, stop=(), seed=0, compile=compile)


def measure(
    work: Workload, device: torch.device, repeats: int, options: dict[str, bool], *, is_alone: bool
) -> dict[str, object]:
    """Every figure of one workload."""
    model = build_model(work, device)
    total = work.prompts * work.group_size * work.new_tokens
    sampler = make_sampler(model, work, **options)
    runs = contenders(model, work, sampler, has_peers=work.has_peers and not is_alone)
    peak = peak_mib(lambda: runs["rollout"](0), device)  # also its warm-up
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in list(runs)[1:]:
        try:
            seconds_of(runs[name], 0, device, total)  # warms up
        except Exception as error:  # a peer that does not run here must not cost our own numbers
            print(f"without {name}: {type(error).__name__}: {error}", flush=True)
            del runs[name], times[name]
    for number in range(1, repeats + 1):
        for name, run in runs.items():
            times[name].append(seconds_of(run, number, device, total))
            print(f"  {name} {number}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    median = {name: statistics.median(values) for name, values in times.items()}
    speedups = {
        f"speedup_vs_{name}": statistics.median(o / r for o, r in zip(times[name], times["rollout"], strict=True))
        for name in list(runs)[1:]
    }
    figures = {"tokens_per_second": total / median["rollout"], **speedups}
    figures |= {"peak_mib": peak, "planned_mib": sampler.planned_bytes() / MIB, "seconds": times}
    bandwidth = next((value for name, value in BANDWIDTH.items() if name in device_name(device)), None)
    if bandwidth:
        figures["roofline_tokens_per_second"] = roofline(model, work, bandwidth)
        figures["roofline_share"] = figures["tokens_per_second"] / figures["roofline_tokens_per_second"]
    return {"workload": asdict(work), "parameters": sum(p.numel() for p in model.parameters()), **options, **figures}


def table(result: dict) -> str:
    """The raw times and what follows from them."""
    work, times = result["workload"], result["seconds"]
    total = work["prompts"] * work["group_size"] * work["new_tokens"]
    lines = [
        f"{work['name']}, {result['parameters'] / 1e6:.1f}M parameters: {work['prompts']} prompts x "
        f"{work['group_size']}, {work['prompt_tokens']} + {work['new_tokens']} tokens",
        f"  {'':<22}{'median s':>10}{'min s':>10}{'max s':>10}{'tokens/s':>12}{'rollout is':>12}",
    ]
    for name, values in times.items():
        speedup = f"{result[f'speedup_vs_{name}']:.2f}x" if f"speedup_vs_{name}" in result else ""
        median = statistics.median(values)
        lines.append(
            f"  {name:<22}{median:>10.2f}{min(values):>10.2f}{max(values):>10.2f}{total / median:>12,.0f}{speedup:>12}"
        )
    lines.append(
        f"  memory of the rollout: {result['peak_mib']:.0f} MiB at most, {result['planned_mib']:.0f} planned KV"
    )
    if "roofline_share" in result:
        share, roof = result["roofline_share"], result["roofline_tokens_per_second"]
        lines.append(f"  roofline of decoding: {roof:,.0f} tokens/s, of which {share:.0%} (prefill included)")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="alternating rounds (default: 5)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="decode with compiled layers")
    parser.add_argument("--no-cuda-graph", action="store_true", help="decode eagerly on CUDA too")
    parser.add_argument("--deterministic", action="store_true", help="as with `deterministic: true` in a config")
    parser.add_argument("--alone", action="store_true", help="without the transformers baselines")
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", help="default: those of the device")
    chosen = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    if chosen.deterministic:
        make_deterministic()
    device = default_device()
    torch.set_num_threads(1)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length: in `generate`, at every token
    options = {"cuda_graph": not chosen.no_cuda_graph, "compile": chosen.compile}
    results = []
    for name in chosen.workload or DEFAULT[device.type]:
        results.append(measure(WORKLOADS[name], device, chosen.repeats, options, is_alone=chosen.alone))
        print(table(results[-1]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    keys = ("tokens_per_second", "speedup_vs_generate", "speedup_vs_continuous_batching", "peak_mib", "planned_mib")
    record = {key: results[0][key] for key in keys if key in results[0]}
    record |= {"workloads": results, "repeats": chosen.repeats, "deterministic": chosen.deterministic}
    print(json.dumps(record | measured_on(device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
