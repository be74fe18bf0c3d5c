"""The records that modules pass to each other, in the order in which data flows.

Problem -> Group of Completions -> Scores -> Batch (optimizer steps of MicroBatches) -> token losses.
Problems, completions and groups are plain Python: they travel between ranks and to disk. P counts
prompts, G completions of each, N = P * G sequences, T completion tokens (always flat, never padded).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # reward workers import this module, and must start without loading torch
    import torch
    from torch import Tensor

MIN_COMMON_PREFIX = 32  # tokens; for a shorter prefix one more part of attention costs more than sharing saves
OK, ABSTAIN, TIMEOUT, ERROR = "ok", "abstain", "timeout", "error"
TENSOR_FIELDS = ("components", "total", "scored", "lengths", "truncated")  # the fields of Scores that are tensors


@dataclass(frozen=True)
class Problem:
    """One thing to solve. `prompt` and `prompt_ids` are filled by the task's prompter."""

    id: str  # unique in its data set, for example "train/17"
    question: str
    answer: str  # the reference answer, as text
    solution: str = ""  # a worked solution, if the data has one: for exemplars and supervised training
    columns: dict[str, Any] = field(default_factory=dict)  # its row's further columns, passed to reward functions
    index: int = 0  # its place in the training stream or the evaluated split; sampling's random numbers depend on it
    prompt: str = ""
    prompt_ids: tuple[int, ...] = ()


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Length in tokens of the prompts' longest common prefix that leaves each its last token; 0 for a single prompt,
    or below MIN_COMMON_PREFIX, where sharing does not pay."""
    if len(prompts) < 2:
        return 0
    length = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
    return length if length >= MIN_COMMON_PREFIX else 0


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `text` ends before the stop string; `ids` include it."""

    ids: list[int]
    logprobs: list[float]  # natural log, of each id as drawn: after temperature, top-p, top-k and min-p
    text: str
    finish: str  # eos, stop or length
    sample: int  # 0 .. G-1


@dataclass(frozen=True)
class Group:
    """The G completions of one prompt and the training step that drew them."""

    problem: Problem
    completions: list[Completion]
    step: int

    @property
    def index(self) -> int:
        return self.problem.index

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.problem.prompt_ids


@dataclass(frozen=True)
class Scores:
    """Rewards of P groups of G completions in K components, of one rank or of all.

    components: [P, G, K] fp32, unweighted; NaN where the status is not ok.   status: nested lists [P][G][K].
    total: [P, G] fp32, weighted sum (an abstaining component adds 0).   scored: [P, G] bool; False takes the
    completion out of its group's statistics (a weighted component timed out or failed, or all of them abstained).
    lengths: [P, G] int64, tokens of each completion.   truncated: [P, G] bool, finish is `length`.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    components: Tensor
    status: list[list[list[str]]]
    total: Tensor
    scored: Tensor
    lengths: Tensor
    truncated: Tensor

    def means(self) -> dict[str, float]:
        """Mean total reward of scored completions, mean of each component over those it judged, share unscored."""
        components = {f"reward/{name}": self.components[..., k].nanmean().item() for k, name in enumerate(self.names)}
        unscored = 1 - self.scored.float().mean().item()
        return {"reward": self.total[self.scored].mean().item(), **components, "unscored": unscored}

    def pass_rates(self, component: str) -> list[float | None]:
        """For each group, the share of the completions judged by the component that it gave 1 or more; None of none."""
        values = self.components[..., self.names.index(component)]
        counts = zip((values >= 1).sum(1).tolist(), (~values.isnan()).sum(1).tolist(), strict=True)
        return [passed / judged if judged else None for passed, judged in counts]

    def pick(self, groups: list[int]) -> Scores:
        """The scores of these groups, in this order."""
        columns = {name: getattr(self, name)[groups] for name in TENSOR_FIELDS}
        return replace(self, **columns, status=[self.status[g] for g in groups])


def join_scores(draws: list[Scores]) -> Scores:
    """The groups of several Scores, one after the other."""
    import torch

    columns = {name: torch.cat([getattr(draw, name) for draw in draws]) for name in TENSOR_FIELDS}
    return replace(draws[0], **columns, status=[row for draw in draws for row in draw.status])


def merge_scores(shares: list[Scores]) -> Scores:
    """Scores of all W ranks in the order of prompts, from each rank's own: prompt i was on rank i mod W."""
    each = len(shares[0].status)
    return join_scores(shares).pick([rank * each + i for i in range(each) for rank in range(len(shares))])


