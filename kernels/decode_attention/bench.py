"""One layer's attention in a decode step: python -m kernels.decode_attention.bench

Contenders: the reference; what runs in its place (on a CPU flash attention in two parts, on CUDA the Triton kernels);
and, as the usual way, PyTorch's own attention with a copy of its group's prefix for every row, which is given its keys
already stored and joined. All rows have full length.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch.nn import functional as F

import kernels
from kernels.decode_attention import reference
from kernels.measure import alternate, run_bench, show


@dataclass(frozen=True)
class Shape:
    """groups x seats rows, every seat taken. prefix, suffix: tokens, the newest included."""

    name: str
    groups: int
    seats: int
    heads: int
    kv_heads: int
    width: int
    prefix: int
    suffix: int


SHAPES = {
    "cpu": [Shape("27M", 4, 8, 8, 2, 64, 700, 64)],
    "cuda": [
        Shape("Qwen2.5-0.5B", 32, 8, 14, 2, 64, 700, 128),
        Shape("Qwen2.5-0.5B, long", 32, 8, 14, 2, 64, 700, 1024),
        Shape("Qwen2.5-0.5B, few rows", 4, 8, 14, 2, 64, 700, 1024),
        Shape("Qwen2.5-7B", 32, 8, 28, 4, 128, 700, 256),
        Shape("Qwen2.5-1.5B, the last rows of a long rollout", 8, 1, 12, 2, 128, 700, 16_384),
    ],
}


def make_inputs(shape: Shape, device: torch.device) -> tuple[tuple, dict[str, object]]:
    """Random query, key, value, prefix and suffix, and the layout: what decode_attention takes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    normal = lambda *size: torch.randn(*size, device=device).to(dtype)
    rows, kv = shape.groups * shape.seats, (shape.kv_heads, shape.width)
    query, key, value = normal(rows, shape.heads, shape.width), normal(rows, *kv), normal(rows, *kv)
    prefix = [normal(shape.groups, kv[0], shape.prefix, kv[1]) for _ in range(2)]
    suffix = [normal(rows, kv[0], shape.suffix, kv[1]) for _ in range(2)]
    seat_index = torch.arange(rows, device=device)
    layout = dict(
        seats=shape.seats,
        seat_index=seat_index,
        prefix_lengths=torch.full_like(seat_index, shape.prefix),
        suffix_lengths=torch.full_like(seat_index, shape.suffix - 1),
        scale=shape.width**-0.5,
    )
    return (query, key, value, prefix, suffix), layout


def measure(shape: Shape, device: torch.device, repeats: int) -> dict[str, object]:
    """Times of every contender, printed and returned, and how far each output is from the reference's."""
    tensors, layout = make_inputs(shape, device)
    query, _, _, prefix, suffix = tensors
    defined = lambda: reference.decode_attention(*tensors, **layout)
    expected = defined()  # also stores the newest
    joined = [torch.cat([x.repeat_interleave(shape.seats, 0), y], 2) for x, y in zip(prefix, suffix, strict=True)]
    peer = lambda: F.scaled_dot_product_attention(query[:, :, None], *joined, enable_gqa=True)[:, :, 0]
    ours = lambda: kernels.decode_attention(*tensors, impl="auto", **layout)
    contenders = {"reference": defined, "SDPA, prefix repeated": peer}
    contenders["triton" if device.type == "cuda" else "flash, two parts"] = ours
    errors = {name: (call() - expected).abs().max().item() for name, call in contenders.items()}
    taken = alternate(contenders, device, repeats)
    num_bytes = sum(x.nbytes for x in (*prefix, *suffix))
    show(f"{shape.name}: {asdict(shape)}", taken, num_bytes)
    return {"shape": asdict(shape), "bytes": num_bytes, "milliseconds": taken, "max_difference": errors}


if __name__ == "__main__":
    run_bench(__doc__, "decode_attention", SHAPES, measure)
