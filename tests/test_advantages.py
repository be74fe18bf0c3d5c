"""Advantages against hand-worked numbers and a loop written from the papers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.advantages import (
    nonzero_groups_first,
    normalise,
    overlong_penalty,
    zero_advantage_groups,
    zero_advantage_share,
)


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


def test_leave_one_out_is_the_distance_to_the_mean_of_the_others():
    # 3 against (1 + 2)/2, 1 against (3 + 2)/2, 2 against (3 + 1)/2
    rewards = torch.tensor([[3.0, 1.0, 2.0]])
    torch.testing.assert_close(normalise("rloo", rewards, all_scored(rewards)), torch.tensor([[1.5, -1.5, 0.0]]))


def test_batch_divides_by_the_std_of_all_raw_rewards():
    # rewards 0, 2, 4, 4: mean 2.5, squares 6.25 + 0.25 + 2.25 + 2.25 = 11, std sqrt(11/3) = 1.914854; group means 1, 4
    rewards = torch.tensor([[0.0, 2.0], [4.0, 4.0]])
    expected = torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) / (math.sqrt(11 / 3) + 1e-4)
    torch.testing.assert_close(normalise("batch", rewards, all_scored(rewards)), expected)


def per_reward(components, weights, scored=None):
    scored = torch.ones(components.shape[:2], dtype=torch.bool) if scored is None else scored
    total = (components.nan_to_num() * torch.tensor(weights)).sum(-1)
    return normalise("per_reward", total, scored, components=components, weights=weights)


def test_per_reward_gives_a_small_component_the_voice_of_a_large_one():
    # in its group each component is +-1/sqrt(2) (ddof 1: 0.5/0.7071, 50/70.71), whatever its range; so x = (0, 0) where
    # they disagree and (sqrt(2), -sqrt(2)) where they agree: sum of squares 4, std sqrt(4/3), A = 1.2247
    components = torch.tensor([[[1.0, 0.0], [0.0, 100.0]], [[1.0, 100.0], [0.0, 0.0]]])
    expected = torch.tensor([[0.0, 0.0], [1.2247, -1.2247]])
    torch.testing.assert_close(per_reward(components, (1.0, 1.0)), expected, atol=3e-4, rtol=0)


def per_reward_oracle(components, weights, scored):
    """GDPO as loops, with the mean over the step that ours leaves out because it is 0."""
    num_groups, size, num_components = components.shape
    total = [[0.0] * size for _ in range(num_groups)]
    for g in range(num_groups):
        for k in range(num_components):
            judged = [s for s in range(size) if scored[g, s] and not math.isnan(components[g, s, k])]
            values = [components[g, s, k].item() for s in judged]
            if len(values) < 2 or max(values) - min(values) <= 1e-6:
                continue
            mean = sum(values) / len(values)
            std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
            for s, value in zip(judged, values, strict=True):
                total[g][s] += weights[k] * (value - mean) / (std + 1e-4)
    of_scored = [total[g][s] for g in range(num_groups) for s in range(size) if scored[g, s]]
    mean = sum(of_scored) / max(len(of_scored), 1)
    std = math.sqrt(sum((x - mean) ** 2 for x in of_scored) / max(len(of_scored) - 1, 1))
    return torch.tensor(
        [[(total[g][s] - mean) / (std + 1e-4) if scored[g, s] else 0.0 for s in range(size)] for g in range(num_groups)]
    )


@pytest.mark.parametrize("seed", range(5))
def test_per_reward_equals_the_loop_with_components_that_abstain(seed):
    generator = torch.Generator().manual_seed(seed)
    components = torch.randint(0, 3, (4, 5, 3), generator=generator).float()
    components[torch.rand(4, 5, 3, generator=generator) < 0.2] = torch.nan
    scored = torch.rand(4, 5, generator=generator) < 0.8
    weights = (1.0, 0.5, -0.3)
    expected = per_reward_oracle(components, weights, scored)
    torch.testing.assert_close(per_reward(components, weights, scored), expected, rtol=1e-5, atol=1e-5)


EVERY = ["group", "group_mean", "batch", "rloo"]


@pytest.mark.parametrize("name", EVERY)
def test_equal_rewards_give_exactly_zero_even_with_rounding_noise(name):
    rewards = torch.full((3, 8), 0.1) + torch.tensor([0.0, 1e-9, 3e-8])[:, None] * torch.arange(8)
    assert torch.equal(normalise(name, rewards, all_scored(rewards)), torch.zeros(3, 8))
    scored = all_scored(rewards).index_fill(1, torch.tensor([2, 5]), False)  # what is unscored is no difference
    assert torch.equal(normalise(name, rewards, scored), torch.zeros(3, 8))


def test_per_reward_gives_a_group_without_spread_exactly_zero():
    components = torch.full((2, 4, 2), 0.1) + 3e-8 * torch.arange(8).reshape(1, 4, 2)
    components[1, 0, 0] = 1.0
    advantages = per_reward(components, (1.0, 2.0))
    assert torch.equal(advantages[0], torch.zeros(4)) and advantages[1].count_nonzero() == 4


@pytest.mark.parametrize("name", EVERY)
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
    centred = oracle(rewards, scored, False)
    torch.testing.assert_close(normalise("group_mean", rewards, scored), centred, rtol=1e-5, atol=1e-5)
    values = rewards[scored].double().tolist()
    mean = sum(values) / max(len(values), 1)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))
    torch.testing.assert_close(normalise("batch", rewards, scored), centred / (std + 1e-4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalise("rloo", rewards, scored), leave_one_out(rewards, scored), rtol=1e-5, atol=1e-5)


def leave_one_out(rewards, scored):
    result = torch.zeros_like(rewards)
    for g, i in scored.nonzero().tolist():
        others = [rewards[g, j].item() for j in range(rewards.shape[1]) if j != i and scored[g, j]]
        if others:
            result[g, i] = rewards[g, i] - sum(others) / len(others)
    return result


def test_zero_spread_share_counts_groups_without_a_difference():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.5]])
    assert zero_advantage_share(normalise("group", rewards, all_scored(rewards))) == 0.5


def test_a_group_teaches_though_one_of_its_completions_is_at_the_mean():
    rewards = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])
    advantages = normalise("group", rewards, all_scored(rewards))
    assert advantages[0, 1] == 0 and zero_advantage_groups(advantages).tolist() == [False, True]


def test_of_per_reward_groups_teach_whose_components_differ_though_their_rewards_are_equal():
    components = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    rewards = components @ torch.tensor([1.0, 2.0])
    assert rewards.tolist() == [[2, 2], [3, 3]]
    by_component = {"components": components, "weights": (1.0, 2.0)}
    advantages = normalise("per_reward", rewards, all_scored(rewards), **by_component)
    assert zero_advantage_share(advantages) == 0.5 and nonzero_groups_first(advantages, 1) == [0]


def test_the_overlong_penalty_falls_in_a_line_over_the_last_fifth():
    # limit 20, buffer 4: nothing up to 16, then a quarter a token
    lengths = torch.tensor([[1, 16, 17, 18, 20]])
    assert overlong_penalty(lengths, 20, 0.2).tolist() == [[0, 0, pytest.approx(-0.25), pytest.approx(-0.5), -1]]
    assert overlong_penalty(lengths, 20, 0.0).tolist() == [[0] * 5]


def test_groups_that_teach_come_first_and_the_others_only_fill():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.5, 1.0]])
    advantages = normalise("group", rewards, all_scored(rewards))
    assert nonzero_groups_first(advantages, 2) == [1, 3]  # the surplus group 4 is dropped
    assert nonzero_groups_first(advantages, 4) == [0, 1, 3, 4]
    assert nonzero_groups_first(advantages, 5) == [0, 1, 2, 3, 4]
    scored = all_scored(rewards)
    scored[1, 0] = False  # with one score left there is nothing to compare
    assert nonzero_groups_first(normalise("group", rewards, scored), 2) == [3, 4]
