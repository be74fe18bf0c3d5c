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
    alone = weights(functions=(brevity,), format_weight=0.0, correctness_weight=0.0)
    assert alone == {"format": 0.0, "correctness": 0.0, "brevity": 1.0}


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"weights": ("brevity=1",)}, "no component 'brevity'; this task has format, correctness"),
        ({"weights": ("format",)}, "'format' is not component=number"),
        ({"weights": ("format=nan",)}, "'format': nan.*all must be finite"),
        ({"weights": ("format=0", "correctness=0")}, "one at least not 0"),
        ({"format_weight": 0.0, "correctness_weight": 0.0}, "one at least not 0"),
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


OWN = """
from grpo.rewards import Reward
from grpo.tasks import Task

def right(completions, answer, **columns):
    return [float(a in text) for text, a in zip(completions, answer, strict=True)]

class OfTheClass(Task):
    rewards = {"correctness": Reward(right, 2.0)}

class BareFunction(Task):
    rewards = {"correctness": right}

class NoCorrectness(Task):
    rewards = {"right": Reward(right, 1.0)}
"""


def test_the_rewards_of_a_users_class_are_its_own_and_one_of_them_is_correctness(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    own = lambda name: make_task(f"{tmp_path}/own.py:{name}", DataConfig(), RewardsConfig()).rewards
    assert {name: reward.weight for name, reward in own("OfTheClass").items()} == {"correctness": 2.0}
    with pytest.raises(ValueError, match=r"'correctness' of the task is <function right.*Reward\(function, weight\)"):
        own("BareFunction")
    with pytest.raises(ValueError, match=r"rewards \['right'\]: none is 'correctness', which accuracy counts"):
        own("NoCorrectness")
