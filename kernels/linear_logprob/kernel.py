"""The log-prob head in Triton: matmul and row statistics in one (`fused`), and the two steps of rows.py.

`fused` is a matmul whose epilogue folds each tile of logits into running sums of a row: its largest logit m, sum
e^(z - m) and sum e^(z - m) (z - m), from which log-sum-exp and entropy follow. Every program owns some rows and
SPAN columns of the vocabulary; a second kernel merges the spans in order. No atomics: a row's result depends on that
row alone, to the bit. Inside, logits are multiplied by log2(e), so that 2^x, which the hardware has, replaces e^x.

If a gradient will be needed, the tiles are kept as well, in fp16 and minus the largest entry of each of their rows. So
likely tokens, which make the gradient, are kept to a thousandth however large the logits are; log-probs and entropy are
as exact as without. Written and read once, the tiles cost two fifths of the memory traffic that fp32 logits cost
between a matmul and two kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear_logprob.rows import LogitTransform, RowOps, RowStatistics

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# Below every logit, and finite: -inf - -inf would be NaN where a tile has no column of the vocabulary.
LOWEST = tl.constexpr(-1.0e30)
LOWEST_KEPT = tl.constexpr(-6.0e4)  # fp16 ends at -65,504

# Compiles without a spill for sm_80, 90 and 100 (tests/test_kernels_compile_logprob.py). No GPU has timed it yet.
TILE = {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 128, "BLOCK_WIDTH": 64, "num_warps": 8, "num_stages": 3}
SPAN = 2048  # columns of one program: 75 programs a row block at V = 151,936
ROW_BLOCK = {"BLOCK": 4096, "num_warps": 8}
# Widest head that is fused; beyond it the memory traffic of logits is small beside the matmul, where cuBLAS is faster.
MAX_FUSED_WIDTH = 2048


@triton.jit
def _transform(logits, inverse_temperature, softcap, HAS_CAP: tl.constexpr):
    """log2(e) cap(logits) / temperature."""
    if HAS_CAP:
        tanh = 1 - 2 / (tl.exp(logits * (2 / softcap)) + 1)  # right at both ends: e^x may be 0 or inf
        logits = softcap * tanh
    return logits * (inverse_temperature * LOG2E)


@triton.jit
def _fold(top, total, moment, z, other_total, other_moment):
    """Merge the running sums of two sets of logits. z: the largest of the second; moment: sum 2^(z - top) (z - top)."""
    new = tl.maximum(top, z)
    keep, take = tl.exp2(top - new), tl.exp2(z - new)
    moment = keep * (moment + total * (top - new)) + take * (other_moment + other_total * (z - new))
    return new, keep * total + take * other_total, moment


@triton.jit
def _logprob_and_entropy(top, total, moment, chosen, target, V: tl.constexpr):
    """In nats. A target outside the vocabulary gives NaN, which stops the run with the sequence's name."""
    logprob = (chosen - top - tl.log2(total)) * LN2
    is_known = (target >= 0) & (target < V)
    return tl.where(is_known, logprob, float("nan")), (tl.log2(total) - moment / total) * LN2


