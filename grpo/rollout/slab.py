"""The KV cache while sampling, called slab: one prefix per group, shared by all its rows, and one suffix per row.

The prefix holds the prompt without its last token, the suffix that token and the sampled ones. So a fresh row is no
special case: its first sampled token comes from an ordinary decode step. The numbers of rows and groups are planned
from a memory budget before anything is allocated, and never exceeded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.machine import memory_share

MEMORY_SHARE = 0.3  # of the device's memory: the budget if rollout.kv_gib is not set
KEEP_BELOW = 0.2  # of a CUDA device's memory: the largest slab that is kept between calls
PREFIX_STEP = 64  # prefix sizes are multiples of it, so that a slightly longer prompt still fits the last call's slab
GIB = 2**30


class LayerShape(NamedTuple):
    """What one layer stores for one token."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value."""
        return self.heads * (self.key_width + self.value_width) * self.dtype.itemsize


class Probe:
    """Takes the slab's place in one small forward pass and learns what every layer stores."""

    layout = None

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> None:
        """Record what the layer stores. key, value: [_, Hkv, _, D], whatever it produced."""
        if index in self.shapes:
            raise ValueError(
                f"layer {index} attends twice in one forward pass, which rollout does not support; use another model"
            )
        self.shapes[index] = LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype)


@dataclass(frozen=True)
class Plan:
    """The sizes of a slab, and the workload they were chosen for: the largest of each quantity over all calls so far.

    It decides which rows are decoded together, and that affects the last bits of every log-prob: so it is saved with
    the run.
    """

    num_problems: int
    num_rows: int
    num_groups: int
    prefix_size: int  # tokens
    suffix_size: int  # tokens: max_new_tokens, and one scratch column for rows that have ended

    def num_bytes(self, token_bytes: int) -> int:
        """Bytes of the whole slab. token_bytes: of one token in all layers."""
        return token_bytes * (self.num_groups * self.prefix_size + self.num_rows * self.suffix_size)

    def fits(self, num_problems: int, longest_prefix: int, suffix_size: int) -> bool:
        """Whether a call of this size can use this plan."""
        is_large_enough = num_problems <= self.num_problems and longest_prefix <= self.prefix_size
        return is_large_enough and suffix_size == self.suffix_size


