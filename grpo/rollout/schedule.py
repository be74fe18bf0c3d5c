"""Which sequences are being decoded, in which rows, and when they give way to others.

A group is admitted whole, because its prompt is computed once; a row leaves alone. Rows lie in the order of their
groups. Finished rows go on decoding, unheard, until the live ones have shrunk enough for a move to pay. All of this
is known on the host; the device only learns the outcome.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINK_BELOW = 0.75  # of the rows still live: then move them together, into fewer


def bucket(rows: int) -> int:
    """The next of 8, 16, 32, 64, 96, ...: numbers of rows that suit a device."""
    return next((size for size in (8, 16) if rows <= size), -(-rows // 32) * 32)


def ladder(most: int) -> list[int]:
    """The buckets for which a step is prepared ahead, where the largest is `most`: each some SHRINK_BELOW of the one
    above. More of them would cost more, to make each step and to move rows each time, than a few rows less would save.
    """
    sizes = [most]
    while (above := sizes[-1]) > 8:
        sizes.append(min(bucket(int(SHRINK_BELOW * above)), above - 32 if above > 32 else above // 2))
    return sizes


def seat(group: Tensor, seats: int, size: int) -> tuple[Tensor, Tensor]:
    """Places of `size` rows, of which only len(group) have an owner, and which rows those are.

    group: [n] int64, ascending.  Returns place [size] int64, strictly increasing (group * seats + seat), and row [n].
    Rows without an owner take empty seats, of which there must be enough.
    """
    count = torch.bincount(group)
    place = group * seats + torch.arange(len(group)) - (count.cumsum(0) - count)[group]
    if size == len(group):
        return place, torch.arange(size)
    is_empty = torch.ones(size, dtype=torch.bool)  # of the first `size` seats at most len(group) are taken
    is_empty[place[place < size]] = False
    idle = is_empty.nonzero()[: size - len(group), 0]
    places = torch.cat([place, idle]).sort().values
    return places, torch.searchsorted(places, place)


@dataclass
class Rows:
    """The rows of one decode step: how many there are and who owns them, [n] each, on the host."""

    size: int  # rows, with those that have no owner
    seats: int  # of each group
    row: Tensor  # int64, ascending: the rows that have an owner
    sequence: Tensor  # int64: its place among the results
    group: Tensor  # int64: its group in the slab, ascending from 0 without a gap

    @classmethod
    def none(cls) -> Rows:
        """No rows."""
        return cls(0, 0, *(torch.empty(0, dtype=torch.int64) for _ in range(3)))


def prefill_chunks(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in chunks of similar length: at most max_tokens after padding, but always one prompt."""
    chunks: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunks[-1] and (len(chunks[-1]) + 1) * lengths[index] > max_tokens:
            chunks.append([])
        chunks[-1].append(index)
    return chunks
