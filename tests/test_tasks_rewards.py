"""Reward components and weights from the config, on top of the task's own."""

from __future__ import annotations

import pytest

from grpo.config import DataConfig, RewardsConfig
from grpo.tasks import make_task


@pytest.fixture
def brevity(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text("def brevity(completions, **columns):\n    return [1 / (1 + len(text)) for text in completions]\n")
    return f"{file}:brevity"


def weights(**rewards):
    task = make_task("word_problems", DataConfig(), RewardsConfig(**rewards))
    return {name: reward.weight for name, reward in task.rewards.items()}


def test_a_users_function_joins_the_tasks_own_and_any_weight_can_be_set(brevity):
    assert weights(functions=(brevity,)) == {"format": 0.5, "correctness": 1.0, "brevity": 1.0}
    chosen = weights(functions=(brevity,), weights=("brevity=0.25", "format=0"))
    assert chosen == {"format": 0.0, "correctness": 1.0, "brevity": 0.25}


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"weights": ("brevity=1",)}, "no component 'brevity'; this task has format, correctness"),
        ({"weights": ("format",)}, "'format' is not component=number"),
        ({"functions": ("nowhere.py:f",)}, "no file 'nowhere.py'"),
        ({"functions": ("grpo.rewards:nothing",)}, "defines no function or class 'nothing'"),
    ],
)
def test_a_mistake_in_them_is_named(rewards, message):
    with pytest.raises(ValueError, match=message):
        weights(**rewards)


def test_a_function_named_like_another_component_is_refused(brevity):
    with pytest.raises(ValueError, match="has the name of another component"):
        weights(functions=(brevity, brevity))
