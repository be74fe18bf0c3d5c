"""Keys and values while sampling: a prefix per group, read by all its rows, and a suffix per row.

The prefix holds the prompt without its last token, the suffix that token and the sampled ones; so a fresh row is like
any other, and its first sampled token comes from an ordinary decode step. Storage is allocated by the first forward
pass, layer by layer, with the heads, widths, dtype and device that the model's own keys and values have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Layer(NamedTuple):
    prefix_key: Tensor  # [groups, Hkv, prefix_size, D]
    prefix_value: Tensor
    suffix_key: Tensor  # [rows, Hkv, suffix_size, D]
    suffix_value: Tensor


@dataclass(frozen=True)
class Prefill:
    """This forward pass reads prompts, padded on the right, and stores them as the prefixes of `groups`."""

    groups: Tensor  # [n] int64


@dataclass
class Decode:
    """This forward pass reads one token of each row. See kernels/decode_attention for place and seats."""

    num_groups: int
    seats: int
    place: Tensor  # [B] int64
    row: Tensor  # [B] int64: 0 .. B-1
    prefix_lengths: Tensor  # [B] int64
    suffix_lengths: Tensor  # [B] int64, without the token read now
    longest_prefix: int
    longest_suffix: int  # with the token read now; the two are upper bounds, known without asking the device


class KVSlab:
    """The storage, and in `layout` what the attention function must do in the current forward pass."""

    def __init__(self, *, num_groups: int, num_rows: int, prefix_size: int, suffix_size: int, impl: str):
        self.num_groups, self.num_rows = num_groups, num_rows
        self.prefix_size, self.suffix_size = prefix_size, suffix_size
        self.impl = impl  # of kernels.decode_attention
        self.layers: dict[int, Layer] = {}
        self.layout: Prefill | Decode | None = None

    def layer(self, index: int, key: Tensor, value: Tensor) -> Layer:
        """The storage of one layer. key, value: [_, Hkv, _, D], any that this layer made."""
        if index not in self.layers:
            self.layers[index] = Layer(
                *(x.new_zeros(self.num_groups, x.shape[1], self.prefix_size, x.shape[3]) for x in (key, value)),
                *(x.new_zeros(self.num_rows, x.shape[1], self.suffix_size, x.shape[3]) for x in (key, value)),
            )
        return self.layers[index]

    def clear(self, groups: slice, rows: slice) -> None:
        """Zero what earlier owners left: masked keys get probability 0, but 0 times NaN is NaN."""
        for layer in self.layers.values():
            for prefix in (layer.prefix_key, layer.prefix_value):
                prefix[groups] = 0
            for suffix in (layer.suffix_key, layer.suffix_value):
                suffix[rows] = 0

    def keep(self, groups: Tensor, rows: Tensor, longest_suffix: int) -> None:
        """Move these groups and rows (increasing) to the front. The right-hand sides are copies, so overlap is safe."""
        for layer in self.layers.values():
            for prefix in (layer.prefix_key, layer.prefix_value):
                prefix[: len(groups)] = prefix[groups]
            for suffix in (layer.suffix_key, layer.suffix_value):
                suffix[: len(rows), :, :longest_suffix] = suffix[rows, :, :longest_suffix]
