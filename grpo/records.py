"""Every record that crosses a doorway, in the order in which data flows.

Problem -> Group of Completions -> Scores -> Batch of OptimizerSteps of MicroBatches -> token losses.
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

LEAST_COMMON = 32  # tokens; a shorter beginning does not pay for a further part of attention
OK, ABSTAIN, TIMEOUT, ERROR = "ok", "abstain", "timeout", "error"
BY_COMPLETION = ("components", "total", "scored", "lengths", "truncated")  # the tensors of Scores


@dataclass(frozen=True)
class Problem:
    """One thing to solve. `prompt` and `prompt_ids` are filled by the task's prompter."""

    id: str  # identity in its data set, for example "train/17"
    question: str
    answer: str  # the reference answer, as text
    solution: str = ""  # a worked solution, where the data has one: exemplars and supervised training
    columns: dict[str, Any] = field(default_factory=dict)  # further columns that reward functions may ask for
    index: int = 0  # global problem index: its place in the stream, or in an evaluated split; keys random numbers
    prompt: str = ""
    prompt_ids: tuple[int, ...] = ()


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens the prompts have in common at their start, each but for its last; 0 where these are fewer than
    LEAST_COMMON, and not worth sharing."""
    if len(prompts) < 2:
        return 0
    length = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
    return length if length >= LEAST_COMMON else 0


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `text` is cut before the stop string; `ids` are kept through it."""

    ids: list[int]
    logprobs: list[float]  # of each id under the distribution that it was drawn from (tempered, truncated), natural log
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
    """Rewards of P groups of G completions by K components, over all ranks or of one rank.

    components: [P, G, K] fp32, unweighted; NaN where the status is not ok.   status: nested lists [P][G][K].
    total: [P, G] fp32, weighted sum (an abstaining component adds 0).   scored: [P, G] bool; False takes the
    completion out of its group's statistics (a weighted component timed out or failed, or all of them abstained).
    lengths: [P, G] int64, tokens of each completion.   truncated: [P, G] bool, ended by `length`.
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
        """Mean total over what could be scored, and of each component over what it judged."""
        components = {f"reward/{name}": self.components[..., k].nanmean().item() for k, name in enumerate(self.names)}
        unscored = 1 - self.scored.float().mean().item()
        return {"reward": self.total[self.scored].mean().item(), **components, "unscored": unscored}

    def pass_rates(self, component: str) -> list[float | None]:
        """Of each group, the share of completions to which the component gave 1 or more; None where it judged none."""
        values = self.components[..., self.names.index(component)]
        counts = zip((values >= 1).sum(1).tolist(), (~values.isnan()).sum(1).tolist(), strict=True)
        return [passed / judged if judged else None for passed, judged in counts]

    def pick(self, groups: list[int]) -> Scores:
        """Of these groups, in this order."""
        columns = {name: getattr(self, name)[groups] for name in BY_COMPLETION}
        return replace(self, **columns, status=[self.status[g] for g in groups])


def join_scores(draws: list[Scores]) -> Scores:
    """Scores of one draw after another."""
    import torch

    columns = {name: torch.cat([getattr(draw, name) for draw in draws]) for name in BY_COMPLETION}
    return replace(draws[0], **columns, status=[row for draw in draws for row in draw.status])


def merge_scores(shares: list[Scores]) -> Scores:
    """Scores of all ranks from each rank's own: prompt i was on rank i mod W."""
    each = len(shares[0].status)
    return join_scores(shares).pick([rank * each + i for i in range(each) for rank in range(len(shares))])


class Movable:
    """A record that holds tensors, or records of them."""

    def to(self, device: torch.device | str) -> Self:
        """The same record with every tensor on `device`."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")})


@dataclass
class TokenColumns(Movable):
    """What is known of each completion token of a micro-batch: flat [T], in the order of its sequences.

    `weight` is final: splitting, packing or accumulating multiplies nothing more, except the world size
    where the reduction over ranks is a mean.
    """

    target: Tensor  # [T] int64: the token
    sequence: Tensor  # [T] int64: its row among the sequences of this micro-batch
    sampler: Tensor  # [T] fp32 log-prob as drawn
    old: Tensor | None = None  # [T] fp32 log-prob at the start of the update; None: use the current one
    ref: Tensor | None = None  # [T] fp32 log-prob under the frozen reference; None: not asked for
    entropy: Tensor | None = None  # [T] fp32 at the start of the update, nats; None: not asked for
    advantage: Tensor | None = None  # [T] fp32
    weight: Tensor | None = None  # [T] fp32, 0 where the token is not active
    counted: Tensor | None = None  # [T] bool: in the denominators
    active: Tensor | None = None  # [T] bool: contributes a gradient
    head_rows: Tensor | None = None  # int64: counted tokens, ascending; None: all of them


@dataclass(eq=False)  # not frozen: torch.compile of 2.11 looks into what is, and compiles for each number of groups
class SharedPrefix(Movable):
    """How the tokens of one packed row of length L see each other.

    The row holds groups one after the other: each its prompt, once, then its completions without their last token.
    A token attends to the prompt of its group and to its own completion. Positions restart after the prompt. Where all
    prompts of the row begin alike, as with the same worked exemplars, their beginning stands once before the first
    group (`common`): every token attends to it too, and prompts go on from there.
    """

    common: slice  # rows that every other row sees; of none: slice(0, 0)
    groups: list[tuple[slice, list[slice]]]  # rows of prompt and completions; a one-token completion has none
    group: Tensor  # [L] int64, counted in this row; -1: common
    completion: Tensor  # [L] int64: 0 in a prompt, then 1, 2, ... in its group
    position: Tensor  # [L] int64
    # The same as one attention over sequences of unequal length, with keys prompt | prompt, c1 | prompt, c2 ..., and
    # the common rows before those of each:
    key_rows: Tensor  # [K] int64: the row that each key comes from
    query_starts: Tensor  # [sequences + 1] int32
    key_starts: Tensor  # [sequences + 1] int32
    longest_query: int
    longest_key: int


@dataclass
class MicroBatch(Movable):
    """One forward and backward pass: one packed row, or a row per sequence, padded on the right.

    Positions are explicit. `source[t]` is the flat row (of the [rows * length] hidden states) that predicts token t:
    the only shift of tokens against log-probs is made there, by grpo.batch, and applied in grpo.logprobs.
    """

    input_ids: Tensor  # [rows, length] int64
    position_ids: Tensor  # [rows, length] int64
    source: Tensor  # [T] int64
    tokens: TokenColumns
    sequences: list[tuple[int, int]]  # (group, sample) of each, group counted in this rank's list; none: weight 0
    shared_prefix: SharedPrefix | None = None  # None: padded rows


@dataclass
class Batch:
    """A list of optimizer steps, each a list of micro-batches: equally many on every rank, the same in every pass."""

    optimizer_steps: list[list[MicroBatch]]  # of one pass
    passes: int
    groups: list[range]  # of each optimizer step, by place in this rank's list, silent ones too
    lengths: Tensor  # [groups of this rank, G] int64: tokens of each completion
    made_of: list[Group] = field(default_factory=list)  # this rank's list: what packing anew needs

    @property
    def micro_batches(self) -> list[MicroBatch]:
        return [micro_batch for step in self.optimizer_steps for micro_batch in step]
