"""One rollout's optimizer steps: micro-batches, backward, check, clip, step. Called by train.py every training step."""

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
from grpo.sharding import SharedAdamW, whole_of

LESS_MEMORY = "use a smaller batch.tokens_per_micro_batch, or model.gradient_checkpointing=true"
T = TypeVar("T")


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite; the message names the step and the sequence."""


@dataclass
class Updater:
    """What one update needs besides the batch, and what went wrong in updates so far: its state.

    `module` is the PolicyModule, where there are ranks wrapped by DDP or turned into shares by FSDP (grpo.sharding).
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    world: World
    max_grad_norm: float
    refresh: Callable[[], None]  # brings the working copy up to the masters
    tokens_per_micro_batch: int = 0  # as configured
    max_skipped_steps: int = 0
    say: Callable[[str], None] = print
    is_warm: bool = False  # see `warm_up`
    skipped: int = 0  # optimizer steps in a row
    too_large: int | None = None  # tokens_per_micro_batch that did not fit into the device's memory

    @property
    def token_budget(self) -> int:
        """Tokens of a micro-batch: as configured, or half of it if that was too large."""
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
    parameters: list[nn.Parameter], optim: OptimConfig, own: list[Tensor] | None = None
) -> torch.optim.AdamW:
    """AdamW on the fp32 masters, as one fused kernel.  own: what this rank keeps of each, where they are shared out."""
    options = {name: getattr(optim, name) for name in ("lr", "betas", "eps", "weight_decay")} | {"fused": True}
    is_shared = own is not None and any(isinstance(tensor, DTensor) for tensor in own)
    return SharedAdamW(own, parameters, **options) if is_shared else torch.optim.AdamW(parameters, **options)


def update_policy(
    updater: Updater, batch: Batch, *, step: int, lr: float, progress: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """Make every optimizer step of the batch; return the means of what is worth logging, over all ranks."""
    for parameters in updater.optimizer.param_groups:
        parameters["lr"] = lr
    totals: dict[str, float] = {}
    done = 0
    if isinstance(updater.module, DistributedDataParallel) and not updater.is_warm:
        warm_up(updater, batch)
    if updater.world.size > 1:
        batch.optimizer_steps = [smallest_last(step, batch.made_of) for step in batch.optimizer_steps]
    for position in [*range(len(batch.optimizer_steps))] * batch.passes:
        for name, value in optimizer_step(updater, batch, position, step=step).items():
            totals[name] = max(totals.get(name, 0.0), value) if name.endswith("_max") else totals.get(name, 0.0) + value
        done += len(batch.optimizer_steps[position])
        if progress is not None:
            progress(done, len(batch.micro_batches) * batch.passes)
    return summarise(totals)


def warm_up(updater: Updater, batch: Batch) -> None:
    """A pass of weight 0, before the first that counts in this process.

    DistributedDataParallel averages its first pass by another operation and in other buckets than every later one: of
    three ranks or more a run that goes on would have other last bits than one that never stopped.
    """
    device = updater.world.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), together(updater.world):
        forward(updater, dummy_like(batch.micro_batches[0], batch.made_of))[0].backward()
    updater.is_warm = True


def optimizer_step(updater: Updater, batch: Batch, position: int, *, step: int) -> dict[str, float]:
    """One optimizer step of the batch; returns its sums and maxima over all ranks.

    A step whose loss or gradient is not finite moves nothing and is counted; NonFiniteLoss where max_skipped_steps in
    a row were skipped before it. All ranks alike.
    """
    try:
        attempt = lambda: accumulate_gradients(updater, batch.optimizer_steps[position], step=step)
        sums = in_halves_if_short(updater, batch, attempt)
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
    """`frozen_logprobs` of what the objective asks for, in smaller micro-batches if a rank runs out of memory."""
    work = partial(frozen_logprobs, batch, policy, reference, always_policy=updater.objective.needs_frozen_pass)
    in_halves_if_short(updater, batch, lambda: fits(updater, work) or None)


def in_halves_if_short(updater: Updater, batch: Batch, attempt: Callable[[], T | None]) -> T:
    """What `attempt` returns; where a rank was short of memory (None), what it returns in micro-batches of half."""
    while (result := attempt()) is None:
        halve_micro_batches(updater, batch)
    return result


def fits(updater: Updater, work: Callable[[], None]) -> bool:
    """Do work that needs no other rank (under FSDP all work does). Returns whether every rank had memory enough."""
    is_short = False
    try:
        with together(updater.world) if isinstance(updater.module, FSDPModule) else contextlib.nullcontext():
            work()
    except torch.OutOfMemoryError:
        is_short = True
    return not updater.world.max(torch.tensor(float(is_short)))


