"""Forward and backward of the training pass, layout against layout: python -m benchmarks.train_step

One group of one optimizer step, a random Qwen2, the policy-gradient loss. Times are medians over alternating rounds in
one process; peak memory is the rise over the idle model, on CPU each layout in a process of its own. The last line is
one JSON object.

    padded        a row per completion, 2-D attention mask, logits of all completion positions: transformers' own way
    padded+head   our padded layout with our log-prob head: what is left is padding and the repeated prompt
    full rows     no padding: prompt and completion of every sequence in one row, each attending to itself
    shared        grpo's packed layout: the prompt once
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import QWEN_HALF_B, default_device, make_parser, measured_on, qwen_shape
from grpo.batch import lay_out, packed_row, padded_rows
from grpo.logprobs import LogprobModel
from grpo.records import Completion, Group, MicroBatch, Problem
from kernels.measure import peak_mib, resident_mib, seconds

SHAPES = {"cpu": qwen_shape(4, 384, 1024, 6, 8192), "cuda": QWEN_HALF_B}


def make_model(device: torch.device, dtype: torch.dtype | None = None) -> Qwen2ForCausalLM:
    """A random Qwen2: small in fp32 on CPU; on CUDA the shape of Qwen2.5-0.5B, in bf16 unless `dtype` is given."""
    torch.manual_seed(0)
    config = Qwen2Config(
        max_position_embeddings=4096,
        initializer_range=0.06 if device.type == "cpu" else 0.02,
        attn_implementation="sdpa",
        **SHAPES[device.type],
    )
    with device:
        model = Qwen2ForCausalLM(config).train()
    if device.type == "cuda" and dtype is None:
        for parameter in model.parameters():  # not model.to: the rotary frequencies stay fp32
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def make_group(
    prompt: int, group_size: int, vocabulary: int, shortest: int = 100, longest: int = 300, seed: int = 1
) -> Group:
    """Random ids; completion lengths uniform between `shortest` and `longest`."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda length: torch.randint(5, vocabulary, (length,), generator=generator).tolist()
    lengths = torch.randint(shortest, longest + 1, (group_size,), generator=generator).tolist()
    completions = [Completion(draw(length), [-1.0] * length, "", "eos", i) for i, length in enumerate(lengths)]
    return Group(Problem(id="", question="", answer="", prompt_ids=tuple(draw(prompt))), completions, step=0)


def full_rows(group: Group, device: torch.device) -> MicroBatch:
    """Prompt and completion of every sequence one after the other; nothing is shared, nothing padded."""
    members = range(len(group.completions))
    rows = [packed_row([group], [(0, s)], torch.device("cpu")) for s in members]
    ends = torch.tensor([0, *(row.input_ids.numel() for row in rows)]).cumsum(0).tolist()
    layout = lay_out([(slice(start, end), []) for start, end in zip(ends, ends[1:], strict=False)])
    whole = packed_row([group], [(0, s) for s in members], torch.device("cpu"))
    return replace(
        whole,
        input_ids=torch.cat([row.input_ids for row in rows], 1),
        position_ids=layout.position[None],
        source=torch.cat([row.source + start for row, start in zip(rows, ends, strict=False)]),
        shared_prefix=layout,
    ).to(device)


