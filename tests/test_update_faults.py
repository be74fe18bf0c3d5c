"""An update that meets a gradient that is not finite, or too little memory: nothing is lost and nothing is hidden."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch

from grpo.batch import LAYOUTS, halve, pack, weigh
from grpo.config import OptimConfig
from grpo.distributed import World
from grpo.logprobs import LogprobModel, PolicyModule
from grpo.objectives import resolve
from grpo.policy import Policy
from grpo.records import Batch, MicroBatch
from grpo.sharding import distribute
from grpo.update import NonFiniteLoss, Updater, fill_frozen, make_optimizer, smallest_last, update_policy, warm_up
from tests.ranks import run_ranks
from tests.tiny import made_up_groups, tiny_qwen2, use_fp64_rms_norm, word_tokenizer

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
BUDGET = 60


class Trainee:
    """A tiny policy, a batch of two minibatches twice, and an updater that collects what it says."""

    def __init__(self, world=ALONE, layout="packed", budget=BUDGET, strategy="ddp", **options):
        use_fp64_rms_norm()
        self.policy = Policy(tiny_qwen2().double(), word_tokenizer(), "fp32")
        if strategy == "fsdp":
            self.policy.sample_from_copy()
        self.module = PolicyModule(self.policy, temperature=1.0, impl="torch")
        self.reference = LogprobModel(tiny_qwen2(seed=1).double(), temperature=1.0, impl="torch")
        self.world, self.layout, self.budget, self.said = world, layout, budget, []
        wrapped = distribute(self.module, [self.policy], world, strategy)
        optimizer = make_optimizer(self.policy.trained, OptimConfig(lr=0.0))
        objective = resolve("grpo", beta=0.3)
        rest = (math.inf, self.policy.refresh, budget)
        self.updater = Updater(wrapped, optimizer, objective, world, *rest, say=self.said.append, **options)

    def batch(self, poison: float = 0.0) -> Batch:
        """poison: added to the advantage of group 1, sample 2. One completion is not scored."""
        advantages = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
        advantages[1, 2] += poison
        scored = torch.ones(8, 4, dtype=torch.bool)
        scored[5, 1] = False
        sizes = {"minibatches": 2, "passes": 2, "tokens_per_micro_batch": self.updater.token_budget}
        groups = self.world.local_share(made_up_groups(8, 4))
        where = {"max_over_ranks": self.world.max, "device": self.world.device}
        batch = pack(groups, **sizes, layout=self.layout, **where)
        fill_frozen(self.updater, batch, self.module, self.reference)
        options = {"aggregation": "sequence_mean", "max_new_tokens": 12, "sum_over_ranks": self.world.sum}
        weigh(batch, self.world.local_share(advantages), self.world.local_share(scored), **options)
        return batch

    def update(self, poison: float = 0.0, step: int = 7) -> dict[str, float]:
        return update_policy(self.updater, self.batch(poison), step=step, lr=1e-3)

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten().clone() for parameter in self.module.parameters()])


def short_of_memory(
    module: torch.nn.Module, fails: Callable[[MicroBatch], bool], *, in_backward: bool = False, is_frozen: bool = False
) -> None:
    """Let passes over some micro-batches, those of training or the frozen ones, fail like CUDA does."""
    forward = module.forward

    def limited(micro_batch, token_loss=None):
        result = forward(micro_batch, token_loss)
        if (token_loss is None) == is_frozen and fails(micro_batch):
            if not in_backward:
                raise_out_of_memory()
            result[0].register_hook(raise_out_of_memory)
        return result

    module.forward = limited


def over(largest: int) -> Callable[[MicroBatch], bool]:
    """Whether a micro-batch has more tokens, as laid out."""
    return lambda micro_batch: micro_batch.input_ids.numel() > largest


def raise_out_of_memory(gradient: torch.Tensor | None = None) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_step_that_is_not_finite_moves_nothing_is_counted_and_named():
    trainee = Trainee(max_skipped_steps=4)
    trainee.update()
    weights, moments = trainee.weights(), copy.deepcopy(trainee.updater.optimizer.state_dict())
    metrics = trainee.update(poison=math.nan)
    assert metrics["skipped_steps"] == 2  # the minibatch with the poisoned group, in each of two passes
    assert math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])  # of the other two
    assert "training step 7; the advantage of group 1, sample 2" in trainee.said[0]
    trainee = Trainee(max_skipped_steps=4)
    trainee.update()
    trainee.module.masters.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    metrics = trainee.update()
    assert metrics["skipped_steps"] == 4 and math.isnan(metrics["loss"])
    assert torch.equal(trainee.weights(), weights)
    now = trainee.updater.optimizer.state_dict()["state"]
    assert all(torch.equal(now[i][name], tensor) for i in now for name, tensor in moments["state"][i].items())


def test_one_skip_too_many_in_a_row_ends_the_run_and_a_good_step_forgives():
    trainee = Trainee(max_skipped_steps=1)
    for _ in range(3):
        assert trainee.update(poison=math.nan)["skipped_steps"] == 2  # bad, good, bad, good
    assert trainee.updater.skipped == 0
    trainee.module.masters.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteLoss, match="the gradient norm is nan at training step 9"):
        trainee.update(step=9)
    assert trainee.updater.state_dict()["skipped"] == 1


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_of_memory_halves_the_budget_once_says_so_and_gives_the_same_update(layout, in_backward):
    whole, short = Trainee(layout=layout), Trainee(layout=layout)
    sizes = [micro_batch.input_ids.numel() for micro_batch in short.batch().micro_batches]
    assert BUDGET / 2 < max(sizes) <= BUDGET
    short_of_memory(short.module, over(max(sizes) - 1), in_backward=in_backward)
    expected, metrics = whole.update(), short.update()
    assert torch.allclose(short.weights(), whole.weights(), rtol=0, atol=1e-12)
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert len(short.said) == 1 and "60 tokens: from here on 30, with the same gradient" in short.said[0]
    assert short.updater.token_budget == 30
    resumed = Trainee(layout=layout)
    resumed.updater.load_state_dict(short.updater.state_dict())
    assert resumed.updater.token_budget == 30
    lowered = Trainee(layout=layout, budget=40)
    lowered.updater.load_state_dict(short.updater.state_dict())
    assert lowered.updater.token_budget == 40, "whoever lowers the budget by hand is not halved again"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("who", ["module", "reference"])
def test_out_of_memory_in_a_frozen_pass_halves_the_budget_too_and_gives_the_same_update(who, layout):
    whole, short = Trainee(layout=layout), Trainee(layout=layout)
    largest = max(micro_batch.input_ids.numel() for micro_batch in whole.batch().micro_batches)
    short_of_memory(getattr(short, who), over(largest - 1), is_frozen=True)
    expected, metrics = whole.update(), short.update()
    assert torch.allclose(short.weights(), whole.weights(), rtol=0, atol=1e-12)
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert len(short.said) == 1 and "60 tokens: from here on 30, with the same gradient" in short.said[0]
    short.update()
    assert len(short.said) == 1 and short.updater.token_budget == 30


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("budget, half", [(60, 30), (1, 1)])
def test_a_second_lack_of_memory_ends_the_run_with_the_remedy(budget, half, is_frozen):
    trainee = Trainee(budget=budget)
    short_of_memory(trainee.module, over(5), is_frozen=is_frozen)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"out of memory with {half} tokens, half of the first budget; use a sma"):
            trainee.update()


def test_a_completion_that_alone_is_too_long_is_told_apart_from_a_budget_that_is_too_large():
    for budget, is_alone in ((60, False), (4, True)):
        trainee = Trainee(budget=budget)
        short_of_memory(trainee.module, over(5))
        with pytest.raises(ValueError, match="out of memory") as failure:
            trainee.update()
        longest = max(micro_batch.input_ids.numel() for micro_batch in trainee.batch().micro_batches)
        told = f"the largest is a completion with its prompt, {longest} tokens, which no budget makes smaller"
        assert (told in str(failure.value)) == is_alone


@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_hold_the_same_tokens_with_the_same_columns_and_equally_many_everywhere(layout):
    batch = Trainee(layout=layout).batch()
    whole = [micro_batch for step in batch.optimizer_steps for micro_batch in step]
    halves = halve(halve(whole, batch.source_groups), batch.source_groups)
    assert len(halves) == 4 * len(whole)
    for name in ("target", "sampler", "old", "ref", "advantage", "weight", "counted", "active"):
        join = lambda parts: torch.cat([getattr(part.tokens, name) for part in parts if part.sequences])  # noqa: B023
        assert torch.equal(join(halves), join(whole)), name
    assert all(not part.tokens.weight.any() for part in halves if not part.sequences)
    heads = [part.tokens for part in halves if part.tokens.head_rows is not None]
    assert heads and all(torch.equal(tokens.head_rows, tokens.counted.nonzero()[:, 0]) for tokens in heads)


def test_the_pass_in_which_ranks_meet_is_the_smallest_and_never_the_only_one():
    batch = Trainee().batch()
    sizes = lambda micro_batches: [micro_batch.input_ids.numel() for micro_batch in micro_batches]
    for step in batch.optimizer_steps:
        assert len(step) > 1 and sizes(smallest_last(step, batch.source_groups)) == sorted(sizes(step), reverse=True)
        first, last = smallest_last(step[:1], batch.source_groups)
        assert first.input_ids.numel() >= last.input_ids.numel()
        assert sum(len(part.sequences) for part in (first, last)) == len(step[0].sequences)


def test_the_pass_before_all_others_draws_no_random_number_and_has_no_gradient():
    """Else dropout in the first step of a run that goes on would be other than in one that never stopped."""
    trainee = Trainee()
    batch, before = trainee.batch(), torch.get_rng_state()
    trainee.module.register_forward_pre_hook(lambda module, inputs: torch.rand(1) and None)
    warm_up(trainee.updater, batch)
    assert trainee.updater.is_warm and torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.grad.any() for parameter in trainee.policy.trained)


def update_on_ranks(world, short_rank: int | None, budget: int, largest: int, is_frozen: bool):
    """Two updates, of which the second must use the smaller budget from the start."""
    trainee = Trainee(world, budget=budget)
    if world.rank == short_rank:
        short_of_memory(trainee.module, over(largest), is_frozen=is_frozen)
    metrics = [trainee.update(), trainee.update()]
    return trainee.weights().numpy(), metrics, trainee.said


SHORT = [(0, 40, 30, False), (1, 40, 25, False), (0, 100, 40, False), (0, 40, 30, True), (1, 100, 50, True)]


@pytest.mark.parametrize(("short_rank", "budget", "largest", "is_frozen"), SHORT)
def test_one_rank_without_memory_takes_the_others_along_to_the_same_gradient(short_rank, budget, largest, is_frozen):
    """With a budget of 100 each rank has a single micro-batch, which is halved at any rate."""
    expected, metrics, _ = update_on_ranks(ALONE, None, budget, largest, is_frozen)
    arguments = (short_rank, budget, largest, is_frozen)
    for weights, rank_metrics, said in run_ranks(2, update_on_ranks, *arguments, timeout_s=60):
        assert abs(weights - expected).max() < 1e-10
        for ours, theirs in zip(rank_metrics, metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert len(said) == 1 and f"from here on {budget // 2}, with the same gradient" in said[0]


def out_of_memory_together(world, strategy: str, in_backward: bool, is_frozen: bool):
    """Rank 1 has no memory for a pass that ranks make together: under ddp the last, under fsdp any. What ends each."""
    trainee = Trainee(world, strategy=strategy)
    trainee.updater.is_warm = True  # else it would be the pass before all
    if world.rank == 1:
        fails = lambda _: getattr(trainee.updater.module, "require_backward_grad_sync", True)
        short_of_memory(trainee.module, fails, in_backward=in_backward, is_frozen=is_frozen)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        trainee.update()
    return type(raised.value).__name__, str(raised.value), trainee.said


@pytest.mark.parametrize(
    ("strategy", "in_backward", "is_frozen"),
    [("ddp", False, False), ("ddp", True, False), ("fsdp", True, False), ("fsdp", False, True)],
)
def test_a_rank_without_memory_in_a_common_pass_is_named_and_no_rank_hangs(strategy, in_backward, is_frozen):
    arguments = (strategy, in_backward, is_frozen)
    other, short = run_ranks(2, out_of_memory_together, *arguments, timeout_s=60)
    assert (
        short[0] == "ValueError" and "rank 1 is out of memory in a collective pass, so the run cannot retry" in short[1]
    )
    assert "use a smaller batch.tokens_per_micro_batch" in short[1]
    assert other[0] != "ValueError" and not other[2] and not short[2]  # its peer is gone; nobody halved anything