@contextlib.contextmanager
def together(world: World) -> Iterator[None]:
    """What ranks do together one cannot give up while the others wait: out of memory, it ends the run."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"rank {world.rank} is out of memory in a pass that all ranks make together"
        raise ValueError(f"{what}, and cannot go on with smaller ones; {LESS_MEMORY}") from error


def halve_micro_batches(updater: Updater, batch: Batch) -> None:
    """From here on micro-batches of half the tokens, with the final weights as they are. ValueError the second time."""
    if updater.too_large == updater.tokens_per_micro_batch:
        what = f"out of memory with {updater.token_budget} tokens, half of the first budget; {LESS_MEMORY}"
        largest = max(batch.micro_batches, key=lambda micro_batch: micro_batch.input_ids.numel())
        if len(largest.sequences) == 1 and largest.input_ids.numel() > updater.token_budget:
            what += (
                f" (the largest is a completion with its prompt, {largest.input_ids.numel()} tokens, which no budget "
                "makes smaller: there only the latter helps, or a smaller rollout.max_new_tokens)"
            )
        raise ValueError(what)
    updater.too_large = updater.tokens_per_micro_batch
    if updater.world.device.type == "cuda":
        torch.cuda.empty_cache()  # its blocks have the sizes of the larger micro-batches
    updater.say(
        f"out of memory in a micro-batch of {updater.too_large} tokens: from here on {updater.token_budget}, with the "
        "same gradient; to start so, set batch.tokens_per_micro_batch"
    )
    batch.optimizer_steps = [halve(step, batch.made_of) for step in batch.optimizer_steps]


def smallest_last(micro_batches: list[MicroBatch], groups: list[Group]) -> list[MicroBatch]:
    """Largest first, and at least two: ranks wait for each other in the last pass, which then needs no more memory than
    those before it."""
    if len(micro_batches) == 1:
        micro_batches = halve(micro_batches, groups)
    return sorted(micro_batches, key=lambda micro_batch: -micro_batch.input_ids.numel())


def accumulate_gradients(updater: Updater, micro_batches: list[MicroBatch], *, step: int) -> dict[str, float] | None:
    """Forward and backward of every micro-batch; gradients are reduced over ranks with the last one (FSDP: each).

    Returns sums and maxima over all ranks (see `token_statistics`), or None where a rank ran out of memory. Raises
    NonFiniteLoss on every rank alike.
    """
    world = updater.world
    has_buckets = isinstance(updater.module, DistributedDataParallel)
    updater.optimizer.zero_grad(set_to_none=not has_buckets)  # gradients that are views of DDP's buckets must stay so
    statistics, passes = [], []

    def loss_of(micro_batch: MicroBatch) -> Tensor:
        loss, logprobs, entropy = forward(updater, micro_batch)
        statistics.append(token_statistics(updater.objective, micro_batch, loss.detach(), logprobs, entropy))
        passes.append((micro_batch, logprobs))
        return loss * world.size  # DDP and FSDP take the mean over ranks; the weights already hold the global mean

    num_alone = len(micro_batches) - (world.size > 1)

    def passes_alone() -> None:
        with updater.module.no_sync() if has_buckets else contextlib.nullcontext():
            for micro_batch in micro_batches[:num_alone]:
                loss_of(micro_batch).backward()

    # Asked before the one pass that ranks make together: until here each may give up by itself. Its forward belongs to
    # it: DDP would reduce in the next backward pass, whichever that is.
    if not fits(updater, passes_alone):
        return None
    for micro_batch in micro_batches[num_alone:]:
        with together(world):
            loss_of(micro_batch).backward()
    reduced = reduce_statistics(world, statistics)
    if not math.isfinite(reduced["loss"]):
        culprits = [name for name in world.gather(first_bad_sequence(passes, world)) if name]
        culprits.append("every input is finite: the loss itself overflowed, or its surrogate did")
        raise NonFiniteLoss(f"the loss is {reduced['loss']} at training step {step}; {culprits[0]}")
    return reduced


def forward(updater: Updater, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss of the micro-batch, and its log-probs and entropy, detached."""
    loss_of = weighted_loss(updater.objective, micro_batch)
    if not updater.objective.needs_whole_sequences:
        return updater.module(micro_batch, loss_of)
    logprobs, entropy = updater.module(micro_batch)  # cannot be folded into the head, which sees some rows at a time
    return loss_of(logprobs, entropy, slice(0, len(logprobs))).sum(), logprobs.detach(), entropy.detach()


def weighted_loss(objective: Objective, micro_batch: MicroBatch) -> TokenLoss:
    """The objective of this micro-batch as a function of its log-probs: final weight times loss, per token.

    It may be called for some rows at a time, unless `objective.needs_whole_sequences`.
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
        "teaching_tokens": (tokens.active & (tokens.advantage != 0)).sum(),
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
    """Names this rank's first sequence with a log-prob, reference log-prob or advantage that is not finite, if any, by
    the place of its group among those of all ranks."""
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
    """Clip and step; returns the gradient norm before clipping.

    A step of which no token counts teaches nothing, and one without a single non-zero advantage only by KL, entropy
    bonus or a surrogate of the user's own: else no optimizer step, so that momentum does not move.
    """
    parameters = [parameter for parameter in updater.module.parameters() if parameter.requires_grad]
    norm = whole_of(torch.nn.utils.clip_grad_norm_(parameters, updater.max_grad_norm)).item()
    if not math.isfinite(norm):
        raise NonFiniteLoss(
            f"the gradient norm is {norm} at training step {step} though the loss {sums['loss']} is finite; "
            "lower optim.lr or raise objective.beta"
        )
    if sums["tokens"] and (sums["teaching_tokens"] or updater.objective.acts_without_advantage):
        updater.optimizer.step()
        updater.refresh()
    return norm


def summarise(totals: dict[str, float]) -> dict[str, float]:
    """Token sums -> token means, NaN of none; loss and gradient norm -> means over steps; maxima as they are.

    Means are over the steps that were not skipped, and NaN where all were.
    """
    skipped = {"skipped_steps": totals.pop("skipped_steps")}
    if "tokens" not in totals:
        return {**skipped, "loss": math.nan, "grad_norm": math.nan}
    tokens, steps = totals.pop("tokens") or math.nan, totals.pop("optimizer_steps")
    totals.pop("teaching_tokens")
    per_step = {"loss", "grad_norm"}
    return skipped | {
        name: value if name.endswith("_max") else value / (steps if name in per_step else tokens)
        for name, value in totals.items()
    }
