"""Which way of computing packed rows' attention is fastest on this device: python -m benchmarks.attention

Forward and backward of one layer of Qwen2.5-0.5B over a micro-batch of GSM8K, 16 completions a prompt: `gathered` and
`flex` of grpo/attention.py, and a candidate for CUDA that is not in use. `Cascade` repeats no prompt's keys: a token's
own span, its group's prompt and the beginning common to all prompts are three flash calls, merged by their
log-sum-exps, as `merged_parts` does on a CPU. It calls private operators of torch, so it would have to win clearly. All
are compared with `merged_parts` in fp32. Last line: JSON. On CPU, without flash attention over variable lengths, only
that one.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.common import default_device, make_parser, measured_on
from grpo import attention
from grpo.batch import lay_out
from grpo.records import SharedPrefix
from kernels.measure import peak_mib, seconds

HEADS, KV_HEADS, WIDTH = 14, 2, 64  # of Qwen2.5-0.5B
SHAPES = {  # common beginning, groups, rest of a prompt, completions, tokens of the longest
    "cuda": {"worked exemplars": (650, 6, 50, 16, 200), "unlike prompts": (0, 5, 700, 16, 200)},
    "cpu": {"tiny": (40, 2, 8, 3, 20)},
}
ROWS_TOGETHER = 4096  # rows to a copy of the common keys: the backward pass runs only one program per block of keys
flash_forward, flash_backward = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward


@dataclass(frozen=True)
class Part:
    """One flash call: which rows ask, which keys they see, and where each stands in the call (-1: nowhere)."""

    rows: Tensor | slice
    keys: Tensor | slice
    row_index: Tensor | None  # [L]; None: every row, in order
    key_index: Tensor | None
    copies: int  # of the keys, one after the other
    starts: tuple[Tensor, Tensor, int, int]  # as flash attention wants them
    is_causal: bool


@functools.lru_cache(maxsize=4)
def parts_of(layout: SharedPrefix) -> list[Part]:
    """Every span with itself; completions with their prompts; all later rows with the common beginning. Cached."""
    device, length, common = layout.group.device, len(layout.group), layout.common.stop
    spans = [layout.common, *(span for prompt, own in layout.groups for span in (prompt, *own))]
    own = [span.stop - span.start for span in spans if span.stop > span.start]
    found = [Part(slice(None), slice(None), None, None, 1, _starts(own, own, device), True)]
    asked = [(prompt, slice(own[0].start, own[-1].stop)) for prompt, own in layout.groups if own]
    asked = [(prompt, rows) for prompt, rows in asked if rows.stop > rows.start]
    if asked:
        sizes = [[span.stop - span.start for span in spans] for spans in zip(*asked, strict=True)]
        keys, rows = (_concatenated(spans) for spans in zip(*asked, strict=True))
        starts = _starts(sizes[1], sizes[0], device)
        indices = (_inverse(one, length).to(device) for one in (rows, keys))
        found.append(Part(rows.to(device), keys.to(device), *indices, 1, starts, False))
    if common:
        rows = torch.arange(common, length)
        sizes = [len(chunk) for chunk in rows.split(ROWS_TOGETHER)]
        indices = (_inverse(one, length).to(device) for one in (rows, torch.arange(common)))
        starts = _starts(sizes, [common] * len(sizes), device)
        found.append(Part(slice(common, None), slice(0, common), *indices, len(sizes), starts, False))
    return found


def _concatenated(spans: tuple[slice, ...]) -> Tensor:
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])


def _inverse(rows: Tensor, length: int) -> Tensor:
    index = torch.full((length,), -1)
    index[rows] = torch.arange(len(rows))
    return index


def _starts(queries: list[int], keys: list[int], device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    starts = (torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32) for sizes in (queries, keys))
    return *(one.to(device) for one in starts), max(queries), max(keys)


def merge(outputs: list[Tensor], lses: list[Tensor], indices: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Softmax over all parts from that of each. outputs: [rows, H, D]; lses: [H, rows]; the first part has all rows."""
    wide = [lses[0]] + [_spread(lse.T, index, -torch.inf).T for lse, index in zip(lses[1:], indices, strict=True)]
    total = torch.logsumexp(torch.stack(wide), 0)
    weights = [torch.exp(lse - total).T[..., None] for lse in wide]
    every = [outputs[0], *(_spread(output, index, 0.0) for output, index in zip(outputs[1:], indices, strict=True))]
    return sum(output * weight for output, weight in zip(every, weights, strict=True)).to(outputs[0].dtype), total


def add_up(first: Tensor, others: list[Tensor], indices: list[Tensor]) -> Tensor:
    """Gradients of all rows from those of the rows of each part."""
    total = first.float()
    for other, index in zip(others, indices, strict=True):
        total = total + _spread(other.float(), index, 0.0)
    return total.to(first.dtype)


def _spread(values: Tensor, index: Tensor, missing: float) -> Tensor:
    """values[index], and `missing` where it is -1."""
    is_present = (index >= 0).view(-1, *[1] * (values.dim() - 1))
    return torch.where(is_present, values[index.clamp_min(0)], missing)


