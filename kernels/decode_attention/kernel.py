"""Triton kernels, memory bound: per step every stored key and value is read once, a prefix once per tile of seats.

`attend_prefix` takes a tile of a group's seats and one chunk of the prefix: one load of the prefix serves seats x
heads-per-kv-head query rows (at least 16, the tensor cores' minimum). It leaves an output and its log-sum-exp.
`attend_suffix` takes one row: it stores the newest key and value, attends to the row's own suffix and folds in the
prefix's chunks, as one softmax in fp32. `attend_suffix_chunk` splits the suffixes into chunks, too, if a few rows have
room for thousands of tokens, as at the end of a rollout: with one program per row most of the device would idle.

Shapes alone decide the launch: nothing waits for the device, and a CUDA graph may capture it. What lies beyond a
length is never loaded, whatever it holds; and blocks begin at fixed keys, so that a row's output does not depend on its
neighbours.

Example: 2 groups with 3 seats each, 5 rows with seat_index 0 1 3 4 5 (the third seat of group 0 is empty), 4 heads on 2
kv heads of width 64 in bf16, prefixes of 256 keys and suffixes of 1,025. A tile has 8 seats x 2 heads = 16 query rows,
so one tile holds a group. The programs of group 1 look for seat_index 3, 4 and 5: 2, 3 and 4 rows come before these, so
rows 2, 3 and 4 sit there. In group 0 two rows come before seat_index 2, but row 2 has 3: that seat is empty.

Prefixes are split into 2 chunks of 128 keys, suffixes into 2 of up to 576: parts = 4, and partial[row, head, part] is
the output over prefix keys 0 to 127 (part 0) or 128 to 255 (1), or over suffix keys 0 to 575 (2) or from 576 on (3).
lse[row, head, part] is its log-sum-exp, by which `attend_suffix` weighs the parts; it skips those beyond a length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTHS = (16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE_ROWS = {2: 64, 4: 16}  # query rows of a prefix tile, by bytes of an element; 64 are one warp group's wgmma
BLOCK_BYTES = 8192  # of keys read at a time; with more, wide heads spill registers (tests/test_kernels_compile.py)
MIN_PREFIX_CHUNK = 128  # keys; with fewer, writing and merging a chunk's result costs as much as reading it
PROGRAMS = 264  # to aim for: two per multiprocessor of an H100
MIN_SUFFIX_CHUNK = 512  # keys
SUFFIX_CHUNKS = 8  # times PROGRAMS is how many chunks to aim for: suffixes an eighth full still keep PROGRAMS busy
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # score of a hidden key, finite because -inf - -inf would be NaN


def obstacle(query: Tensor, key: Tensor, value: Tensor, prefix: tuple, suffix: tuple) -> str | None:
    """Why the kernels cannot compute this, or None."""
    width, dtype = query.shape[-1], query.dtype
    if width not in WIDTHS:
        return f"head width {width} is not one of {WIDTHS}"
    tensors = (query, key, value, *prefix, *suffix)
    if width * query.element_size() > 512:
        return f"head width {width} in {dtype} exceeds 512 bytes"
    if dtype not in DTYPES or any(x.dtype != dtype for x in tensors):
        return (
            f"dtypes {sorted({str(x.dtype) for x in tensors})}: all must be the same, one of {[str(x) for x in DTYPES]}"
        )
    if any(x.shape[-1] != width or x.stride(-1) != 1 for x in tensors):
        return "keys and values must have the head width of the queries, and stride 1 along it"
    if any(one.stride() != other.stride() for one, other in (prefix, suffix)):
        return "stored keys and values must have the same strides"
    return None


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: tuple[Tensor, Tensor],
    suffix: tuple[Tensor, Tensor],
    *,
    seats: int,
    seat_index: Tensor,
    prefix_lengths: Tensor,
    suffix_lengths: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """As reference.decode_attention, but what lies beyond a length may be anything, NaN too."""
    key, value = key.contiguous(), value.contiguous()  # after a fused qkv projection they are slices
    num_rows, num_heads, width = query.shape
    num_groups, kv_heads, prefix_size, _ = prefix[0].shape
    repeats = num_heads // kv_heads
    tile_seats, padded_repeats = tile_shape(seats, repeats, query.element_size())
    tiles = triton.cdiv(seats, tile_seats)
    block = block_size(width, query.element_size())
    prefix_chunk = prefix_chunk_size(prefix_size, num_groups * tiles * kv_heads, block)
    prefix_chunks = triton.cdiv(prefix_size, prefix_chunk)
    suffix_chunk = suffix_chunk_size(suffix[0].shape[2], num_rows * kv_heads, block)
    parts = prefix_chunks + (triton.cdiv(suffix[0].shape[2], suffix_chunk) if suffix_chunk else 0)
    partial = query.new_empty(num_rows, num_heads, parts, width, dtype=torch.float32)
    lse = query.new_empty(num_rows, num_heads, parts, dtype=torch.float32)
    output = query.new_empty(num_rows, num_heads, width)
    common = dict(scale=scale, softcap=softcap or 0.0, window=window or 0, REPEATS=repeats, WIDTH=width, BLOCK=block)
    common.update(HAS_SOFTCAP=softcap is not None, HAS_WINDOW=window is not None)
    of_row = dict(PADDED_REPEATS=max(16, triton.next_power_of_2(repeats)), num_warps=4)
    if prefix_chunks:
        attend_prefix[(num_groups * tiles, kv_heads, prefix_chunks)](
            query, *query.stride()[:2], *prefix, *prefix[0].stride()[:3], seat_index, prefix_lengths, suffix_lengths,
            partial, lse, num_rows, seats, tiles, parts,
            TILE_SEATS=tile_seats, PADDED_REPEATS=padded_repeats, SEARCH_STEPS=num_rows.bit_length(),
            PREFIX_CHUNK=prefix_chunk, num_warps=prefix_warps(width, query.element_size()), **common,
        )  # fmt: skip
    if suffix_chunk:
        attend_suffix_chunk[(num_rows, kv_heads, parts - prefix_chunks)](
            query, *query.stride()[:2], *suffix, *suffix[0].stride()[:3], suffix_lengths, partial, lse, parts,
            prefix_chunks, suffix_chunk, **of_row, **common,
        )  # fmt: skip
    attend_suffix[(num_rows, kv_heads)](
        query, *query.stride()[:2], key, value, *key.stride()[:2], *suffix, *suffix[0].stride()[:3],
        prefix_lengths, suffix_lengths, partial, lse, output, parts, prefix_chunks, suffix_chunk,
        PREFIX_CHUNK=prefix_chunk, IS_SPLIT=suffix_chunk > 0, **of_row, **common,
    )  # fmt: skip
    return output


def tile_shape(seats: int, repeats: int, element_size: int) -> tuple[int, int]:
    """Seats of a prefix tile and query rows of a seat, both powers of two; their product is 16 or more."""
    padded_repeats = triton.next_power_of_2(repeats)
    tile_seats = min(triton.next_power_of_2(seats), TILE_ROWS[element_size] // padded_repeats)
    return max(tile_seats, 16 // padded_repeats, 1), padded_repeats


def block_size(width: int, element_size: int) -> int:
    """Keys read at a time."""
    return max(16, min(64, BLOCK_BYTES // (width * element_size)))


def prefix_warps(width: int, element_size: int) -> int:
    """Warps of a prefix tile: the accumulators of wide heads need the registers of eight."""
    return 8 if width * element_size >= 512 else 4


def prefix_chunk_size(prefix_size: int, programs: int, block: int) -> int:
    """Keys of a prefix chunk, a multiple of `block`: as many as leave enough programs to fill the device."""
    chunks = max(1, min(triton.cdiv(PROGRAMS, programs), prefix_size // MIN_PREFIX_CHUNK))
    return triton.cdiv(max(1, triton.cdiv(prefix_size, chunks)), block) * block


def suffix_chunk_size(suffix_size: int, programs: int, block: int) -> int:
    """Keys of a suffix chunk, a multiple of `block`; 0 if suffixes are not split."""
    chunks = min(triton.cdiv(SUFFIX_CHUNKS * PROGRAMS, programs), suffix_size // MIN_SUFFIX_CHUNK)
    is_worth_it = programs < PROGRAMS and chunks > 1
    return triton.cdiv(triton.cdiv(suffix_size, chunks), block) * block if is_worth_it else 0


@triton.jit
def _score(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores times log2(e), so that softmax weights are powers of two: 2^x is the one exponential in hardware."""
    scores = products * scale
    if HAS_SOFTCAP:
        scores = softcap * (1 - 2 / (tl.exp2(scores / softcap * (2 * LOG2E)) + 1))  # tanh
    return scores * LOG2E


