"""Reward rises at a fixed seed: the whole chain of rooms on a model that knows nothing and a reward easily earned."""

from __future__ import annotations

import torch

from grpo.advantages import normalise
from grpo.batch import pack, weigh
from grpo.config import OptimConfig, RolloutConfig
from grpo.distributed import World
from grpo.logprobs import LogprobModel, PolicyModule, frozen_logprobs
from grpo.objectives import resolve
from grpo.policy import Policy, load_reference
from grpo.records import Problem
from grpo.rewards import Reward, score_groups, score_texts
from grpo.rewards.pool import Pool
from grpo.rollout import Sampler
from grpo.update import Updater, make_optimizer, update_policy
from tests.reward_functions import faulty_on_some, share_of_w7
from tests.tiny import tiny_qwen2, word_tokenizer

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def mean_rewards(rewards, score=score_texts, *, model=None, lr=5e-3) -> tuple[list[float], float]:
    """The mean of the first component over 30 steps of training, and the share that went unscored."""
    policy = Policy(model or tiny_qwen2(initializer_range=0.02), word_tokenizer(), "fp32")
    module = PolicyModule(policy, temperature=1.0, impl="torch")
    reference = LogprobModel(load_reference(policy), temperature=1.0, impl="torch")
    objective = resolve("grpo", beta=0.001)
    rollout = RolloutConfig(group_size=8, max_new_tokens=8, max_sequences=64, prefill_tokens=512)
    sampler = Sampler(policy.model, policy.tokenizer, rollout, stop=(), seed=0)
    optimizer = make_optimizer(list(module.parameters()), OptimConfig(lr=lr))
    updater = Updater(module, optimizer, objective, ALONE, 1.0, policy.refresh)
    means, unscored = [], []
    for step in range(1, 31):
        problems = [Problem(id=str(i), question="", answer="", index=i, prompt_ids=(2 + i, 3)) for i in range(8)]
        groups = sampler.generate(problems, step)
        scores = score_groups(groups, rewards, require_finish=False, score=score)
        batch = pack(
            groups, minibatches=1, passes=1, tokens_per_micro_batch=256, max_over_ranks=ALONE.max, device=ALONE.device
        )
        frozen_logprobs(batch, module, reference)
        advantages = normalise(objective.advantages, scores.total, scores.scored)
        weigh(
            batch,
            advantages,
            scores.scored,
            aggregation=objective.aggregation,
            max_new_tokens=8,
            sum_over_ranks=ALONE.sum,
        )
        metrics = update_policy(updater, batch, step=step, lr=lr)
        assert metrics["mismatch_max"] < 1e-4  # the sampler's log-probs are the training forward's
        means.append(scores.components[..., 0].nanmean().item())
        unscored.append(1 - scores.scored.float().mean().item())
    return means, sum(unscored) / len(unscored)


def test_reward_rises_from_chance_to_most_of_the_maximum():
    means, _ = mean_rewards({"share": Reward(share_of_w7, 1.0)})
    assert sum(means[:3]) / 3 < 0.06  # chance is 1 in 61
    assert sum(means[-3:]) / 3 > 0.6


def test_it_learns_as_well_from_a_reward_that_raises_hangs_miscounts_or_dies_on_some_completions():
    rewards = {"share": Reward(share_of_w7, 1.0), "faulty": Reward(faulty_on_some, 1.0)}
    with Pool(workers=2, timeout_s=0.2, step_timeout_s=60) as pool:
        means, unscored = mean_rewards(rewards, pool)
    assert 0.002 < unscored < 0.1
    assert sum(means[:3]) / 3 < 0.06
    assert sum(means[-3:]) / 3 > 0.6
