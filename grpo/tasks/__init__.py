"""Tasks: where problems come from, how they are asked, and what counts as right.

A task gives splits of Problems, a plain-text prompt with exemplars, and reward components with weights.
Constructing one loads no data; grpo.tasks.prompts turns its problems into token ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from grpo.config import DataConfig, RewardsConfig, nearest
from grpo.records import Problem
from grpo.rewards import FINAL_PREFIX, Reward, correctness_reward, format_reward, refuse_uncallable
from grpo.rewards.worker import pack_function
from grpo.user_code import load_object

TASKS = {
    "code": "grpo.tasks.code:Code",
    "gsm8k": "grpo.tasks.gsm8k:Gsm8k",
    "jsonl": "grpo.tasks.gsm8k:Jsonl",
    "keywords": "grpo.tasks.keywords:Keywords",
    "word_problems": "grpo.tasks.word_problems:WordProblems",
}


class Task:
    """Base of all tasks; a subclass defines `load` and may replace any attribute.

    The test split is only ever evaluated: training and exemplars never ask for it. A training split may be
    endless (attribute `endless = True`): then split[i] is a problem for every i >= 0 and it has no length.
    """

    name: str = ""
    splits: tuple[str, ...] = ("train", "validation", "test")
    instruction = f"Solve each problem step by step. End with the line `{FINAL_PREFIX}<number>`."
    stop_strings: tuple[str, ...] = ("\n\nQuestion:",)  # a base model goes on with the next question
    exemplars: tuple[Problem, ...] = ()  # built-in worked exemplars, with solutions
    rewards: Mapping[str, Reward] = {}  # empty: format and correctness, weighted by the config

    def __init__(self, data: DataConfig | None = None, rewards: RewardsConfig | None = None):
        self.data, rewards = data or DataConfig(), rewards or RewardsConfig()
        self.rewards = self.rewards or {
            "format": Reward(format_reward, rewards.format_weight),
            "correctness": Reward(correctness_reward, rewards.correctness_weight),
        }
        self._splits: dict[str, Sequence[Problem]] = {}

    def split(self, name: str) -> Sequence[Problem]:
        """Problems of one of `splits`: loaded on first use, then kept. Never empty."""
        if name not in self.splits:
            raise ValueError(f"task {self.name!r} has no split {name!r}; use one of {', '.join(self.splits)}")
        if name not in self._splits:
            problems = self.load(name)
            is_endless = getattr(problems, "endless", False)
            if is_endless and name != "train":
                raise ValueError(f"the {name} split of task {self.name!r} is endless; only the training split may be")
            if not (hasattr(problems, "__getitem__") and (is_endless or hasattr(problems, "__len__"))):
                raise ValueError(
                    f"load({name!r}) of task {self.name!r} returned {problems!r:.80}; return a list of Problem"
                )
            if not is_endless and len(problems) == 0:
                raise ValueError(
                    f"the {name} split of task {self.name!r} is empty (data.path={self.data.path!r}, "
                    f"data.validation_fraction={self.data.validation_fraction}); give more rows or another fraction"
                )
            known = [problems[0]] if is_endless else problems
            has_texts = lambda problem: isinstance(problem.question, str) and isinstance(problem.answer, str)
            bad = [problem for problem in known if not (isinstance(problem, Problem) and has_texts(problem))]
            if bad:
                found = f"{bad[0]!r:.80} is not a grpo.records.Problem with strings for question and answer"
                raise ValueError(f"load({name!r}) of task {self.name!r}: {found}")
            refuse_uncallable(self.rewards, {column for problem in known for column in problem.columns})
            self._splits[name] = problems
        return self._splits[name]

    def check_path(self) -> None:
        """ValueError for a data.path that does not exist, before anything is read; the base class reads none."""

    def load(self, split: str) -> Sequence[Problem]:
        """Reads or makes one split; a subclass must define it."""
        raise NotImplementedError(f"{type(self).__name__} does not define load(split)")

    def trial_completions(self, problem: Problem, other: Problem) -> dict[str, str]:
        """Completions to try the rewards on: the problem's reference and deliberately wrong ones, each with its name.

        other: another problem of the split. `python -m grpo.rewards check` shows what each earns.
        """
        return {
            "reference": problem.solution,
            "another's reference": other.solution,
            "first half": problem.solution[: len(problem.solution) // 2],
            "the question": problem.question,
            "empty": "",
        }

    def plain_prompt(self, question: str, exemplars: Sequence[Problem]) -> str:
        """Text for a base model: instruction, worked exemplars, question, with blank lines between.

        It ends without a space: the completion's first token brings its own.
        """
        worked = [f"Question: {shot.question}\nAnswer: {shot.solution}" for shot in exemplars]
        return "\n\n".join(filter(None, [self.instruction, *worked, f"Question: {question}\nAnswer:"]))


def make_task(name: str, data: DataConfig, rewards: RewardsConfig) -> Task:
    """The task of a name in TASKS, or of a user's own `path/to/file.py:ClassName`. Loads no data.

    Its rewards are the class's own and those of `rewards.functions`, with the weights of `rewards.weights`; ValueError
    unless one of them is `correctness` and at least one has a weight.
    """
    if name not in TASKS and ".py:" not in name:
        raise ValueError(
            f"unknown task {name!r}{nearest(name, TASKS)}; choose one of {', '.join(TASKS)}, or "
            "path/to/file.py:ClassName for your own"
        )
    chosen = load_object(TASKS.get(name, name))
    if not (isinstance(chosen, type) and issubclass(chosen, Task)):
        raise ValueError(f"task {name!r} is not a class that extends grpo.tasks.Task")
    task = chosen(data=data, rewards=rewards)
    task.rewards = _configured(task.rewards, rewards)
    return task


def _configured(own: Mapping[str, Reward], config: RewardsConfig) -> dict[str, Reward]:
    rewards = dict(own)
    for name, reward in rewards.items():
        if not isinstance(reward, Reward):
            raise ValueError(f"reward {name!r} of the task is {reward!r}; write grpo.rewards.Reward(function, weight)")
    for path in config.functions:
        name = path.rpartition(":")[2]
        if name in rewards:
            raise ValueError(f"rewards.functions: {path!r} has the name of another component; rename the function")
        rewards[name] = Reward(load_object(path), weight=1.0)
    refuse_uncallable(rewards)
    for name, reward in rewards.items():
        pack_function(name, reward.function)  # refuses one that no worker process would find
    for setting in config.weights:
        name, _, number = setting.partition("=")
        if name not in rewards:
            raise ValueError(
                f"rewards.weights: no component {name!r}; this task has {', '.join(rewards)}; add it with "
                f"--rewards.functions FILE.py:{name}"
            )
        try:
            rewards[name] = replace(rewards[name], weight=float(number))
        except ValueError:
            raise ValueError(f"rewards.weights: {setting!r} is not component=number") from None
    if "correctness" not in rewards:
        raise ValueError(f"rewards {list(rewards)}: accuracy counts 'correctness', so rename one of them to that")
    weights = {name: reward.weight for name, reward in rewards.items()}
    if not any(weights.values()) or not all(map(math.isfinite, weights.values())):
        raise ValueError(f"reward weights {weights}: all must be finite, and at least one must not be 0")
    return rewards