def make_variants(model: Qwen2ForCausalLM, group: Group, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Layout -> a function that returns the log-probs [T] of the same completion tokens in the same order."""
    members = [(0, s) for s in range(len(group.completions))]
    ours = LogprobModel(model, temperature=1.0, impl="auto")
    rows, packed = padded_rows([group], members, device), packed_row([group], members, device)
    full = full_rows(group, device)

    def transformers_way() -> Tensor:
        prompt = len(group.prompt_ids)
        lengths = torch.tensor([len(completion.ids) for completion in group.completions], device=device)
        columns = torch.arange(rows.input_ids.shape[1], device=device)
        mask = (columns < prompt - 1 + lengths[:, None]).long()
        keep = int(lengths.max())
        logits = model(rows.input_ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits.float()
        is_token = torch.arange(keep, device=device) < lengths[:, None]
        target = torch.zeros(is_token.shape, dtype=torch.int64, device=device)
        target[is_token] = rows.tokens.target
        chosen = logits.gather(-1, target[..., None])[..., 0]
        # a row at a time, as peers do: a whole log-softmax would be one more [G, R, V]
        normaliser = torch.stack([torch.logsumexp(row, -1) for row in logits])
        return (chosen - normaliser)[is_token]

    return {
        "padded": transformers_way,
        "padded+head": lambda: ours(rows)[0],
        "full rows": lambda: ours(full)[0],
        "shared": lambda: ours(packed)[0],
    }


def forward_backward(model: Qwen2ForCausalLM, logprobs_of: Callable[[], Tensor]) -> Tensor:
    """Gradients of the mean over tokens of -A exp(logprob - old), with A alternating in sign; returns the log-probs."""
    model.zero_grad(set_to_none=True)
    logprobs = logprobs_of()
    advantages = torch.where(torch.arange(len(logprobs), device=logprobs.device) % 2 == 0, 1.0, -0.5)
    (-advantages * torch.exp(logprobs - logprobs.detach())).mean().backward()
    return logprobs.detach()


def gradient(model: Qwen2ForCausalLM) -> Tensor:
    return torch.cat([parameter.grad.flatten().float().cpu() for parameter in model.parameters()])


def measure_peak(name: str, arguments: argparse.Namespace, device: torch.device) -> float:
    """MiB by which one forward and backward pass rises over the idle model; on CPU in this fresh process."""
    model = make_model(device)
    vocabulary = model.config.vocab_size
    small = make_variants(model, make_group(8, 2, vocabulary, 4, 8), device)
    forward_backward(model, small[name])  # libraries load their own memory the first time
    model.zero_grad(set_to_none=True)
    variants = make_variants(model, make_group(arguments.prompt, arguments.group, vocabulary), device)
    if device.type == "cuda":
        return peak_mib(lambda: forward_backward(model, variants[name]), device)
    before = resident_mib("VmRSS")
    forward_backward(model, variants[name])
    return resident_mib("VmHWM") - before


def peak_in_a_fresh_process(name: str, arguments: argparse.Namespace, device: torch.device) -> float:
    command = [sys.executable, "-m", "benchmarks.train_step", "--peak-of", name]
    command += ["--prompt", str(arguments.prompt), "--group", str(arguments.group)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Times, peaks and differences of every layout."""
    peak_of = measure_peak if device.type == "cuda" else peak_in_a_fresh_process
    model = make_model(device)
    group = make_group(arguments.prompt, arguments.group, model.config.vocab_size)
    variants = make_variants(model, group, device)
    found = {name: (forward_backward(model, work), gradient(model)) for name, work in variants.items()}  # and warm-up
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, work in variants.items():
            times[name].append(seconds(device, lambda work=work: forward_backward(model, work)))
    expected_logprobs, expected_gradient = found["padded"]
    logprobs, grad = found["shared"]
    return {
        "seconds": times,
        "peak_mib": {name: round(peak_of(name, arguments, device), 1) for name in variants},
        "logprob_max_diff": (logprobs - expected_logprobs).abs().max().item(),
        "grad_rel_diff": ((grad - expected_gradient).norm() / expected_gradient.norm()).item(),
        "completion_tokens": len(logprobs),
    }


def report(arguments: argparse.Namespace, device: torch.device, result: dict) -> None:
    """The table, then the JSON line."""
    median = {name: statistics.median(runs) for name, runs in result["seconds"].items()}
    peak = result["peak_mib"]
    print(f"P={arguments.prompt} G={arguments.group} {device.type}, forward + backward, medians of {arguments.rounds}")
    print(f"{'layout':<14}{'seconds':>10}{'fastest':>10}{'slowest':>10}{'peak MiB':>10}{'time / shared':>15}")
    for name, runs in result["seconds"].items():
        ratio = median[name] / median["shared"]
        print(f"{name:<14}{median[name]:>10.3f}{min(runs):>10.3f}{max(runs):>10.3f}{peak[name]:>10.0f}{ratio:>15.2f}")
    differences = (result["logprob_max_diff"], result["grad_rel_diff"])
    print(
        "shared against padded: log-probs within {:.1e} nats, gradient within {:.1e} of its norm".format(*differences)
    )
    summary = {
        "speedup_vs_padded": median["padded"] / median["shared"],
        "speedup_vs_padded_same_head": median["padded+head"] / median["shared"],
        "speedup_vs_packed": median["full rows"] / median["shared"],
        "peak_vs_padded": peak["shared"] / peak["padded"],
        "peak_vs_packed": peak["shared"] / peak["full rows"],
        "median_seconds": median,
        "prompt_tokens": arguments.prompt,
        "group_size": arguments.group,
    }
    print(json.dumps(summary | measured_on(device) | result))


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--prompt", type=int, default=800, help="prompt tokens")
    parser.add_argument("--group", type=int, default=8, help="completions of the prompt")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds, for medians")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = default_device()
    if arguments.peak_of:
        print(measure_peak(arguments.peak_of, arguments, device))
    else:
        report(arguments, device, measure(arguments, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
