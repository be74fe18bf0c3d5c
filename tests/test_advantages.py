"""Advantages against hand-worked numbers and a loop written from the papers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.advantages import normalise, zero_spread_share


def all_scored(rewards):
    return torch.ones_like(rewards, dtype=torch.bool)


def oracle(rewards, scored, divide_by_std):
    """The formula as a loop over groups: sample standard deviation, offset 1e-4, 0 for whoever cannot be compared."""
    result = []
    for row, mask in zip(rewards.tolist(), scored.tolist(), strict=True):
        values = [reward for reward, is_scored in zip(row, mask, strict=True) if is_scored]
        if len(values) < 2 or max(values) - min(values) <= 1e-6:
            result.append([0.0] * len(row))
            continue
        mean = sum(values) / len(values)
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        scale = std + 1e-4 if divide_by_std else 1.0
        result.append(
            [(reward - mean) / scale if is_scored else 0.0 for reward, is_scored in zip(row, mask, strict=True)]
        )
    return torch.tensor(result)


def test_one_success_in_eight_gives_it_2_4742():
    # mean 1/8; sum of squares 49/64 + 7/64 = 7/8; sample variance 1/8; (7/8) / (sqrt(1/8) + 1e-4) = 2.47417
    rewards = torch.tensor([[1.0] + [0.0] * 7])
    assert normalise("group", rewards, all_scored(rewards))[0, 0].item() == pytest.approx(2.4742, abs=1e-4)
    assert normalise("group_mean", rewards, all_scored(rewards))[0, 0].item() == pytest.approx(7 / 8)


@pytest.mark.parametrize("name", ["group", "group_mean"])
def test_equal_rewards_give_exactly_zero_even_with_rounding_noise(name):
    rewards = torch.full((3, 8), 0.1) + torch.tensor([0.0, 1e-9, 3e-8])[:, None] * torch.arange(8)
    assert torch.equal(normalise(name, rewards, all_scored(rewards)), torch.zeros(3, 8))


@pytest.mark.parametrize("name", ["group", "group_mean"])
def test_an_unscored_completion_leaves_the_others_as_if_it_had_not_been_drawn(name):
    rewards = torch.tensor([[1.5, 0.5, 0.0, float("nan")]])
    scored = torch.tensor([[True, True, True, False]])
    three = normalise(name, rewards[:, :3], scored[:, :3])
    four = normalise(name, rewards, scored)
    assert torch.equal(four[:, :3], three) and four[0, 3] == 0


def test_a_group_with_fewer_than_two_scored_completions_gets_zero():
    rewards, scored = torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]])
    assert torch.equal(normalise("group", rewards, scored), torch.zeros(1, 2))


groups = st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, -2.0]), min_size=4, max_size=4), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(groups, st.randoms())
def test_advantages_equal_the_loop(rewards, rng):
    rewards = torch.tensor(rewards)
    scored = torch.tensor([[rng.random() < 0.8 for _ in row] for row in rewards])
    torch.testing.assert_close(normalise("group", rewards, scored), oracle(rewards, scored, True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        normalise("group_mean", rewards, scored), oracle(rewards, scored, False), rtol=1e-5, atol=1e-5
    )


def test_zero_spread_share_counts_groups_without_a_difference():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.5]])
    assert zero_spread_share(rewards, all_scored(rewards)) == 0.5
