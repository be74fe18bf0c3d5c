"""One rollout's optimizer steps: micro-batches, backward, check, clip, step. Called by train.py every training step.

If a rank runs out of memory, all ranks halve their micro-batches and repeat the optimizer step, with the same gradient.
Only possible while no rank waits for another: under DDP before the last micro-batch, which reduces; under FSDP never.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from grpo.batch import dummy_like, halve
from grpo.config import OptimConfig
from grpo.distributed import World
from grpo.logprobs import LogprobModel, PolicyModule, TokenLoss, frozen_logprobs
from grpo.objectives import KL_ESTIMATORS, Objective, clipped_low_and_high, kl_k3, token_loss
from grpo.records import Batch, Group, MicroBatch
from grpo.sharding import ShardedAdamW, whole_of

LESS_MEMORY = "use a smaller batch.tokens_per_micro_batch, or model.gradient_checkpointing=true"
T = TypeVar("T")


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite; the message names the step and the sequence."""


@dataclass
class Updater:
    """What an update needs besides the batch; its state remembers what failed in earlier updates.

    module: the PolicyModule; over several ranks wrapped by DDP or sharded by FSDP (grpo.sharding).
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    world: World
    max_grad_norm: float
    refresh: Callable[[], None]  # copies the masters into the working copy
    tokens_per_micro_batch: int = 0  # as configured
    max_skipped_steps: int = 0
    say: Callable[[str], None] = print
    is_warm: bool = False  # see `warm_up`
    skipped: int = 0  # consecutive skipped optimizer steps, up to now
    too_large: int | None = None  # the tokens_per_micro_batch that ran out of memory

    @property
    def token_budget(self) -> int:
        """Tokens per micro-batch: as configured, or half of that if it ran out of memory."""
        return max(1, self.tokens_per_micro_batch // (2 if self.too_large == self.tokens_per_micro_batch else 1))

    def state_dict(self) -> dict:
        return {"skipped": self.skipped, "too_large": self.too_large}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.too_large = state["skipped"], state["too_large"]


def learning_rate(step: int, optim: OptimConfig, num_steps: int) -> float:
    """Learning rate of a training step, counted from 1.

    Linear warm-up that reaches the peak at step warmup * num_steps, then constant, or half a cosine that would reach
    0 one step after the last.
    """
    warmup_steps = optim.warmup * num_steps
    if step < warmup_steps:
        return optim.lr * step / warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - warmup_steps) / (num_steps + 1 - warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(
    parameters: list[nn.Parameter], optim: OptimConfig, local_parameters: list[Tensor] | None = None
) -> torch.optim.AdamW:
    """Fused AdamW on the fp32 masters.  local_parameters: what this rank keeps of each, if they are sharded."""
    options = {name: getattr(optim, name) for name in ("lr", "betas", "eps", "weight_decay")} | {"fused": True}
    if any(isinstance(tensor, DTensor) for tensor in local_parameters or ()):
        return ShardedAdamW(local_parameters, parameters, **options)
    return torch.optim.AdamW(parameters, **options)


def update_policy(
    updater: Updater, batch: Batch, *, step: int, lr: float, progress: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """Make every optimizer step of every pass over the batch; returns metrics over all ranks (see `summarise`)."""
    for parameters in updater.optimizer.param_groups:
        parameters["lr"] = lr
    totals: dict[str, float] = {}
    done = 0
    if isinstance(updater.module, DistributedDataParallel) and not updater.is_warm:
        warm_up(updater, batch)
    if updater.world.size > 1:
        batch.optimizer_steps = [smallest_last(step, batch.source_groups) for step in batch.optimizer_steps]
    for position in [*range(len(batch.optimizer_steps))] * batch.passes:
        for name, value in optimizer_step(updater, batch, position, step=step).items():
            totals[name] = max(totals.get(name, 0.0), value) if name.endswith("_max") else totals.get(name, 0.0) + value
        done += len(batch.optimizer_steps[position])
        if progress is not None:
            progress(done, len(batch.micro_batches) * batch.passes)
    return summarise(totals)


def warm_up(updater: Updater, batch: Batch) -> None:
    """A pass of weight 0 before this process's first real one.

    DistributedDataParallel reduces its very first pass by another operation and in other buckets than all later ones:
    with three or more ranks a resumed run would differ in the last bits from one that was never interrupted.
    """
    device = updater.world.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), collective_pass(updater.world):
        forward(updater, dummy_like(batch.micro_batches[0], batch.source_groups))[0].backward()
    updater.is_warm = True


def optimizer_step(updater: Updater, batch: Batch, position: int, *, step: int) -> dict[str, float]:
    """One optimizer step of the batch; returns sums and maxima over all ranks (see `token_statistics`).

    A step whose loss or gradient is not finite is skipped and counted; NonFiniteLoss if the max_skipped_steps before it
    were skipped, too. All ranks do the same.
    """
    try:
        attempt = lambda: accumulate_gradients(updater, batch.optimizer_steps[position], step=step)
        sums = retry_with_halved_micro_batches(updater, batch, attempt)
        norm = take_step(updater, sums, step=step)
    except NonFiniteLoss as error:
        if updater.skipped == updater.max_skipped_steps:
            raise
        updater.skipped += 1
        updater.say(f"skipped an optimizer step, {updater.skipped} in a row: {error}")
        return {"skipped_steps": 1.0}
    updater.skipped = 0
    return {**sums, "grad_norm": norm, "optimizer_steps": 1.0, "skipped_steps": 0.0}


def fill_frozen(updater: Updater, batch: Batch, policy: PolicyModule, reference: LogprobModel | None) -> None:
    """`frozen_logprobs` as the objective needs them, in smaller micro-batches if a rank runs out of memory."""
    work = partial(frozen_logprobs, batch, policy, reference, always_policy=updater.objective.needs_frozen_pass)
    retry_with_halved_micro_batches(updater, batch, lambda: fits_on_every_rank(updater, work) or None)


def retry_with_halved_micro_batches(updater: Updater, batch: Batch, attempt: Callable[[], T | None]) -> T:
    """The result of `attempt`, repeated with halved micro-batches while it is None: a rank ran out of memory.

    Two ranks under DDP with three micro-batches each; the first, the largest, does not fit the memory of rank 1:

        accumulate_gradients   on rank 1 the first micro-batch raises torch.OutOfMemoryError; rank 0 finishes two
        fits_on_every_rank     catches it; world.max tells both ranks, so it is False on both
        accumulate_gradients   returns None on both, before the third micro-batch: nothing has been reduced yet
        halve_micro_batches    makes six of three on both; ValueError, which ends the run, if they are halves already
        accumulate_gradients   clears rank 0's gradients and begins again

    If rank 0 continued alone, the backward pass of its third micro-batch would wait for rank 1, which starts over. That
    last pass, and under FSDP every pass, waits for the other ranks anyway: out of memory there ends the run.
    """
    while (result := attempt()) is None:
        halve_micro_batches(updater, batch)
    return result


def fits_on_every_rank(updater: Updater, work: Callable[[], None]) -> bool:
    """Run work in which no rank waits for another, except under FSDP. Returns whether every rank had enough memory."""
    is_out_of_memory = False
    try:
        with collective_pass(updater.world) if isinstance(updater.module, FSDPModule) else contextlib.nullcontext():
            work()
    except torch.OutOfMemoryError:
        is_out_of_memory = True
    return not updater.world.max(torch.tensor(float(is_out_of_memory)))


@contextlib.contextmanager
def collective_pass(world: World) -> Iterator[None]:
    """Within it ranks wait for each other, so that one cannot give up and retry: out of memory becomes ValueError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"rank {world.rank} is out of memory in a collective pass"
        raise ValueError(f"{what}, so the run cannot retry with smaller micro-batches; {LESS_MEMORY}") from error


