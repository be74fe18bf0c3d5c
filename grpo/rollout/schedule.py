"""Which sequences are decoded in which rows, and when finished ones make room for others.

A group is admitted whole, because its prompt is prefilled once; rows end one by one. Rows are in the order of their
groups. Finished rows go on decoding, to no effect, until so few are alive that moving these together pays. All of this
is decided on the host; the device only gets the outcome.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINK_BELOW = 0.75  # as soon as fewer than this share of the rows are alive, moving them into fewer rows pays


def bucket(rows: int) -> int:
    """Round up to the next of 8, 16, 32, 64, 96, ...: batch sizes that suit a device."""
    return next((size for size in (8, 16) if rows <= size), -(-rows // 32) * 32)


def ladder(most: int) -> list[int]:
    """The sizes of step that CUDA graphs are captured for, from `most` down: each about SHRINK_BELOW of the one above.
    More of them would cost more, in captures and in moving rows, than decoding a few rows less would save.
    """
    sizes = [most]
    while (above := sizes[-1]) > 8:
        sizes.append(min(bucket(int(SHRINK_BELOW * above)), above - 32 if above > 32 else above // 2))
    return sizes


def assign_seats(group: Tensor, seats: int, size: int) -> tuple[Tensor, Tensor]:
    """Give each of `size` rows a seat in the grid of groups x seats; only n = len(group) of the rows have an owner.

    group: [n] int64, ascending, of each owner.  Returns seat_index [size] int64 (group * seats + seat), strictly
    increasing, and row [n], that of each owner. Rows without an owner take empty seats, of which there must be enough.
    """
    count = torch.bincount(group)
    seat_index = group * seats + torch.arange(len(group)) - (count.cumsum(0) - count)[group]
    if size == len(group):
        return seat_index, torch.arange(size)
    is_empty = torch.ones(size, dtype=torch.bool)  # enough: at most len(group) of the first `size` seats are taken
    is_empty[seat_index[seat_index < size]] = False
    idle = is_empty.nonzero()[: size - len(group), 0]
    all_seats = torch.cat([seat_index, idle]).sort().values
    return all_seats, torch.searchsorted(all_seats, seat_index)


@dataclass
class Rows:
    """The rows of one decode step and their n owners, on the host."""

    size: int  # rows, including those without an owner
    seats: int  # of each group
    row: Tensor  # [n] int64, ascending: the rows that have an owner
    sequence: Tensor  # [n] int64: the owner's index among the results
    group: Tensor  # [n] int64: the owner's group in the slab, ascending from 0 without a gap

    @classmethod
    def none(cls) -> Rows:
        """No rows."""
        return cls(0, 0, *(torch.empty(0, dtype=torch.int64) for _ in range(3)))


def prefill_chunks(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in chunks of similar length: at most max_tokens after padding, but at least one prompt."""
    chunks: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunks[-1] and (len(chunks[-1]) + 1) * lengths[index] > max_tokens:
            chunks.append([])
        chunks[-1].append(index)
    return chunks