@triton.jit(do_not_specialize=["num_rows"])
def forward_spans(
    hidden, weight, bias, target, partial, kept, offsets, num_rows, inverse_temperature, softcap,
    V: tl.constexpr, D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, KEEP_LOGITS: tl.constexpr,
    UPCAST: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (row block, span): running sums over the span's tiles of logits, while they are in the registers.

    partial: [4, spans, T]: top, total, moment and the target's logit, 0 outside its span.  kept, offsets: [T, V] fp16
    and [T, tiles] fp32, written if KEEP_LOGITS: the logits minus their row's largest in the tile, and that largest.
    """
    # Row blocks come first in the grid: programs that run together read the same part of the weight from L2. Rows past
    # the end repeat the last one, and write the same.
    first_row, span = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    row = tl.minimum(first_row + tl.arange(0, BLOCK_ROWS), num_rows - 1)
    wanted = tl.load(target + row)
    top = tl.full((BLOCK_ROWS,), LOWEST, tl.float32)
    total, moment, chosen = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    for start in range(0, COLUMNS, BLOCK_COLUMNS):
        column = span * COLUMNS + start + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < V
        logits = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for first in range(0, D, BLOCK_WIDTH):
            width = first + tl.arange(0, BLOCK_WIDTH)
            left_pointers = hidden + row[:, None].to(tl.int64) * D + width[None, :]
            right_pointers = weight + column[None, :].to(tl.int64) * D + width[:, None]
            if D % BLOCK_WIDTH:
                left = tl.load(left_pointers, mask=(width < D)[None, :], other=0.0)
                right = tl.load(right_pointers, mask=is_column[None, :] & (width < D)[:, None], other=0.0)
            else:
                left = tl.load(left_pointers)
                right = tl.load(right_pointers, mask=is_column[None, :], other=0.0)
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            logits = tl.dot(left, right, logits)
        if HAS_BIAS:
            logits += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        z = tl.where(is_column[None, :], _transform(logits, inverse_temperature, softcap, HAS_CAP), LOWEST)
        chosen += tl.sum(tl.where(column[None, :] == wanted[:, None], z, 0.0), 1)
        highest = tl.maximum(tl.max(z, 1), LOWEST)  # finite even where a bias of -inf bars a whole tile
        z -= highest[:, None]
        if KEEP_LOGITS:
            block = kept + first_row.to(tl.int64) * V  # so that offsets within it fit into 32 bits
            pointers = block + (row - first_row)[:, None] * V + column[None, :]
            tl.store(pointers, tl.maximum(z, LOWEST_KEPT).to(kept.dtype.element_ty), mask=is_column[None, :])
            tiles = tl.num_programs(1) * (COLUMNS // BLOCK_COLUMNS)
            tl.store(offsets + row * tiles + (span * COLUMNS + start) // BLOCK_COLUMNS, highest)
        exp = tl.exp2(z)
        top, total, moment = _fold(top, total, moment, highest, tl.sum(exp, 1), tl.sum(exp * z, 1))
    pointers = partial + span.to(tl.int64) * num_rows + row
    step = tl.num_programs(1).to(tl.int64) * num_rows
    tl.store(pointers, top)
    tl.store(pointers + step, total)
    tl.store(pointers + 2 * step, moment)
    tl.store(pointers + 3 * step, chosen)


@triton.jit(do_not_specialize=["num_rows"])
def merge_spans(
    partial, target, logprobs, entropy, tops, totals, num_rows,
    V: tl.constexpr, SPANS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row block): merge the spans of its rows, in order, into log-prob and entropy."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < num_rows
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    total, moment, chosen = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    step = tl.full((), SPANS, tl.int64) * num_rows
    for span in range(0, SPANS):
        pointers = partial + tl.full((), span, tl.int64) * num_rows + row
        other_top = tl.load(pointers, mask=is_row, other=0.0)
        other_total = tl.load(pointers + step, mask=is_row, other=1.0)
        other_moment = tl.load(pointers + 2 * step, mask=is_row, other=0.0)
        chosen += tl.load(pointers + 3 * step, mask=is_row, other=0.0)
        top, total, moment = _fold(top, total, moment, other_top, other_total, other_moment)
    wanted = tl.load(target + row, mask=is_row, other=0)
    logprob, row_entropy = _logprob_and_entropy(top, total, moment, chosen, wanted, V)
    tl.store(logprobs + row, logprob, mask=is_row)
    tl.store(entropy + row, row_entropy, mask=is_row)
    tl.store(tops + row, top, mask=is_row)
    tl.store(totals + row, total, mask=is_row)


@triton.jit
def row_statistics(
    logits, target, logprobs, entropy, tops, totals, inverse_temperature, softcap,
    V: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row), which reads its logits once. Every lane keeps its own running sums; they are merged at the end."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    total, moment = tl.zeros_like(top), tl.zeros_like(top)
    for start in range(0, V, BLOCK):
        is_column = start + lane < V
        raw = tl.load(logits + row * V + start + lane, mask=is_column, other=0.0)
        z = tl.where(is_column, _transform(raw, inverse_temperature, softcap, HAS_CAP), LOWEST)
        top, total, moment = _fold(top, total, moment, z, is_column.to(tl.float32), 0.0)
    row_top = tl.max(top, 0)
    scale = tl.exp2(top - row_top)
    row_total = tl.sum(scale * total, 0)
    row_moment = tl.sum(scale * (moment + total * (top - row_top)), 0)
    wanted = tl.load(target + row)
    is_known = (wanted >= 0) & (wanted < V)
    raw = tl.load(logits + row * V + wanted, mask=is_known, other=0.0)
    chosen = _transform(raw, inverse_temperature, softcap, HAS_CAP)
    logprob, row_entropy = _logprob_and_entropy(row_top, row_total, row_moment, chosen, wanted, V)
    tl.store(logprobs + row, logprob)
    tl.store(entropy + row, row_entropy)
    tl.store(tops + row, row_top)
    tl.store(totals + row, row_total)


@triton.jit
def row_gradients(
    logits, offsets, gradients, target, logprobs, entropy, tops, totals, logprob_gradients, entropy_gradients, stride,
    inverse_temperature, softcap, V: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row): its logits are replaced by their gradients in place, by the equation in rows.py.

    logits: plain ones or, if TILES is not 0, as forward_spans keeps them in tiles of COLUMNS columns with offsets.
    gradients: the same memory; stride: from row to row, counted in elements of the gradients.

    Example: a row of V = 8 fp32 logits z0 to z7, BLOCK = 4, bf16 gradients g0 to g7, of which two fit over one logit:

        before    z0     z1     z2     z3     z4     z5     z6     z7
        block 0   g0 g1  g2 g3  z2     z3     z4     z5     z6     z7
        block 1   g0 g1  g2 g3  g4 g5  g6 g7  z4     z5     z6     z7

    In block 0, g2 overwrites z1, which the thread of g1 may not have read yet: hence the barrier. Block 1 overwrites
    z2 and z3, which block 0 has read. Logits in fp16 are as wide as their gradients and overwritten by their own.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    wanted, g = tl.load(target + row), tl.load(logprob_gradients + row)
    top, total = tl.load(tops + row), tl.load(totals + row)
    target_probability = tl.exp(tl.load(logprobs + row))  # the exact p of the target: near 1, 1 - p cancels
    for start in range(0, V, BLOCK):
        column = start + lane
        raw = tl.load(logits + row * V + column, mask=column < V, other=LOWEST_KEPT).to(tl.float32)
        if TILES:
            z = raw + tl.load(offsets + row * TILES + column // COLUMNS, mask=column < V, other=0.0)
        else:
            z = _transform(raw, inverse_temperature, softcap, HAS_CAP)
        p = tl.where(column == wanted, target_probability, tl.exp2(z - top) / total)
        gradient = g * (tl.where(column == wanted, 1.0, 0.0) - p)
        if HAS_ENTROPY:
            logprob = (z - top - tl.log2(total)) * LN2
            gradient -= tl.load(entropy_gradients + row) * p * (logprob + tl.load(entropy + row))
        if HAS_CAP:
            tanh = z / (softcap * inverse_temperature * LOG2E)
            gradient *= 1 - tanh * tanh
        # A narrower gradient may overwrite logits of this block that other threads have not read yet; never later ones.
        tl.debug_barrier()
        pointers = gradients + row * stride + column
        tl.store(pointers, (gradient * inverse_temperature).to(gradients.dtype.element_ty), mask=column < V)


def fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    transform: LogitTransform,
    buffer: Tensor | None,
) -> RowStatistics:
    """Log-prob and entropy of each row. hidden: [T, D]; weight: [V, D]; both bf16 or fp16.

    buffer: [T, V] fp16, contiguous: memory to keep the logits in for `gradients`; None if those will not be needed.
    """
    (num_rows, width), vocabulary = hidden.shape, len(weight)
    spans = triton.cdiv(vocabulary, SPAN)
    new = lambda *shape: hidden.new_empty(shape, dtype=torch.float32)
    logprobs, entropy, tops, totals = (new(num_rows) for _ in range(4))
    partial = new(4, spans, num_rows)
    offsets = None if buffer is None else new(num_rows, spans * (SPAN // TILE["BLOCK_COLUMNS"]))
    kept = (partial, partial) if buffer is None else (buffer, offsets)
    if num_rows:
        forward_spans[(triton.cdiv(num_rows, TILE["BLOCK_ROWS"]), spans)](
            hidden.contiguous(), weight.contiguous(), weight if bias is None else bias, target,
            partial, *kept, num_rows, *_scalars(transform),
            V=vocabulary, D=width, HAS_BIAS=bias is not None, HAS_CAP=transform.softcap is not None,
            KEEP_LOGITS=buffer is not None, COLUMNS=SPAN, **TILE,
            UPCAST=triton.knobs.runtime.interpret,  # else it multiplies the bit patterns of bf16
        )  # fmt: skip
        columns = (logprobs, entropy, tops, totals)
        merge_spans[(triton.cdiv(num_rows, 128),)](
            partial, target, *columns, num_rows, V=vocabulary, SPANS=spans, BLOCK=128
        )
    return RowStatistics(logprobs, entropy, () if buffer is None else (buffer, tops, totals, offsets))


def statistics(logits: Tensor, target: Tensor, transform: LogitTransform) -> RowStatistics:
    """Log-prob and entropy of each row, in one read. logits: [R, V] fp32, contiguous."""
    logprobs, entropy, tops, totals = (logits.new_empty(len(logits)) for _ in range(4))
    row_statistics[(len(logits),)](
        logits, target, logprobs, entropy, tops, totals, *_scalars(transform),
        V=logits.shape[1], HAS_CAP=transform.softcap is not None, **ROW_BLOCK,
    )  # fmt: skip
    return RowStatistics(logprobs, entropy, (logits, tops, totals))


def gradients(
    found: RowStatistics, target: Tensor, transform: LogitTransform, g: Tensor, h: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """d loss / d logits as [R, V] of `dtype` (as wide as the logits or narrower), in the memory of the logits."""
    logits, tops, totals, *offsets = found.saved
    in_place = logits.view(dtype)
    row_gradients[(len(logits),)](
        logits, offsets[0] if offsets else logits, in_place, target, found.logprobs, found.entropy, tops, totals,
        g.contiguous(), found.entropy if h is None else h.contiguous(), in_place.stride(0), *_scalars(transform),
        V=logits.shape[1], TILES=offsets[0].shape[1] if offsets else 0, COLUMNS=TILE["BLOCK_COLUMNS"],
        HAS_CAP=transform.softcap is not None, HAS_ENTROPY=h is not None, **ROW_BLOCK,
    )  # fmt: skip
    return in_place[:, : logits.shape[1]]


def _scalars(transform: LogitTransform) -> tuple[float, float]:
    return 1 / transform.temperature, transform.softcap or 1.0


def obstacle(hidden: Tensor) -> str | None:
    """Why these kernels cannot serve this head, or None."""
    return None if hidden.dtype in (torch.bfloat16, torch.float16, torch.float32) else f"no kernel for {hidden.dtype}"


def ops_for(weight: Tensor) -> RowOps:
    """The implementation for this head. fp32 is not fused: Triton's matmul would round it to TF32."""
    is_fused = weight.dtype != torch.float32 and weight.shape[1] <= MAX_FUSED_WIDTH
    return RowOps(statistics, gradients, fused if is_fused else None)
