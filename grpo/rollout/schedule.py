"""Which sequences are being decoded, and when they give way to others.

A group is admitted whole, because its prompt is computed once; a row leaves alone. Rows lie in the order of their
groups. Finished rows go on decoding, unheard, until the live ones have shrunk enough for a move to pay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.rollout.slab import Decode

SHRINK_BELOW = 0.75  # of the rows still live: then move them together and fill up with waiting groups


@dataclass
class Rows:
    """One entry per row being decoded: [B] each, on the model's device."""

    sequence: Tensor  # int64: its row in the results
    group: Tensor  # int64: its group's place in the slab, ascending
    token: Tensor  # int64: what it reads next
    prefix: Tensor  # int64: tokens of its prompt, without the last
    length: Tensor  # int64: tokens sampled so far, and so where the next one goes; a finished row stands still
    alive: Tensor  # bool

    @classmethod
    def empty(cls, device: torch.device) -> Rows:
        """No rows."""
        integers = [torch.empty(0, dtype=torch.int64, device=device) for _ in range(5)]
        return cls(*integers, alive=torch.empty(0, dtype=torch.bool, device=device))

    def __len__(self) -> int:
        return len(self.sequence)

    def append(self, sequence: Tensor, group: Tensor, token: Tensor, prefix: Tensor) -> Rows:
        """With fresh rows at the end."""
        new = Rows(
            sequence, group, token, prefix, torch.zeros_like(sequence), torch.ones_like(sequence, dtype=torch.bool)
        )
        return Rows(*(torch.cat([mine, theirs]) for mine, theirs in zip(self.columns(), new.columns(), strict=True)))

    def columns(self) -> list[Tensor]:
        """Every column, in the order of the constructor."""
        return list(vars(self).values())

    def keep_alive(self) -> tuple[Rows, Tensor, Tensor]:
        """Live rows with their groups renumbered from 0, and which groups and rows those were."""
        row = self.alive.nonzero()[:, 0]
        kept = Rows(*(column[row] for column in self.columns()))
        groups, kept.group = torch.unique_consecutive(kept.group, return_inverse=True)
        return kept, groups, row

    def layout(self) -> Decode:
        """Seats for every row of every group. Waits for the device: only called when rows came or went."""
        count = torch.bincount(self.group)
        first = count.cumsum(0) - count
        row = torch.arange(len(self), device=count.device)
        seats = int(count.max())
        return Decode(
            num_groups=len(count),
            seats=seats,
            place=self.group * seats + row - first[self.group],
            row=row,
            prefix_lengths=self.prefix,
            suffix_lengths=self.length,
            longest_prefix=int(self.prefix.max()),
            longest_suffix=int(self.length.max()) + 1,
        )


def prefill_chunks(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in chunks of similar length: at most max_tokens after padding, but always one prompt."""
    chunks: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunks[-1] and (len(chunks[-1]) + 1) * lengths[index] > max_tokens:
            chunks.append([])
        chunks[-1].append(index)
    return chunks