def make_plan(
    token_bytes: int,
    budget: int,
    *,
    num_problems: int,
    group_size: int,
    max_rows: int,
    longest_prefix: int,
    suffix_size: int,
    bucket: Callable[[int], int],
) -> Plan:
    """The plan with as many rows as `budget` bytes hold, at most max_rows; ValueError if not even one group fits.

    bucket: rounds a number of rows up to a size of decode step. Memory permitting, the slab has room for twice the
    groups that fill its rows, or four times if their prefixes take at most a quarter of the suffixes' memory: rows end
    one by one, and a group's last row keeps its prefix occupied, so without spare groups none could be admitted.
    """
    prefix_size = -(-longest_prefix // PREFIX_STEP) * PREFIX_STEP
    for limit in range(min(max_rows, num_problems * group_size), group_size - 1, -1):
        rows = bucket(limit)
        least = -(-rows // group_size)  # every row of a bucket, idle ones too, needs a seat in some group
        for times in (4, 2, 1):
            groups = min(times * (limit // group_size), num_problems)
            plan = Plan(num_problems, rows, max(groups, least), prefix_size, suffix_size)
            is_cheap = times < 4 or groups * prefix_size <= rows * suffix_size // 4
            if is_cheap and plan.num_bytes(token_bytes) <= budget:
                return plan
    raise ValueError(
        f"the KV cache budget of {budget / GIB:.3g} GiB cannot hold one group: {group_size} completions of "
        f"{suffix_size - 1} tokens plus a prompt of {longest_prefix + 1} need "
        f"{plan.num_bytes(token_bytes) / GIB:.3g} GiB; raise rollout.kv_gib, or lower group_size, max_new_tokens or "
        "the length of the prompts"
    )


def kv_budget(kv_gib: float | None, device: torch.device) -> int:
    """Bytes that keys and values may take: rollout.kv_gib where given, else MEMORY_SHARE of the device's memory."""
    return int(MEMORY_SHARE * total_memory(device) if kv_gib is None else kv_gib * GIB)


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory; on CPU this rank's share of the machine's."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory_share()


def is_kept(num_bytes: int, device: torch.device) -> bool:
    """Whether a slab stays allocated while the policy trains. Never on CPU, where making it again costs nothing."""
    return device.type == "cuda" and num_bytes <= KEEP_BELOW * total_memory(device)


class Layer(NamedTuple):
    prefix_key: Tensor  # [groups, Hkv, prefix_size, D]
    prefix_value: Tensor
    suffix_key: Tensor  # [rows, Hkv, suffix_size, D]
    suffix_value: Tensor


@dataclass(frozen=True)
class Prefill:
    """Layout of a forward pass that reads prompts, padded on the right, and stores them in the prefixes of `groups`
    from position `start` on; what comes before is stored already."""

    groups: Tensor  # [n] int64
    start: int


@dataclass
class Decode:
    """Layout of a forward pass that reads one token per row. kernels/decode_attention/reference.py defines the rest."""

    seats: int
    seat_index: Tensor  # [B] int64
    prefix_lengths: Tensor  # [B] int64
    suffix_lengths: Tensor  # [B] int64, without the token read now; -1 for a row that has ended
    num_groups: int
    longest_prefix: int
    longest_suffix: int  # with the token read now; both longest_* are upper bounds, known without asking the device


class KVSlab:
    """The storage; its `layout` tells the attention function what the current forward pass is."""

    def __init__(self, plan: Plan, shapes: dict[int, LayerShape], device: torch.device, impl: str):
        self.plan = plan
        self.impl = impl  # of kernels.decode_attention
        self.layers = {index: self._allocate(shape, device) for index, shape in shapes.items()}
        self.layout: Prefill | Decode | None = None

    def _allocate(self, shape: LayerShape, device: torch.device) -> Layer:
        sizes = [(self.plan.num_groups, self.plan.prefix_size), (self.plan.num_rows, self.plan.suffix_size)]
        widths = [shape.key_width, shape.value_width]
        make = lambda count, size, width: torch.zeros(count, shape.heads, size, width, dtype=shape.dtype, device=device)
        return Layer(*(make(count, size, width) for count, size in sizes for width in widths))

    def layer(self, index: int, key: Tensor, value: Tensor) -> Layer:
        """The storage of one layer."""
        return self.layers[index]

    def clear(self, groups: slice, rows: slice) -> None:
        """Zero what earlier owners left: what is masked gets probability 0, but 0 times NaN is NaN."""
        for layer in self.layers.values():
            for prefix in layer[:2]:
                prefix[groups] = 0
            for suffix in layer[2:]:
                suffix[rows] = 0

    def share(self, group: int, others: slice, length: int) -> None:
        """Copy the first `length` tokens of a group's prefix into the prefixes of the groups `others`."""
        for layer in self.layers.values():
            for prefix in layer[:2]:
                prefix[others, :, :length] = prefix[group, :, :length]

    def move(self, groups: Tensor, rows: Tensor, to: Tensor, longest_suffix: int) -> None:
        """Compact: `groups` move to the front, `rows` to `to`. The right-hand sides are copies, so overlap is safe.

        groups: ascending, on the host; where they are the first already, their prefixes stay where they are.
        """
        is_in_place, groups = int(groups[-1]) + 1 == len(groups), groups.to(rows.device)
        for layer in self.layers.values():
            for prefix in () if is_in_place else layer[:2]:
                prefix[: len(groups)] = prefix[groups]
            for suffix in layer[2:]:
                suffix[to, :, :longest_suffix] = suffix[rows, :, :longest_suffix]