class Cascade(torch.autograd.Function):
    """A key's probability is exp(score - lse) whichever part it is in: given the merged output and log-sum-exp, the
    flash backward of a part yields its exact share of the gradient."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, parts: list[Part], scale: float) -> Tensor:
        """query: [L, H, D]; key, value: [L, Hkv, D], 16 bits.  Returns [L, H, D]."""
        outputs, lses, ctx.random = [], [], []
        for part in parts:
            keys, values = (_copied(tensor[part.keys], part.copies) for tensor in (key, value))
            output, lse, *random = flash_forward(
                query[part.rows], keys, values, *part.starts, 0.0, part.is_causal, False,
                scale=scale, window_size_left=-1, window_size_right=0 if part.is_causal else -1,
            )  # fmt: skip
            outputs.append(output)
            lses.append(lse)
            ctx.random.append(random[:2])
        output, lse = fast(merge, query.device)(outputs, lses, [part.row_index for part in parts[1:]])
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.parts, ctx.scale = parts, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        shares = []
        for part, random in zip(ctx.parts, ctx.random, strict=True):
            keys, values = (_copied(tensor[part.keys], part.copies) for tensor in (key, value))
            of_query, *of_both = flash_backward(
                gradient[part.rows].contiguous(), query[part.rows], keys, values, output[part.rows].contiguous(),
                lse[:, part.rows].contiguous(), *part.starts, 0.0, part.is_causal, *random,
                scale=ctx.scale, window_size_left=-1, window_size_right=0 if part.is_causal else -1,
            )  # fmt: skip
            if part.copies > 1:
                of_both = [share.unflatten(0, (part.copies, -1)).float().sum(0).to(share.dtype) for share in of_both]
            shares.append((of_query, *of_both))
        of_rows, of_keys = [part.row_index for part in ctx.parts[1:]], [part.key_index for part in ctx.parts[1:]]
        sums = fast(add_up, query.device)
        of_query, of_key, of_value = ([share[i] for share in shares] for i in range(3))
        found = sums(of_query[0], of_query[1:], of_rows), *(sums(x[0], x[1:], of_keys) for x in (of_key, of_value))
        return *found, None, None


def _copied(tensor: Tensor, copies: int) -> Tensor:
    return tensor.repeat(copies, 1, 1) if copies > 1 else tensor


def fast(function: Callable, device: torch.device) -> Callable:
    """Compiled on CUDA: one kernel in place of a dozen."""
    return function if device.type == "cpu" else attention._compiled(function)


def cascade(query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefix, scale: float, window: None) -> Tensor:
    """As the functions of grpo/attention.py, without a sliding window. [1, H, L, D] -> the same."""
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return Cascade.apply(*rows, parts_of(layout), scale).transpose(0, 1)[None]


def make_layout(
    common: int, groups: int, prompt: int, completions: int, longest: int, device: torch.device
) -> SharedPrefix:
    """Completion lengths are spread evenly from a fifth of `longest` to `longest`."""
    end, spans = common, []
    for _ in range(groups):
        edges = [end, end + prompt]
        for i in range(completions):
            edges.append(edges[-1] + longest // 5 + (longest - longest // 5) * i // max(1, completions - 1))
        slices = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
        spans.append((slices[0], slices[1:]))
        end = edges[-1]
    if device.type == "cuda" and end % 128:
        spans.append((slice(end, end + -end % 128), []))
    return lay_out(spans, slice(0, common)).to(device)


def run_once(function: Callable, tensors: list[Tensor], gradient: Tensor, layout: SharedPrefix) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    output = function(*tensors, layout, WIDTH**-0.5, None)
    return [output, *torch.autograd.grad(output, tensors, gradient)]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """|found - truth| / |truth| of each."""
    return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]


def measure(name: str, sizes: tuple[int, ...], device: torch.device, repeats: int) -> dict[str, object]:
    """Errors, milliseconds (contenders take turns) and MiB of each contender."""
    layout, is_cuda = make_layout(*sizes, device), device.type == "cuda"
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    draw = lambda heads: torch.randn(1, heads, len(layout.group), WIDTH, generator=generator, device=device).to(dtype)
    tensors = [draw(heads).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]
    gradient = draw(HEADS)
    exact = [tensor.detach().float().cpu().requires_grad_() for tensor in tensors]
    truth = [
        x.detach().to(device) for x in run_once(attention.merged_parts, exact, gradient.float().cpu(), layout.to("cpu"))
    ]
    contenders = {"merged_parts": attention.merged_parts}
    if is_cuda:
        contenders = {"gathered": attention.gathered, "cascade": cascade, "flex": attention.flex}
    print(f"\n{name}: {len(layout.group):,} rows, {len(layout.key_index):,} keys gathered")
    works, rows = {}, {}
    for contender, function in contenders.items():
        try:
            found = errors(run_once(function, tensors, gradient, layout), truth)
        except Exception as error:  # of many kinds: not built in, does not compile, does not fit
            rows[contender] = {"trouble": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
            print(f"{contender:<10} {rows[contender]['trouble']}", flush=True)
            continue
        works[contender] = lambda function=function: run_once(function, tensors, gradient, layout)
        rows[contender] = {"errors": found, "peak_mib": peak_mib(works[contender], device), "ms": []}
    for _ in range(repeats):
        for contender, work in works.items():
            rows[contender]["ms"].append(1e3 * seconds(device, work))
    for contender in works:
        row = rows[contender]
        row["median_ms"] = statistics.median(row["ms"])
        shown = ", ".join(f"{error:.1e}" for error in row["errors"])
        print(f"{contender:<10}{row['median_ms']:>9.3f} ms{row['peak_mib']:>9.0f} MiB   errors {shown}", flush=True)
    return {"shape": name, "rows": len(layout.group), "contenders": rows}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    options, device = parser.parse_args(), default_device()
    results = [measure(name, sizes, device, options.repeats) for name, sizes in SHAPES[device.type].items()]
    print(json.dumps({"results": results} | measured_on(device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
