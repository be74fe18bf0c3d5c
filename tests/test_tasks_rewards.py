"""Reward components and weights from the config, on top of the task's own."""

from __future__ import annotations

import sys

import pytest

from grpo.config import DataConfig, RewardsConfig
from grpo.rewards import Reward, refuse_uncallable
from grpo.rewards.matching import boxed_math
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
        (
            {"weights": ("brevity=1",)},
            "no component 'brevity'; this task has format, correctness; add it .*functions FILE.py:brevity$",
        ),
        ({"weights": ("format",)}, "'format' is not component=number"),
        ({"weights": ("format=nan",)}, "'format': nan.*all must be finite"),
        ({"weights": ("format=0", "correctness=0")}, "at least one must not be 0"),
        ({"format_weight": 0.0, "correctness_weight": 0.0}, "at least one must not be 0"),
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


CALLS = """
def trl(prompts, completions, **columns):
    return [0.0 for _ in completions]

def fixed(completions, answer):
    return [0.0 for _ in completions]

def wants_level(completions, *, level, **columns):
    return [0.0 for _ in completions]

def short(completions, **columns):
    return [-len(text) for text in completions]

nameless = lambda completions, **columns: short(completions)

def typo(completions, answers, **columns):
    return [0.0 for _ in completions]
"""


@pytest.mark.parametrize(
    ("name", "takes", "reason"),
    [
        ("trl", "prompts, completions, columns", "missing a required argument: 'completions'"),
        ("fixed", "completions, answer", "got an unexpected keyword argument"),
    ],
)
def test_a_function_that_cannot_take_completions_and_columns_is_refused_at_once(tmp_path, name, takes, reason):
    (tmp_path / "own.py").write_text(CALLS)
    called = r"but is called as function\(completions, \*\*columns\) with the columns answer, prompt, question"
    with pytest.raises(
        ValueError, match=rf"reward '{name}' takes \({takes}\), {called}: {reason}.*; declare it as function\(comp"
    ):
        weights(functions=(f"{tmp_path}/own.py:{name}",))


def test_a_function_that_no_worker_process_would_find_is_refused_at_once(tmp_path):
    (tmp_path / "own.py").write_text(CALLS)
    assert "short" in weights(functions=(f"{tmp_path}/own.py:short",))
    with pytest.raises(ValueError, match="reward 'nameless' cannot be sent to a worker process .*define it by `def`"):
        weights(functions=(f"{tmp_path}/own.py:nameless",))


def test_a_name_that_is_no_column_of_the_data_is_refused_when_it_is_read(tmp_path):
    (tmp_path / "own.py").write_text(CALLS)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{i}?", "answer": 1, "level": 2}}\n' for i in range(20)))
    data = DataConfig(path=f"{tmp_path}/rows.jsonl")
    task = lambda name: make_task("jsonl", data, RewardsConfig(functions=(f"{tmp_path}/own.py:{name}",)))
    assert len(task("wants_level").split("train")) == 16
    with pytest.raises(ValueError, match="the columns answer, level, prompt, question: missing .* 'answers'"):
        task("typo").split("train")


def test_a_builtin_without_a_signature_is_left_to_be_called():
    refuse_uncallable({"none": Reward(max, 1.0)})


def test_boxed_math_without_its_library_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"boxed_math: math-verify is not installed; pip install -e '.\[math\]'"):
        boxed_math(["2"], answer=["2"])


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
    with pytest.raises(ValueError, match=r"rewards \['right'\]: accuracy counts 'correctness', so rename one"):
        own("NoCorrectness")