@triton.jit
def _attend(
    query, keys, values, stride_key, low, high, first, last, best, total, sums,
    scale, softcap, HAS_SOFTCAP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fold keys [low, high) into an online softmax. query: [M, WIDTH]; row m sees the keys [first_m, last_m)."""
    column = tl.arange(0, WIDTH)
    for start in range(low, high, BLOCK):
        at = start + tl.arange(0, BLOCK)
        stored = at[:, None] * stride_key + column[None, :]
        is_read = (at < high)[:, None]
        key = tl.load(keys + stored, mask=is_read, other=0.0)
        value = tl.load(values + stored, mask=is_read, other=0.0)
        scores = _score(tl.dot(query, tl.trans(key), input_precision="tf32x3"), scale, softcap, HAS_SOFTCAP)
        visible = (at[None, :] >= first[:, None]) & (at[None, :] < last[:, None])
        scores = tl.where(visible, scores, LOWEST)
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.where(visible, tl.exp2(scores - new_best[:, None]), 0.0)
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision="tf32x3")
        best = new_best
    return best, total, sums  # of each row: its largest score, the sum of its weights, and of its weighted values


@triton.jit
def attend_prefix(
    query, stride_query_row, stride_query_head, keys, values, stride_group, stride_head, stride_key,
    seat_index, prefix_lengths, suffix_lengths, partial, lse, num_rows, seats, tiles, parts, scale, softcap, window,
    REPEATS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PREFIX_CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    TILE_SEATS: tl.constexpr, PADDED_REPEATS: tl.constexpr, SEARCH_STEPS: tl.constexpr,
):  # fmt: skip
    """Program (group and tile of its seats, kv head, chunk) -> partial[row, head, chunk] and its lse (base 2)."""
    ROWS: tl.constexpr = TILE_SEATS * PADDED_REPEATS
    group = tl.program_id(0) // tiles
    kv_head = tl.program_id(1)
    start = tl.program_id(2) * PREFIX_CHUNK

    # Which row sits in each seat: seat_index increases, so a binary search finds how many rows come before it.
    m = tl.arange(0, ROWS)
    repeat = m % PADDED_REPEATS
    seat = (tl.program_id(0) % tiles) * TILE_SEATS + m // PADDED_REPEATS
    wanted = group * seats + seat
    row = tl.zeros([ROWS], tl.int32)
    for step in tl.static_range(SEARCH_STEPS):
        ahead = row + (1 << (SEARCH_STEPS - 1 - step))
        comes_before = tl.load(seat_index + ahead - 1, mask=ahead <= num_rows, other=wanted) < wanted
        row = tl.where(comes_before, ahead, row)
    is_taken = (seat < seats) & (tl.load(seat_index + row, mask=row < num_rows, other=-1) == wanted)
    stored = tl.load(suffix_lengths + row, mask=is_taken, other=-1).to(tl.int32)
    is_live = (stored >= 0) & (repeat < REPEATS)
    last = tl.load(prefix_lengths + row, mask=is_live, other=0).to(tl.int32)
    first = tl.zeros([ROWS], tl.int32)
    if HAS_WINDOW:
        first = tl.maximum(first, tl.where(is_live, last + stored + 1 - window, 2147483647))
    low = tl.maximum(start, tl.min(first, 0) // BLOCK * BLOCK)
    high = tl.minimum(start + PREFIX_CHUNK, tl.max(last, 0))
    if low < high:
        head = kv_head * REPEATS + repeat
        column = tl.arange(0, WIDTH)
        rows = query + row.to(tl.int64) * stride_query_row + head * stride_query_head
        stacked = tl.load(rows[:, None] + column[None, :], mask=is_live[:, None], other=0.0)
        best, total, sums = _attend(
            stacked,
            keys + group.to(tl.int64) * stride_group + kv_head * stride_head,
            values + group.to(tl.int64) * stride_group + kv_head * stride_head,
            stride_key, low, high, first, last,
            tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32),
            scale, softcap, HAS_SOFTCAP, WIDTH, BLOCK,
        )  # fmt: skip
        # A row that sees nothing here, while another row of its tile does, leaves zeros and a weight of 2^LOWEST = 0.
        target = (row * tl.num_programs(1) * REPEATS + head).to(tl.int64) * parts + tl.program_id(2)
        total = tl.where(total > 0, total, 1.0)
        mean = sums / total[:, None]
        tl.store(partial + target[:, None] * WIDTH + column[None, :], mean, mask=is_live[:, None])
        tl.store(lse + target, best + tl.log2(total), mask=is_live)


@triton.jit
def attend_suffix_chunk(
    query, stride_query_row, stride_query_head, keys, values, stride_row, stride_head, stride_key,
    suffix_lengths, partial, lse, parts, prefix_chunks, suffix_chunk, scale, softcap, window,
    REPEATS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, PADDED_REPEATS: tl.constexpr,
):  # fmt: skip
    """Program (row, kv head, chunk of the suffix) -> partial[row, head, prefix_chunks + chunk] and its lse (base 2)."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    start = tl.program_id(2) * suffix_chunk
    stored = tl.load(suffix_lengths + row).to(tl.int32)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(0, stored + 1 - window)
    low = tl.maximum(start, first // BLOCK * BLOCK)
    high = tl.minimum(start + suffix_chunk, stored)
    if low < high:
        repeat = tl.arange(0, PADDED_REPEATS)
        column = tl.arange(0, WIDTH)
        offset = row * stride_query_row + (kv_head * REPEATS + repeat) * stride_query_head
        stacked = tl.load(query + offset[:, None] + column[None, :], mask=(repeat < REPEATS)[:, None], other=0.0)
        zeros = tl.zeros([PADDED_REPEATS], tl.int32)
        best, total, sums = _attend(
            stacked,
            keys + row * stride_row + kv_head * stride_head,
            values + row * stride_row + kv_head * stride_head,
            stride_key, low, high, zeros + first, zeros + stored,
            tl.full([PADDED_REPEATS], LOWEST, tl.float32), tl.zeros([PADDED_REPEATS], tl.float32),
            tl.zeros([PADDED_REPEATS, WIDTH], tl.float32), scale, softcap, HAS_SOFTCAP, WIDTH, BLOCK,
        )  # fmt: skip
        head = row * tl.num_programs(1) * REPEATS + kv_head * REPEATS + repeat
        target = head * parts + prefix_chunks + tl.program_id(2)
        total = tl.where(total > 0, total, 1.0)
        tl.store(
            partial + target[:, None] * WIDTH + column[None, :], sums / total[:, None], mask=(repeat < REPEATS)[:, None]
        )
        tl.store(lse + target, best + tl.log2(total), mask=repeat < REPEATS)


@triton.jit
def _fold_in(partial, lse, part, best, total, sums, is_head, WIDTH: tl.constexpr):
    """Fold a chunk's result into the softmax. part: [M], its index in partial and lse for each row of the query."""
    theirs = tl.load(lse + part, mask=is_head, other=LOWEST)
    mean = tl.load(partial + part[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], mask=is_head[:, None], other=0.0)
    new_best = tl.maximum(best, theirs)
    shrink, weight = tl.exp2(best - new_best), tl.exp2(theirs - new_best)
    return new_best, total * shrink + weight, sums * shrink[:, None] + mean * weight[:, None]


@triton.jit
def attend_suffix(
    query, stride_query_row, stride_query_head, key, value, stride_new_row, stride_new_head,
    keys, values, stride_row, stride_head, stride_key, prefix_lengths, suffix_lengths, partial, lse, output,
    parts, prefix_chunks, suffix_chunk, scale, softcap, window,
    REPEATS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PREFIX_CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, PADDED_REPEATS: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (row, kv head): store the newest key and value, attend to the suffix (if IS_SPLIT, fold in its chunks),
    fold in the prefix's chunks, write the row's output."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    repeat = tl.arange(0, PADDED_REPEATS)
    column = tl.arange(0, WIDTH)
    is_head = (repeat < REPEATS)[:, None]
    head = row * tl.num_programs(1) * REPEATS + kv_head * REPEATS + repeat  # index into [B * H]
    stored = tl.load(suffix_lengths + row).to(tl.int32)
    result = tl.zeros([PADDED_REPEATS, WIDTH], tl.float32)
    if stored >= 0:
        new = row * stride_new_row + kv_head * stride_new_head + column
        key_new, value_new = tl.load(key + new), tl.load(value + new)
        keys += row * stride_row + kv_head * stride_head
        values += row * stride_row + kv_head * stride_head
        tl.store(keys + stored * stride_key + column, key_new)
        tl.store(values + stored * stride_key + column, value_new)

        offset = row * stride_query_row + (kv_head * REPEATS + repeat) * stride_query_head
        stacked = tl.load(query + offset[:, None] + column[None, :], mask=is_head, other=0.0)
        # The newest token is taken from registers: other threads' stores to the slab are not visible yet.
        product = tl.sum(stacked.to(tl.float32) * key_new.to(tl.float32)[None, :], 1)
        best = _score(product, scale, softcap, HAS_SOFTCAP)
        total = tl.full([PADDED_REPEATS], 1.0, tl.float32)
        sums = tl.zeros([PADDED_REPEATS, WIDTH], tl.float32) + value_new.to(tl.float32)[None, :]
        length = tl.load(prefix_lengths + row).to(tl.int32)
        seen = 0  # the first key visible, counted from the start of the prefix
        if HAS_WINDOW:
            seen = tl.maximum(0, length + stored + 1 - window)
        first = tl.maximum(0, seen - length)
        zeros = tl.zeros([PADDED_REPEATS], tl.int32)
        if IS_SPLIT:
            for chunk in range(first // suffix_chunk, tl.where(first < stored, tl.cdiv(stored, suffix_chunk), 0)):
                part = head * parts + prefix_chunks + chunk
                best, total, sums = _fold_in(partial, lse, part, best, total, sums, repeat < REPEATS, WIDTH)
        else:
            best, total, sums = _attend(
                stacked, keys, values, stride_key, first // BLOCK * BLOCK, stored, zeros + first, zeros + stored,
                best, total, sums, scale, softcap, HAS_SOFTCAP, WIDTH, BLOCK,
            )  # fmt: skip

        for chunk in range(seen // PREFIX_CHUNK, tl.where(seen < length, tl.cdiv(length, PREFIX_CHUNK), 0)):
            part = head * parts + chunk
            best, total, sums = _fold_in(partial, lse, part, best, total, sums, repeat < REPEATS, WIDTH)
        result = sums / total[:, None]
    tl.store(output + head[:, None] * WIDTH + column[None, :], result.to(output.dtype.element_ty), mask=is_head)
