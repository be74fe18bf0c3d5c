"""The definition, in PyTorch: one softmax over the keys of a shared prefix and of a row's own suffix.

First the newest key and value of each row are stored. All rows of a group read their shared prefix in one matmul: each
row has a seat in a [groups, seats] grid, and the queries of a group's seats are stacked. An empty seat costs a little
arithmetic but no memory traffic, so rows may leave one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: tuple[Tensor, Tensor],
    suffix: tuple[Tensor, Tensor],
    *,
    suffix_lengths: Tensor,
    how: Callable[..., Tensor] | None = None,
    **layout,
) -> Tensor:
    """Store the key and value of each row's newest token at position suffix_lengths[b] of its suffix, then `attend`.

    key, value: [B, Hkv, D].  suffix_lengths: [B] int64, without the newest token; -1 marks an idle row: its output is
    0, and its suffix may be anything afterwards.  how: called in place of `attend`.  The rest as in `attend`. Never
    waits for the device.
    """
    row = torch.arange(len(query), device=query.device)
    for stored, newest in zip(suffix, (key, value), strict=True):
        stored[row, :, suffix_lengths] = newest  # an idle row's -1 is its last position, which nobody reads
    output = (how or attend)(query, prefix, suffix, suffix_lengths=suffix_lengths + 1, **layout)
    return output.masked_fill_((suffix_lengths < 0)[:, None, None], 0)


def attend(
    query: Tensor,
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
    """softmax(cap(scale q k^T)) v over row b's first prefix_lengths[b] prefix and suffix_lengths[b] suffix keys.

    cap(x) = softcap * tanh(x / softcap) where one is given (Gemma 2). Of all these keys only the last `window` count.
    query: [B, H, D].  prefix: key and value, [C, Hkv, P, D] for C groups.  suffix: key and value, [B, Hkv, S, D], the
    newest token stored already, so suffix_lengths >= 1.  seat_index: [B] int64, group * seats + seat, strictly
    increasing.  prefix_lengths, suffix_lengths: [B] int64. What is stored beyond a length must be finite; it has no
    effect.
    Returns [B, H, D] in the dtype of the values.
    """
    (prefix_key, prefix_value), (suffix_key, suffix_value) = prefix, suffix
    num_rows, num_heads, _ = query.shape
    num_groups, kv_heads, prefix_size, _ = prefix_key.shape
    query = query.reshape(num_rows, kv_heads, num_heads // kv_heads, -1)

    shared = _matmul_fp32(rows_to_seats(query, num_groups, seats, seat_index), prefix_key)
    scores = torch.cat([seats_to_rows(shared, seats, seat_index), _matmul_fp32(query, suffix_key)], -1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = _visible(prefix_lengths, suffix_lengths, prefix_size, suffix_key.shape[2], window)
    probs = scores.masked_fill_(~visible[:, None, None], -math.inf).softmax(-1).to(suffix_value.dtype)

    shared = rows_to_seats(probs[..., :prefix_size], num_groups, seats, seat_index) @ prefix_value
    output = seats_to_rows(shared, seats, seat_index) + probs[..., prefix_size:] @ suffix_value
    return output.reshape(num_rows, num_heads, -1)


def rows_to_seats(rows: Tensor, num_groups: int, seats: int, seat_index: Tensor) -> Tensor:
    """[B, Hkv, R, N] -> [C, Hkv, seats * R, N]: the rows of a group stacked, empty seats 0."""
    if len(rows) < num_groups * seats:
        rows = rows.new_zeros(num_groups * seats, *rows.shape[1:]).index_copy_(0, seat_index, rows)
    return rows.unflatten(0, (num_groups, seats)).transpose(1, 2).flatten(2, 3)


def seats_to_rows(grid: Tensor, seats: int, seat_index: Tensor) -> Tensor:
    """[C, Hkv, seats * R, N] -> [B, Hkv, R, N], the inverse."""
    rows = grid.unflatten(2, (seats, -1)).transpose(1, 2).flatten(0, 1)
    return rows if len(seat_index) == len(rows) else rows[seat_index]


def _visible(prefix_lengths: Tensor, suffix_lengths: Tensor, prefix: int, suffix: int, window: int | None) -> Tensor:
    """[B, P + S] bool: which keys the newest token of each row sees."""
    at_prefix = torch.arange(prefix, device=prefix_lengths.device)
    at_suffix = torch.arange(suffix, device=prefix_lengths.device)
    prefix_lengths, suffix_lengths = prefix_lengths[:, None], suffix_lengths[:, None]
    in_prefix, in_suffix = at_prefix < prefix_lengths, at_suffix < suffix_lengths
    if window is not None:
        first = prefix_lengths + suffix_lengths - window
        in_prefix = in_prefix & (at_prefix >= first)
        in_suffix = in_suffix & (at_suffix >= first - prefix_lengths)
    return torch.cat([in_prefix, in_suffix], -1)


def _matmul_fp32(query: Tensor, key: Tensor) -> Tensor:
    """query key^T accumulated and returned in fp32: bf16 scores near 10 would be off by 0.03."""
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        product = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32)
        return product.unflatten(0, query.shape[:2])
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.to(dtype) @ key.to(dtype).mT
