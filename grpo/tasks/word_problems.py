"""The embedded task: endless seeded word problems of one to three steps, in the answer format of GSM8K.

    Problem: Leo has 3 bags with 4 coins each. Max gives Leo 1 more. How many coins does Leo have now?
    Solution:
    3*4=12
    12+1=13
    #### The final answer is 13

Problem i of a split is a pure function of the split's name and i: nothing is stored, nothing is loaded. The
splits are apart by equation chain: a chain (3*4=12, 12+1=13) is hashed to test, validation or training.
Disjoint texts would not do: with other names and objects, four fifths of the test chains were also in training.
What is for training is parted once more, by text, into `solved`, whose worked solutions supervised training
learns from (grpo.base), and `train`, where reinforcement learning meets other problems and only their answers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from functools import cached_property

from grpo.records import Problem
from grpo.rewards import FINAL_PREFIX
from grpo.tasks import Task

SIZES = {"test": 1000, "validation": 500}  # the other two never end

NAMES = ("Amy", "Ann", "Ben", "Eva", "Leo", "Max", "Mia", "Sam", "Tom", "Zoe")
OBJECTS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
MORE = ("{name} buys {n} more.", "{other} gives {name} {n} more.", "{name} finds {n} more.")
FEWER = ("{name} gives {n} to {other}.", "{name} loses {n}.", "{name} sells {n}.")

Equation = tuple[int, str, int, int]  # 3, "*", 4, 12


def draw_problem(rng: random.Random) -> tuple[str, list[Equation]]:
    """A question and its chain of one to three equations, each starting from the result of the one before."""
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(OBJECTS)
    steps = rng.choices((1, 2, 3), weights=(1, 2, 3))[0]
    if rng.random() < 0.3:
        bags, each = rng.randint(2, 5), rng.randint(2, 5)
        sentences, chain = [f"{name} has {bags} bags with {each} {things} each."], [(bags, "*", each, bags * each)]
    else:
        sentences, chain = [f"{name} has {(start := rng.randint(3, 12))} {things}."], []
    have = chain[-1][3] if chain else start
    while len(chain) < steps:
        more = have < 2 or rng.random() < 0.5
        n = rng.randint(1, 5 if more else min(5, have - 1))  # never down to nothing
        sentences.append(rng.choice(MORE if more else FEWER).format(name=name, other=other, n=n))
        chain.append((have, "+", n, have + n) if more else (have, "-", n, have - n))
        have = chain[-1][3]
    return " ".join([*sentences, f"How many {things} does {name} have now?"]), chain


def working(chain: Sequence[Equation]) -> str:
    """The chain as text, one equation a line: what a worked solution says, and what parts the splits."""
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

    def __init__(self, split: str):
        self.split = split

    def __getitem__(self, i: int) -> Problem:
        if i < 0:
            raise IndexError(f"problem {i} of an endless split: count from 0")
        rng = random.Random(f"word_problems {self.split} {i}")  # a str seeds by its SHA-512, not by hash()
        question, chain = draw_problem(rng)
        while split_of(question, chain) != self.split:
            question, chain = draw_problem(rng)
        answer = str(chain[-1][3])
        solution = f"{working(chain)}\n{FINAL_PREFIX}{answer}"
        return Problem(id=f"{self.split}/{i}", question=question, answer=answer, solution=solution, index=i)


def distinct_problems(split: str) -> list[Problem]:
    """The fixed list of a finite split: its first SIZES[split] problems with texts that differ."""
    endless, by_question, i = EndlessProblems(split), {}, 0
    while len(by_question) < SIZES[split]:
        by_question.setdefault(endless[i].question, endless[i])
        i += 1
    return list(by_question.values())


class WordProblems(Task):
    """Training never ends; validation and test are fixed lists, the same for every seed."""

    name = "word_problems"
    version = 1  # part of the base model's cache key: raise it whenever a text changes
    stop_strings = ("\n\nProblem:",)
    solved = EndlessProblems("solved")  # with `solution` to be learnt from; train's solutions are never shown

    def load(self, split: str) -> Sequence[Problem]:
        return distinct_problems(split) if split in SIZES else EndlessProblems(split)

    @cached_property
    def exemplars(self) -> tuple[Problem, ...]:
        return tuple(self.solved[i] for i in range(8))

    def plain_prompt(self, question: str, exemplars: Sequence[Problem]) -> str:
        """Worked exemplars and the question, blank lines between. No instruction: the model knows this form alone."""
        worked = [f"Problem: {shot.question}\nSolution:\n{shot.solution}" for shot in exemplars]
        return "\n\n".join([*worked, f"Problem: {question}\nSolution:\n"])
