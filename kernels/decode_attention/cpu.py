"""On a CPU: torch's flash attention over prefix and suffix separately, merged by their log-sum-exps.

No score is stored, no key is copied. What it cannot do (a softcap, a sliding window, bf16) is left to reference.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.decode_attention.reference import rows_to_seats, seats_to_rows


def supports(query: Tensor, prefix: tuple, suffix: tuple, *, softcap=None, window=None, **layout) -> bool:
    """Whether `attend` can compute this call."""
    is_wide = window is None or window >= prefix[0].shape[2] + suffix[0].shape[2]  # so that it hides nothing
    is_plain = softcap is None and is_wide and prefix[0].shape[-1] == prefix[1].shape[-1]
    return query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64) and is_plain


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
    **others,
) -> Tensor:
    """What reference.attend computes, for calls that `supports` accepts. The output of a row with an empty suffix may
    be anything."""
    num_rows, num_heads, width = query.shape
    num_groups, kv_heads, longest, _ = prefix[0].shape
    query = query.reshape(num_rows, kv_heads, num_heads // kv_heads, width)
    output, lse = _flash(query, suffix, suffix_lengths, scale)
    if longest:
        lengths = prefix_lengths.new_zeros(num_groups)
        lengths.scatter_reduce_(0, seat_index // seats, prefix_lengths, "amax")  # amax: an idle row may say 0
        shared, shared_lse = _flash(rows_to_seats(query, num_groups, seats, seat_index), prefix, lengths, scale)
        shared, shared_lse = (seats_to_rows(part, seats, seat_index) for part in (shared, shared_lse[..., None]))
        share = torch.sigmoid(shared_lse - lse[..., None])  # the prefix's share of the softmax's sum
        output = torch.lerp(output, shared, share)
    return output.reshape(num_rows, num_heads, width)


def _flash(query: Tensor, stored: tuple[Tensor, Tensor], lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of [N, Hkv, R, D] to the first lengths[n] of [N, Hkv, S, D]: output, and log-sum-exp [N, Hkv, R]."""
    key, value = stored
    is_hidden = torch.arange(key.shape[2]) >= lengths[:, None]
    mask = torch.zeros(is_hidden.shape, dtype=query.dtype).masked_fill_(is_hidden, -math.inf)[:, None, None]
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=scale
    )
    return output, lse.masked_fill((lengths < 1)[:, None, None], -math.inf)  # undefined there
