"""An update that meets a gradient that is not finite, or too little memory: nothing is lost and nothing is hidden."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from grpo.batch import LAYOUTS, halve, pack, weigh
from grpo.distributed import World
from grpo.logprobs import LogprobModel, PolicyModule, frozen_logprobs
from grpo.objectives import resolve
from grpo.policy import Policy
from grpo.records import Batch
from grpo.update import NonFiniteLoss, Updater, make_optimizer, update_policy
from tests.ranks import run_ranks
from tests.tiny import made_up_groups, tiny_qwen2, use_fp64_rms_norm, word_tokenizer

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
BUDGET = 60


class Trainee:
    """A tiny policy, a batch of two minibatches twice, and an updater that collects what it says."""

    def __init__(self, world=ALONE, layout="packed", budget=BUDGET, scored=None, **options):
        use_fp64_rms_norm()
        self.policy = Policy(tiny_qwen2().double(), word_tokenizer(), "fp32")
        self.module = PolicyModule(self.policy, temperature=1.0, impl="torch")
        self.reference = LogprobModel(tiny_qwen2(seed=1).double(), temperature=1.0, impl="torch")
        self.world, self.layout, self.budget, self.said = world, layout, budget, []
        wrapped = DistributedDataParallel(self.module, broadcast_buffers=False) if world.size > 1 else self.module
        optimizer = make_optimizer(list(self.module.parameters()), 0.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
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
        groups = self.world.mine(made_up_groups(8, 4))
        where = {"max_over_ranks": self.world.max, "device": self.world.device}
        batch = pack(groups, **sizes, layout=self.layout, **where)
        frozen_logprobs(batch, self.module, self.reference)
        options = {"aggregation": "sequence_mean", "max_new_tokens": 12, "sum_over_ranks": self.world.sum}
        weigh(batch, self.world.mine(advantages), self.world.mine(scored), **options)
        return batch

    def update(self, poison: float = 0.0, step: int = 7) -> dict[str, float]:
        return update_policy(self.updater, self.batch(poison), step=step, lr=1e-3)

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten().clone() for parameter in self.module.parameters()])


def short_of_memory(module: PolicyModule, largest: int, when_in_backward: bool = False) -> None:
    """Let training passes over more than `largest` tokens, as laid out, fail like CUDA does."""
    forward = module.forward

    def limited(micro_batch, token_loss=None):
        result = forward(micro_batch, token_loss)
        if token_loss is not None and micro_batch.input_ids.numel() > largest:
            if not when_in_backward:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            result[0].register_hook(raise_out_of_memory)
        return result

    module.forward = limited


def raise_out_of_memory(gradient: torch.Tensor) -> None:
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
    short_of_memory(short.module, max(sizes) - 1, in_backward)
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


def test_a_second_lack_of_memory_ends_the_run_with_the_remedy():
    trainee = Trainee()
    short_of_memory(trainee.module, 5)
    with pytest.raises(ValueError, match="still out of memory with 30 tokens; use a smaller batch.tokens_per_micro"):
        trainee.update()
    with pytest.raises(ValueError, match="out of memory with 30 tokens, half of the first budget; use a smaller"):
        trainee.update()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_hold_the_same_tokens_with_the_same_columns_and_equally_many_everywhere(layout):
    batch = Trainee(layout=layout).batch()
    whole = [micro_batch for step in batch.optimizer_steps for micro_batch in step]
    halves = halve(halve(whole, batch.made_of), batch.made_of)
    assert len(halves) == 4 * len(whole)
    for name in ("target", "sampler", "old", "ref", "advantage", "weight", "counted", "active"):
        join = lambda parts: torch.cat([getattr(part.tokens, name) for part in parts if part.sequences])  # noqa: E731, B023
        assert torch.equal(join(halves), join(whole)), name
    assert all(not part.tokens.weight.any() for part in halves if part.is_dummy)
    heads = [part.tokens for part in halves if part.tokens.head_rows is not None]
    assert heads and all(torch.equal(tokens.head_rows, tokens.counted.nonzero()[:, 0]) for tokens in heads)


def update_on_ranks(world, short_rank: int | None, budget: int, largest: int):
    """Two updates, of which the second must use the smaller budget from the start."""
    trainee = Trainee(world, budget=budget)
    if world.rank == short_rank:
        short_of_memory(trainee.module, largest)
    metrics = [trainee.update(), trainee.update()]
    return trainee.weights().numpy(), metrics, trainee.said


@pytest.mark.parametrize(("short_rank", "budget", "largest"), [(0, 40, 30), (1, 40, 25), (1, 100, 50)])
def test_one_rank_without_memory_takes_the_others_along_to_the_same_gradient(short_rank, budget, largest):
    """With a budget of 100 each rank has a single micro-batch."""
    expected, metrics, _ = update_on_ranks(ALONE, None, budget, largest)
    for weights, rank_metrics, said in run_ranks(2, update_on_ranks, short_rank, budget, largest, timeout_s=60):
        assert abs(weights - expected).max() < 1e-10
        for ours, theirs in zip(rank_metrics, metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert len(said) == 1 and f"from here on {budget // 2}, with the same gradient" in said[0]
