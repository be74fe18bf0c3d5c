"""The embedded task: endless seeded word problems in the answer format of GSM8K, on three levels (data.level).

    Problem: Leo has 3 bags with 4 coins each. Max gives Leo 1 more. How many coins does Leo have now?
    Solution:
    3*4=12
    12+1=13
    #### The final answer is 13

Problem i of a split is a pure function of the level, the split's name and i: nothing is stored, nothing is loaded.
Test, validation and training share no chain of equations, over all levels: the hash of a chain (3*4=12, 12+1=13)
decides where it belongs. Disjoint texts would not do: with other names and objects, four fifths of the test chains were
in training, too. Training problems are divided once more, by text, into `solved`, whose worked solutions supervised
training learns from (grpo.base), and `train`, where reinforcement learning meets other problems and only their answers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from grpo.config import DataConfig, RewardsConfig
from grpo.records import Problem
from grpo.rewards import FINAL_PREFIX
from grpo.tasks import Task

SIZES = {"test": 1000, "validation": 500}  # the other two never end

NAMES = ("Amy", "Ann", "Ben", "Eva", "Leo", "Max", "Mia", "Sam", "Tom", "Zoe")
OBJECTS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
MORE = ("{name} buys {n}.", "{other} gives {name} {n}.", "{name} finds {n}.")  # n: 3 more
FEWER = ("{name} gives {n} to {other}.", "{name} loses {n}.", "{name} sells {n}.")
DISTRACTORS = ("{other} has {n}.", "{name} also has {n}.", "{other} buys {n}.")  # of other things than those asked for

Equation = tuple[int, str, int, int]  # 3, "*", 4, 12


@dataclass(frozen=True)
class Level:
    """How hard problems are, and how many tokens of the embedded model they take (measured)."""

    steps: tuple[int, ...]  # relative frequency of chains of 1, 2, ... equations
    start: tuple[int, int]  # least and most to begin with
    factor: int  # largest in a multiplication, which is the first step of 30 % of the problems
    change: int  # most that one step gives or takes
    distractors: float  # share of steps that are preceded by a sentence with a number that does not matter
    prompt_tokens: int  # mean
    solution_tokens: int  # room for the longest, the end token included


LEVELS = {
    1: Level((1, 2, 3), (3, 12), factor=5, change=5, distractors=0.0, prompt_tokens=32, solution_tokens=40),
    2: Level((1, 1, 2, 2), (10, 99), factor=9, change=30, distractors=0.0, prompt_tokens=37, solution_tokens=60),
    3: Level((0, 1, 1, 2, 2, 2), (10, 99), factor=12, change=99, distractors=0.5, prompt_tokens=67, solution_tokens=90),
}


def draw_problem(rng: random.Random, level: Level) -> tuple[str, list[Equation]]:
    """A question and its chain of equations, each starting from the result of the one before."""
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(OBJECTS)
    steps = rng.choices(range(1, len(level.steps) + 1), weights=level.steps)[0]
    if rng.random() < 0.3:
        bags, each = rng.randint(2, level.factor), rng.randint(2, level.factor)
        sentences, chain = [f"{name} has {bags} bags with {each} {things} each."], [(bags, "*", each, bags * each)]
    else:
        sentences, chain = [f"{name} has {(start := rng.randint(*level.start))} {things}."], []
    have = chain[-1][3] if chain else start
    of_what = f" {things}" if level.distractors else ""  # with distractors, the object has to be named
    while len(chain) < steps:
        if level.distractors and rng.random() < level.distractors:  # at 0 no random number is drawn
            n = f"{rng.randint(2, level.change)} {rng.choice([thing for thing in OBJECTS if thing != things])}"
            sentences.append(rng.choice(DISTRACTORS).format(name=name, other=other, n=n))
        more = have < 2 or rng.random() < 0.5
        n = rng.randint(1, level.change if more else min(level.change, have - 1))  # never down to 0
        form = rng.choice(MORE if more else FEWER)
        sentences.append(form.format(name=name, other=other, n=f"{n} more{of_what}" if more else f"{n}{of_what}"))
        chain.append((have, "+", n, have + n) if more else (have, "-", n, have - n))
        have = chain[-1][3]
    return " ".join([*sentences, f"How many {things} does {name} have now?"]), chain


def working(chain: Sequence[Equation]) -> str:
    """The chain as text, one equation a line: what a worked solution says, and what the splits are divided by."""
    return "\n".join(f"{a}{sign}{b}={c}" for a, sign, b, c in chain)


def split_of(question: str, chain: Sequence[Equation]) -> str:
    """The one split that a problem may be in. crc32: the same on every machine."""
    bucket = zlib.crc32(working(chain).encode()) % 10
    if bucket < 2:
        return ("test", "validation")[bucket]
    return ("solved", "train")[zlib.crc32(question.encode()) % 2]


class EndlessProblems:
    """Problems 0, 1, 2 ... of one split, each drawn from its own seed. Has no length."""

    endless = True

    def __init__(self, split: str, level: Level):
        self.split, self.level = split, level

    def __getitem__(self, i: int) -> Problem:
        if i < 0:
            raise IndexError(f"problem {i} of an endless split: count from 0")
        rng = random.Random(f"word_problems {self.split} {i}")  # a str seeds by its SHA-512, not by hash()
        question, chain = draw_problem(rng, self.level)
        while split_of(question, chain) != self.split:
            question, chain = draw_problem(rng, self.level)
        answer = str(chain[-1][3])
        solution = f"{working(chain)}\n{FINAL_PREFIX}{answer}"
        return Problem(id=f"{self.split}/{i}", question=question, answer=answer, solution=solution, index=i)


def distinct_problems(split: str, level: Level) -> list[Problem]:
    """The fixed list of a finite split: its first SIZES[split] problems with texts that differ."""
    by_question: dict[str, Problem] = {}
    for problem in EndlessProblems(split, level):
        by_question.setdefault(problem.question, problem)
        if len(by_question) == SIZES[split]:
            break
    return list(by_question.values())


class WordProblems(Task):
    """Training never ends; validation and test are fixed lists, the same for every seed."""

    name = "word_problems"
    version = 1  # part of the base model's cache key: raise it whenever a text changes
    stop_strings = ("\n\nProblem:",)

    def __init__(self, data: DataConfig | None = None, rewards: RewardsConfig | None = None):
        super().__init__(data, rewards)
        self.level = LEVELS[self.data.level]

    def check_path(self) -> None:
        """ValueError for any data.path: whoever names one means another task."""
        if self.data.path:
            raise ValueError(f"data.path={self.data.path!r}: task word_problems reads no file; use a --task that does")

    def load(self, split: str) -> Sequence[Problem]:
        return (distinct_problems if split in SIZES else EndlessProblems)(split, self.level)

    @property
    def solved(self) -> EndlessProblems:
        """Problems whose `solution` supervised training learns from; solutions of `train` are never shown."""
        return EndlessProblems("solved", self.level)

    @cached_property
    def exemplars(self) -> tuple[Problem, ...]:
        return tuple(self.solved[i] for i in range(8))

    def plain_prompt(self, question: str, exemplars: Sequence[Problem]) -> str:
        """Worked exemplars and the question, blank lines between. No instruction: the model knows this form alone."""
        worked = [f"Problem: {shot.question}\nSolution:\n{shot.solution}" for shot in exemplars]
        return "\n\n".join([*worked, f"Problem: {question}\nSolution:\n"])
