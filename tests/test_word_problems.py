"""The embedded task: true arithmetic, splits without a common equation chain, problems that never change."""

import hashlib
import re
from itertools import islice

import pytest

from grpo.config import DataConfig, RewardsConfig
from grpo.rewards import score_texts
from grpo.tasks import make_task, word_problems

SPLITS = ("test", "validation", "solved", "train")
LEVELS = (1, 2, 3)


@pytest.fixture(scope="module")
def tasks():
    return {level: make_task("word_problems", DataConfig(level=level), RewardsConfig()) for level in LEVELS}


@pytest.fixture(scope="module")
def task(tasks):
    return tasks[1]


def problems_of(task, split, count=1000):
    return list(islice((task.solved if split == "solved" else task.split(split)), count))


def chain_of(problem):
    return problem.solution.rsplit("\n", 1)[0]


def answer_by_reading(question):
    """An independent solver: reads the sentences one by one, knowing nothing of how they were made."""
    name, things = question.split()[0], re.search(r"How many (\w+)", question)[1]
    have = None
    for sentence in re.findall(r"[^.?]+[.?]", question):
        numbers = [int(n) for n in re.findall(r"\d+", sentence)]
        if re.search(rf"\d+ (?!more|to |bags|{things})\w+", sentence):
            continue  # so many of something else
        if " bags with " in sentence:
            have = numbers[0] * numbers[1]
        elif f"{name} has " in sentence:
            have = numbers[0]
        elif " buys " in sentence or " finds " in sentence or f"gives {name} " in sentence:
            have += numbers[0]
        elif numbers:
            have -= numbers[0]
    return str(have)


def test_the_first_test_problem_is_the_one_that_was_worked_by_hand(task):
    first = task.split("test")[0]
    assert first.id == "test/0"
    assert first.question == (
        "Ben has 6 apples. Ben loses 4. Ben finds 3 more. Ben gives 3 to Ann. How many apples does Ben have now?"
    )
    assert first.solution == "6-4=2\n2+3=5\n5-3=2\n#### The final answer is 2"
    assert first.answer == "2"


@pytest.mark.parametrize("level, digest", [(1, "13fd229c80303762"), (2, "8d0bdcaec8afb326"), (3, "9e76cba9dd86b7bf")])
def test_the_test_split_never_changes(tasks, level, digest):
    test = tasks[level].split("test")
    assert len(test) == 1000
    assert hashlib.sha256("\n".join(problem.question for problem in test).encode()).hexdigest()[:16] == digest


def test_on_the_hardest_level_numbers_are_larger_and_some_do_not_matter(tasks):
    first = tasks[3].split("test")[0]
    assert first.question == (
        "Ann has 4 bags with 5 pens each. Ann gives 4 pens to Amy. Ann also has 65 coins. Ann finds 9 more pens. "
        "Ann also has 19 coins. Ann gives 13 pens to Amy. Amy has 48 apples. Ann buys 82 more pens. "
        "Ann also has 60 books. Ann finds 80 more pens. How many pens does Ann have now?"
    )
    chain = "4*5=20\n20-4=16\n16+9=25\n25-13=12\n12+82=94\n94+80=174"  # worked by hand
    assert first.solution == f"{chain}\n#### The final answer is 174"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_answer_follows_from_the_question(tasks, level, split):
    for problem in problems_of(tasks[level], split):
        assert problem.answer == answer_by_reading(problem.question), problem


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("level, steps, largest", [(1, {1, 2, 3}, 12), (2, {1, 2, 3, 4}, 99), (3, {2, 3, 4, 5, 6}, 99)])
def test_every_worked_solution_is_a_true_chain_that_ends_in_the_answer(tasks, level, steps, largest, split):
    lengths = set()
    for problem in problems_of(tasks[level], split):
        assert max(map(int, re.findall(r"\d+", problem.question))) <= largest
        equations = re.findall(r"(\d+)([*+-])(\d+)=(\d+)", chain_of(problem))
        assert "\n".join(f"{a}{sign}{b}={c}" for a, sign, b, c in equations) == chain_of(problem)
        apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
        assert all(apply[sign](int(a), int(b)) == int(c) for a, sign, b, c in equations)
        assert all(before[3] == after[0] for before, after in zip(equations, equations[1:], strict=False))
        assert equations[-1][3] == problem.answer
        lengths.add(len(equations))
    assert lengths == steps


def test_training_validation_and_test_share_no_equation_chain_not_even_over_levels(tasks):
    chains = {
        split: {chain_of(problem) for task in tasks.values() for problem in problems_of(task, split, 1000)}
        for split in SPLITS
    }
    training = chains["train"] | chains["solved"]
    assert not training & chains["test"]
    assert not training & chains["validation"]
    assert not chains["validation"] & chains["test"]


def test_reinforcement_learning_meets_no_problem_that_supervised_training_saw(task):
    solved = {problem.question for problem in problems_of(task, "solved", 5000)}
    train = {problem.question for problem in problems_of(task, "train", 5000)}
    assert len(solved) > 4500 and not solved & train


def test_validation_and_test_hold_no_problem_twice(task):
    for split in ("validation", "test"):
        questions = [problem.question for problem in task.split(split)]
        assert len(set(questions)) == len(questions) == word_problems.SIZES[split]


def test_a_problem_depends_on_its_place_only(task):
    other = make_task("word_problems", DataConfig(), RewardsConfig())
    forwards = [task.split("train")[i] for i in (0, 1, 10**6)]
    backwards = [other.split("train")[i] for i in (10**6, 1, 0)]
    assert forwards == backwards[::-1]
    assert task.split("train").endless


def test_a_negative_place_is_refused(task):
    with pytest.raises(IndexError, match="problem -1 of an endless split"):
        task.split("train")[-1]


def test_a_worked_solution_earns_everything_and_a_wrong_number_the_format_only(task):
    problem = task.split("test")[0]
    wrong = problem.solution[: -len(problem.answer)] + str(int(problem.answer) + 1)
    columns = {"answer": [problem.answer] * 2}
    right_row, wrong_row = score_texts([problem.solution, wrong], columns, task.rewards)
    assert [outcome.value for outcome in right_row] == [1.0, 1.0]
    assert [outcome.value for outcome in wrong_row] == [1.0, 0.0]


def test_constructing_the_task_draws_nothing(monkeypatch):
    monkeypatch.setattr(word_problems, "draw_problem", lambda *_: pytest.fail("a problem was drawn"))
    make_task("word_problems", DataConfig(), RewardsConfig())


def test_the_prompt_is_the_question_after_its_worked_exemplars(task):
    shots = task.exemplars[:1]
    assert task.plain_prompt("Q?", []) == "Problem: Q?\nSolution:\n"
    assert task.plain_prompt("Q?", shots) == (
        f"Problem: {shots[0].question}\nSolution:\n{shots[0].solution}\n\nProblem: Q?\nSolution:\n"
    )


def test_a_path_that_would_not_be_read_is_refused():
    word_problems.WordProblems().check_path()
    with pytest.raises(ValueError, match="data.path='mine.jsonl': task word_problems reads no file; use a --task"):
        word_problems.WordProblems(DataConfig(path="mine.jsonl")).check_path()