def halve_micro_batches(updater: Updater, batch: Batch) -> None:
    """Halve the micro-batches of this and all later batches; weights stay as they are. ValueError the second time."""
    if updater.too_large == updater.tokens_per_micro_batch:
        what = f"out of memory with {updater.token_budget} tokens, half of the first budget; {LESS_MEMORY}"
        largest = max(batch.micro_batches, key=lambda micro_batch: micro_batch.input_ids.numel())
        if len(largest.sequences) == 1 and largest.input_ids.numel() > updater.token_budget:
            what += (
                f" (the largest is a completion with its prompt, {largest.input_ids.numel()} tokens, which no budget "
                "makes smaller: use model.gradient_checkpointing=true or a smaller rollout.max_new_tokens)"
            )
        raise ValueError(what)
    updater.too_large = updater.tokens_per_micro_batch
    if updater.world.device.type == "cuda":
        torch.cuda.empty_cache()  # cached blocks have the sizes of the larger micro-batches
    updater.say(
        f"out of memory in a micro-batch of {updater.too_large} tokens: from here on {updater.token_budget}, with the "
        "same gradient; to start with this size, set batch.tokens_per_micro_batch"
    )
    batch.optimizer_steps = [halve(step, batch.source_groups) for step in batch.optimizer_steps]


