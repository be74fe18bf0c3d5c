"""Two Triton kernels: `weigh_tiles` reads all logits once, over many programs; `pick` reads one tile of each row again.

The distribution is the reference's: exp(logit / temperature - best) of every token in fp32, summed in fp64. But a
tile's weights are relative to the tile's own best, so rounding moves the border between two tokens in the cumulative
distribution by some 1e-7 of its height; a uniform nearer to a border than that may pick the neighbour.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # tokens of one program
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def obstacle(logits: Tensor, *, temperature: float, top_p: float, top_k: int, min_p: float = 0.0) -> str | None:
    """Why the kernels cannot sample from these logits, or None. Greedy sampling ignores truncation."""
    if temperature > 0 and (top_p < 1 or 0 < top_k < logits.shape[-1] or min_p > 0):
        return f"top_p={top_p}, top_k={top_k}, min_p={min_p}: the kernel does not support top-k, top-p and min-p"
    if logits.dtype not in DTYPES:
        return f"the kernel does not support logits of {logits.dtype}"
    return None if logits.stride(-1) == 1 else "the logits of a row must be contiguous"


def sample_token(logits: Tensor, uniforms: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """As reference.sample_token, without truncation."""
    num_rows, vocabulary = logits.shape
    tile = min(TILE, triton.next_power_of_2(vocabulary))
    tiles = triton.cdiv(vocabulary, tile)
    best = logits.new_empty(num_rows, tiles, dtype=torch.float32)
    total = logits.new_empty(num_rows, tiles, dtype=torch.float64)
    token = logits.new_empty(num_rows, dtype=torch.int64)
    logprob = logits.new_empty(num_rows, dtype=torch.float32)
    common = dict(vocabulary=vocabulary, temperature=temperature or 1.0, TILE=tile, num_warps=8)
    weigh_tiles[(num_rows, tiles)](logits, logits.stride(0), best, total, **common)
    pick[(num_rows,)](
        logits, logits.stride(0), best, total, uniforms, token, logprob, tiles,
        GREEDY=temperature == 0, PADDED_TILES=triton.next_power_of_2(tiles), **common,
    )  # fmt: skip
    return token, logprob


@triton.jit
def _load_tile(logits, stride_row, row, tile, vocabulary, temperature, TILE: tl.constexpr):
    """Logits / temperature of a tile, -inf beyond the vocabulary; what to subtract before exp (0 if all are -inf)."""
    at = tile * TILE + tl.arange(0, TILE)
    scores = tl.load(logits + row.to(tl.int64) * stride_row + at, mask=at < vocabulary, other=-float("inf"))
    scores = tl.div_rn(scores.to(tl.float32), temperature)
    best = tl.max(scores, 0)
    return scores, best, tl.where(best == -float("inf"), 0.0, best)


@triton.jit
def weigh_tiles(logits, stride_row, best, total, vocabulary, temperature, TILE: tl.constexpr):
    """Program (row, tile): the best score of the tile and the sum of its weights relative to it."""
    row, tile = tl.program_id(0), tl.program_id(1)
    scores, tile_best, base = _load_tile(logits, stride_row, row, tile, vocabulary, temperature, TILE)
    target = row * tl.num_programs(1) + tile
    tl.store(best + target, tile_best)
    tl.store(total + target, tl.sum(tl.exp(scores - base).to(tl.float64), 0))


@triton.jit
def _first_above(weights, threshold, SIZE: tl.constexpr):
    """The first index of positive weight whose running sum exceeds the threshold, else the last of positive weight.

    Also the sum before that index. The parallel sum may rise by rounding even where a weight is 0, hence the check.
    """
    index = tl.arange(0, SIZE)
    running = tl.cumsum(weights, 0)
    has_weight = weights > 0
    found = tl.min(tl.where(has_weight & (running > threshold), index, SIZE), 0)
    found = tl.where(found < SIZE, found, tl.maximum(tl.max(tl.where(has_weight, index, -1), 0), 0))
    return found, tl.sum(tl.where(index == found, running - weights, 0.0), 0)


@triton.jit
def pick(
    logits, stride_row, best, total, uniforms, token, logprob, tiles, vocabulary, temperature,
    GREEDY: tl.constexpr, TILE: tl.constexpr, PADDED_TILES: tl.constexpr,
):  # fmt: skip
    """Program (row): the tile that the uniform falls into, then the token in it; or, GREEDY, the first best token."""
    row = tl.program_id(0)
    tile = tl.arange(0, PADDED_TILES)
    tile_best = tl.load(best + row * tiles + tile, mask=tile < tiles, other=-float("inf"))
    row_best = tl.max(tile_best, 0)
    share = tl.exp(tile_best - row_best).to(tl.float64)
    weights = share * tl.load(total + row * tiles + tile, mask=tile < tiles, other=0.0)
    row_total = tl.sum(weights, 0)
    if GREEDY:
        chosen = tl.min(tl.where(tile_best == row_best, tile, tiles - 1), 0)
        scores, _, _ = _load_tile(logits, stride_row, row, chosen, vocabulary, temperature, TILE)
        inside = tl.min(tl.where(scores == row_best, tl.arange(0, TILE), TILE - 1), 0)
    else:
        threshold = tl.load(uniforms + row).to(tl.float64) * row_total
        chosen, before = _first_above(weights, threshold, PADDED_TILES)
        scale = tl.sum(tl.where(tile == chosen, share, 0.0), 0)
        scores, _, base = _load_tile(logits, stride_row, row, chosen, vocabulary, temperature, TILE)
        inside, _ = _first_above(tl.exp(scores - base).to(tl.float64), (threshold - before) / scale, TILE)
    # With NaN among the logits every comparison is false: the index only has to be valid, the NaN log-prob tells.
    picked = tl.minimum(chosen * TILE + inside, vocabulary - 1)
    score = tl.load(logits + row.to(tl.int64) * stride_row + picked).to(tl.float32)
    tl.store(token + row, picked)
    tl.store(logprob + row, tl.div_rn(score, temperature) - (row_best + tl.log(row_total.to(tl.float32))))
