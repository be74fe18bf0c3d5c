"""A check on the first batch of a run: do sampler, packed rows and padded rows compute the same, up to rounding?

Log-probs of a few completions are compared with those of padded rows in fp32, which every model supports. Called by
train.py once per process, before the first update.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.batch import packed_row, padded_rows
from grpo.layers import in_fp32
from grpo.logprobs import LogprobModel, PolicyModule
from grpo.records import Group, MicroBatch

YARDSTICK_SIZE = 3  # completions per group: in a packed row one is first, one between two others, one last
# Tokens of each, at most: in fp32 on CUDA torch has no fused kernel for heads that share keys, and stores all scores.
YARDSTICK_LENGTH = 512


def check_first_batch(policy: PolicyModule, groups: list[Group], device: torch.device, layout: str) -> str:
    """The differences found, as a sentence. ValueError for more than rounding explains."""
    yardstick = make_yardstick(policy, groups, device)
    found = f"the sampler differs by {check_sampler(policy, yardstick):.1g} nats"
    if layout == "packed":
        mean, largest = check_packing(policy, yardstick)
        found += f", packed rows by {mean:.1g} (at most {largest:.1g})"
    return f"log-probs of the first batch, compared with padded rows: {found}"


class Yardstick(NamedTuple):
    """A few completions of the first batch in padded rows, with their log-probs, [T] each: what checks compare with."""

    groups: list[Group]
    rows: MicroBatch
    logprobs: Tensor  # in the policy's own precision
    logprobs_fp32: Tensor  # of the working copy, computed in fp32


@torch.no_grad()
def make_yardstick(policy: PolicyModule, groups: list[Group], device: torch.device) -> Yardstick:
    """Up to YARDSTICK_SIZE different completions of the smallest group that has two different ones, if any does, and as
    many of the smallest other group; of each completion at most YARDSTICK_LENGTH tokens."""
    groups = [_beginning(group) for group in groups]
    differing = [group for group in groups if len({tuple(completion.ids) for completion in group.completions}) > 1]
    group = min(differing or groups, key=_num_tokens)
    pair = [group, *sorted((other for other in groups if other is not group), key=_num_tokens)[:1]]
    first_of: dict[tuple[int, ...], int] = {}
    for s, completion in enumerate(group.completions):
        first_of.setdefault(tuple(completion.ids), s)
    members = [(0, s) for s in list(first_of.values())[:YARDSTICK_SIZE]]
    members += [(g, s) for g, other in enumerate(pair[1:], 1) for s in range(len(other.completions[:YARDSTICK_SIZE]))]
    rows = padded_rows(pair, members, device)
    logprobs = logprobs_fp32 = policy(rows)[0]
    if policy.working.dtype.itemsize < 4:
        options = {"temperature": policy.compute.temperature, "impl": policy.compute.impl}
        with in_fp32(policy.working):  # not the masters, which may be sharded
            logprobs_fp32 = LogprobModel(policy.working, **options)(rows)[0]
    return Yardstick(pair, rows, logprobs, logprobs_fp32)


def _beginning(group: Group) -> Group:
    cut = slice(YARDSTICK_LENGTH)
    return replace(group, completions=[replace(c, ids=c.ids[cut], logprobs=c.logprobs[cut]) for c in group.completions])


def _num_tokens(group: Group) -> int:
    return len(group.prompt_ids) + sum(len(completion.ids) for completion in group.completions)


def check_sampler(policy: PolicyModule, yardstick: Yardstick) -> float:
    """Mean error of the sampler's log-probs, in nats. ValueError for more than rounding explains.

    Finds models whose attention has features that rollout does not implement: they would be sampled wrongly.
    """
    found = (yardstick.rows.tokens.sampler, yardstick.logprobs)
    error, rounding = ((logprobs - yardstick.logprobs_fp32).abs().double().mean().item() for logprobs in found)
    # In bf16 the sampler rounds its logits, too, which the training head does not: a logit of 20 by up to 0.03.
    allowed = 4 * rounding + (1e-2 if policy.working.dtype.itemsize >= 4 else 0.1)
    if not error <= allowed:  # also where it is NaN
        raise ValueError(
            f"the sampler's log-probs differ by {error:.2g} nats on average; rounding explains at most {allowed:.2g}: "
            f"rollout does not compute what {type(policy.working).__name__} computes; use another model"
        )
    return error


@torch.no_grad()
def check_packing(policy: PolicyModule, yardstick: Yardstick) -> tuple[float, float]:
    """Mean and largest error of packed log-probs, in nats. ValueError if either is more than rounding explains.

    Error: distance from the padded log-probs of the working copy, computed in fp32. Allowed: four times the error of
    padded rows in the policy's own precision, plus a small constant. A completion that sees another one or the other
    group, or does not see its prompt, is off by far more.
    """
    rows, pair = yardstick.rows, yardstick.groups
    packed = policy(packed_row(pair, rows.sequences, rows.source.device))[0]
    error, rounding = ((logprobs - yardstick.logprobs_fp32).abs().double() for logprobs in (packed, yardstick.logprobs))
    found = (error.mean().item(), error.max().item())
    allowed = (4 * rounding.mean().item() + 1e-3, 4 * rounding.max().item() + 2e-2)
    if not (found[0] <= allowed[0] and found[1] <= allowed[1]):  # also where one is NaN
        raise ValueError(
            f"packed log-probs of groups {[group.index for group in pair]} differ by {found[0]:.2g} nats on average "
            f"and {found[1]:.2g} at most; rounding explains at most {allowed[0]:.2g} and {allowed[1]:.2g}: completions "
            "of this model do not see exactly their prompt and themselves; use batch.layout=padded"
        )
    return found