def smallest_last(micro_batches: list[MicroBatch], groups: list[Group]) -> list[MicroBatch]:
    """Largest first, a single one in halves: the last pass, in which ranks wait for each other, then needs no more
    memory than those before it."""
    if len(micro_batches) == 1:
        micro_batches = halve(micro_batches, groups)
    return sorted(micro_batches, key=lambda micro_batch: -micro_batch.input_ids.numel())


def accumulate_gradients(updater: Updater, micro_batches: list[MicroBatch], *, step: int) -> dict[str, float] | None:
    """Forward and backward of every micro-batch; gradients are reduced over ranks with the last one (FSDP: with each).

    Returns sums and maxima over all ranks (see `token_statistics`), or None if a rank ran out of memory. Raises
    NonFiniteLoss, on all ranks or none.
    """
    world = updater.world
    has_buckets = isinstance(updater.module, DistributedDataParallel)
    updater.optimizer.zero_grad(set_to_none=not has_buckets)  # DDP's gradients must stay views of its buckets
    statistics, passes = [], []

    def loss_of(micro_batch: MicroBatch) -> Tensor:
        loss, logprobs, entropy = forward(updater, micro_batch)
        statistics.append(token_statistics(updater.objective, micro_batch, loss.detach(), logprobs, entropy))
        passes.append((micro_batch, logprobs))
        return loss * world.size  # cancels the mean that DDP and FSDP take: weights are over all ranks already

    num_local = len(micro_batches) - (world.size > 1)

    def local_passes() -> None:
        with updater.module.no_sync() if has_buckets else contextlib.nullcontext():
            for micro_batch in micro_batches[:num_local]:
                loss_of(micro_batch).backward()

    # Checked before the last pass, in which ranks wait for each other: until here each can give up by itself. The last
    # pass's forward must not come earlier: DDP would reduce in whichever backward pass is next, even that of a retry.
    if not fits_on_every_rank(updater, local_passes):
        return None
    for micro_batch in micro_batches[num_local:]:
        with collective_pass(world):
            loss_of(micro_batch).backward()
    reduced = reduce_statistics(world, statistics)
    if not math.isfinite(reduced["loss"]):
        culprits = [name for name in world.gather(first_bad_sequence(passes, world)) if name]
        culprits.append("every input is finite: the loss itself overflowed, or its surrogate did")
        raise NonFiniteLoss(f"the loss is {reduced['loss']} at training step {step}; {culprits[0]}")
    return reduced