class Movable:
    """A record that holds tensors, or records of them."""

    def to(self, device: torch.device | str) -> Self:
        """The same record with every tensor on `device`."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")})


@dataclass
class TokenColumns(Movable):
    """Per-token data of a micro-batch's completions: flat [T], one sequence after the other.

    `weight` is final: the loss is the plain sum of weight * loss over all tokens, micro-batches and ranks
    (times the world size where DDP or FSDP takes the mean over ranks).
    """

    target: Tensor  # [T] int64: the token
    sequence: Tensor  # [T] int64: index of its sequence in this micro-batch
    sampler: Tensor  # [T] fp32 log-prob reported by the sampler
    old: Tensor | None = None  # [T] fp32 log-prob at the start of the update; None: use the current one
    ref: Tensor | None = None  # [T] fp32 log-prob under the reference; None: not asked for
    entropy: Tensor | None = None  # [T] fp32 at the start of the update, nats; None: not asked for
    advantage: Tensor | None = None  # [T] fp32
    weight: Tensor | None = None  # [T] fp32, 0 where the token is not active
    counted: Tensor | None = None  # [T] bool: in the loss's denominators
    active: Tensor | None = None  # [T] bool: contributes a gradient
    head_rows: Tensor | None = None  # int64: indices of the counted tokens, ascending; None: all are counted


@dataclass(eq=False)  # not frozen: torch 2.11 specialises compiled code on the contents of frozen dataclasses
class SharedPrefix(Movable):
    """Which tokens of one packed row of length L attend to which.

    The row holds one group after the other: its prompt, once, then each completion without its last token. A token
    attends, causally, to its group's prompt and to its own completion. Each completion's positions continue from the
    prompt's. A prefix common to all prompts of the row (the same worked exemplars, say) comes once, before the first
    group (`common`): every token attends to it too, and the prompts continue from it.
    """

    common: slice  # the tokens that all others see; slice(0, 0): no common prefix
    groups: list[tuple[slice, list[slice]]]  # of prompt and completions; empty for a one-token completion
    group: Tensor  # [L] int64, index in this row; -1: common
    completion: Tensor  # [L] int64: 0 in a prompt, 1, 2, ... in the completions of a group
    position: Tensor  # [L] int64
    # The same as variable-length attention: its sequences have the queries common | prompt | c1 | c2 ... and the keys
    # common | common, prompt | common, prompt, c1 | common, prompt, c2 ...
    key_index: Tensor  # [K] int64: index in the row of the token that each key comes from
    query_starts: Tensor  # [sequences + 1] int32
    key_starts: Tensor  # [sequences + 1] int32
    longest_query: int
    longest_key: int


@dataclass
class MicroBatch(Movable):
    """One forward and backward pass: one packed row, or a row per sequence, padded on the right.

    `source[t]` indexes the hidden states, flattened to [rows * length], at the position that predicts token t. It is
    the only place where tokens are shifted against log-probs: made by grpo.batch, applied in grpo.logprobs.
    """

    input_ids: Tensor  # [rows, length] int64
    position_ids: Tensor  # [rows, length] int64
    source: Tensor  # [T] int64
    tokens: TokenColumns
    sequences: list[tuple[int, int]]  # (group, sample); group indexes this rank's list. Empty: a dummy of weight 0
    shared_prefix: SharedPrefix | None = None  # None: padded rows


@dataclass
class Batch:
    """Optimizer steps, each a list of micro-batches: equally many on every rank, the same in every pass."""

    optimizer_steps: list[list[MicroBatch]]  # those of one pass
    passes: int
    groups: list[range]  # of each optimizer step: indices into this rank's list, skipped groups included
    lengths: Tensor  # [groups of this rank, G] int64: tokens of each completion
    source_groups: list[Group] = field(default_factory=list)  # this rank's list, to repack in smaller micro-batches

    @property
    def micro_batches(self) -> list[MicroBatch]:
        return [micro_batch for step in self.optimizer_steps for micro_batch in step]