def forward(updater: Updater, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Summed weighted loss of the micro-batch, and its log-probs and entropy, detached."""
    loss_of = weighted_loss(updater.objective, micro_batch)
    if not updater.objective.needs_whole_sequences:
        return updater.module(micro_batch, loss_of)
    logprobs, entropy = updater.module(micro_batch)  # not folded into the head, which sees a few tokens at a time
    return loss_of(logprobs, entropy, slice(0, len(logprobs))).sum(), logprobs.detach(), entropy.detach()


def weighted_loss(objective: Objective, micro_batch: MicroBatch) -> TokenLoss:
    """The loss of this micro-batch as a function of its log-probs and entropy: final weight times loss, per token.

    It may be called on some tokens at a time (`rows`), unless `objective.needs_whole_sequences`.
    """
    tokens = micro_batch.tokens

    def loss_of(logprobs: Tensor, entropy: Tensor, rows: slice | Tensor) -> Tensor:
        assert not objective.needs_whole_sequences or len(logprobs) == len(tokens.target), (
            f"surrogate {objective.surrogate} got {len(logprobs)} of {len(tokens.target)} tokens: not whole sequences"
        )
        pick = lambda column: None if column is None else column[rows]
        columns = {"old": tokens.old, "ref": tokens.ref, "advantages": tokens.advantage, "sequence": tokens.sequence}
        columns = {name: pick(column) for name, column in columns.items()}
        return tokens.weight[rows] * token_loss(objective, logprobs, **columns, entropy=entropy)

    return loss_of


@torch.no_grad()
def token_statistics(
    objective: Objective, micro_batch: MicroBatch, loss: Tensor, logprobs: Tensor, entropy: Tensor
) -> dict[str, Tensor]:
    """Sums over the counted tokens of one micro-batch, as scalars on its device; keys ending in `_max` are maxima."""
    tokens = micro_batch.tokens
    counted = tokens.counted
    old = logprobs if tokens.old is None else tokens.old
    low, high = clipped_low_and_high(objective, logprobs, old, tokens.advantage, tokens.sequence)
    ratio = torch.exp(logprobs - old)
    mismatch = old - tokens.sampler
    total = lambda values: torch.where(counted, values, 0).sum()
    largest = lambda values: torch.where(counted, values, 0).max()
    has_ref = tokens.ref is not None
    return {
        "loss": loss,
        "tokens": counted.sum(),
        **({"kl": total(KL_ESTIMATORS[objective.kl_estimator](logprobs, tokens.ref))} if has_ref else {}),
        "entropy": total(entropy),
        "clip_fraction_low": total(low.to(logprobs.dtype)),
        "clip_fraction_high": total(high.to(logprobs.dtype)),
        "approx_kl": total(kl_k3(old, logprobs)),
        "active": tokens.active.sum(),
        "mismatch": total(mismatch.abs()),
        "mismatch_kl": total(kl_k3(tokens.sampler, old)),
        "mismatch_outside": total((mismatch.abs() > math.log(1.25)).to(logprobs.dtype)),
        "nonzero_advantage_tokens": (tokens.active & (tokens.advantage != 0)).sum(),
        "ratio_max": largest(ratio),
        "mismatch_max": largest(mismatch.abs()),
    }


def reduce_statistics(world: World, statistics: list[dict[str, Tensor]]) -> dict[str, float]:
    """Sum (or maximum, for keys ending in `_max`) over micro-batches and ranks, with one transfer from the device."""
    names = list(statistics[0])
    table = torch.stack([torch.stack([row[name].double() for name in names]) for row in statistics]).cpu()
    sums, maxima = world.sum(table.sum(0)), world.max(table.max(0).values)
    return {name: (maxima if name.endswith("_max") else sums)[i].item() for i, name in enumerate(names)}


def first_bad_sequence(passes: list[tuple[MicroBatch, Tensor]], world: World) -> str | None:
    """Names this rank's first sequence with a log-prob (current, old, reference) or advantage that is not finite, if
    any. Its group is counted among those of all ranks."""
    for micro_batch, logprobs in passes:
        tokens = micro_batch.tokens
        columns = {"log-prob": logprobs, "old": tokens.old, "ref": tokens.ref, "advantage": tokens.advantage}
        for name, column in columns.items():
            if column is not None and len(bad := (~column.isfinite() & tokens.counted).nonzero()):
                group, sample = micro_batch.sequences[int(tokens.sequence[bad[0, 0]])]
                place = group * world.size + world.rank
                return f"the {name} of group {place}, sample {sample} of the step is not finite"
    return None


def take_step(updater: Updater, sums: dict[str, float], *, step: int) -> float:
    """Clip the gradient and step; returns its norm before clipping. NonFiniteLoss if that is not finite.

    The step is left out if there is nothing to learn: no token is counted, or no active token has a non-zero advantage
    and no KL, entropy bonus or user's surrogate acts. Adam's momentum would still move the weights.
    """
    parameters = [parameter for parameter in updater.module.parameters() if parameter.requires_grad]
    norm = whole_of(torch.nn.utils.clip_grad_norm_(parameters, updater.max_grad_norm)).item()
    if not math.isfinite(norm):
        raise NonFiniteLoss(
            f"the gradient norm is {norm} at training step {step} though the loss {sums['loss']} is finite; "
            "lower optim.lr or raise objective.beta"
        )
    if sums["tokens"] and (sums["nonzero_advantage_tokens"] or updater.objective.acts_without_advantage):
        updater.optimizer.step()
        updater.refresh()
    return norm


def summarise(totals: dict[str, float]) -> dict[str, float]:
    """Token sums -> means over tokens, NaN without any; loss and gradient norm -> means over steps; maxima as they are.

    Skipped steps count in no mean; if all were skipped, loss and gradient norm are NaN and the rest is left out.
    """
    skipped = {"skipped_steps": totals.pop("skipped_steps")}
    if "tokens" not in totals:
        return {**skipped, "loss": math.nan, "grad_norm": math.nan}
    tokens, steps = totals.pop("tokens") or math.nan, totals.pop("optimizer_steps")
    totals.pop("nonzero_advantage_tokens")
    per_step = {"loss", "grad_norm"}
    return skipped | {
        name: value if name.endswith("_max") else value / (steps if name in per_step else tokens)
        for name, value in totals.items()
    }
