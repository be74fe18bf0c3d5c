"""GSM8K as it is: all 8,792 problems. Skipped where the files are not on this machine."""

import os
from pathlib import Path

import pytest

from grpo.config import DataConfig, RewardsConfig
from grpo.rewards import FINAL_PREFIX, parse_number, score_texts
from grpo.rewards.runner import weighted_total
from grpo.tasks import make_task

FOLDER = Path(os.environ.get("GRPO_GSM8K") or Path(__file__).parents[1].parent / "shared" / "data" / "gsm8k")
pytestmark = pytest.mark.skipif(
    not (FOLDER / "train.jsonl").is_file(),
    reason="no GSM8K files; set GRPO_GSM8K to a folder with train.jsonl, test.jsonl",
)


@pytest.fixture(scope="module")
def task():
    return make_task("gsm8k", DataConfig(path=str(FOLDER)), RewardsConfig())


@pytest.fixture(scope="module")
def problems(task):
    return [problem for split in task.splits for problem in task.split(split)]


def test_the_splits_have_their_sizes_and_share_no_question(task, problems):
    assert [len(task.split(split)) for split in task.splits] == [6726, 747, 1319]
    assert len({problem.id for problem in problems}) == len({problem.question for problem in problems}) == 8792


def test_no_calculator_mark_is_left(problems):
    assert not any("<<" in problem.solution or ">>" in problem.solution for problem in problems)


def test_every_reference_earns_all_when_written_in_the_format_and_half_when_altered(task, problems):
    answers = [problem.answer for problem in problems]
    assert (sum(a.startswith("-") for a in answers), sum("," in a for a in answers)) == (5, 93)

    def totals(completions):
        rows = score_texts(completions, {"answer": answers}, task.rewards)
        return {weighted_total(row, task.rewards) for row in rows}

    assert totals([f"Some working.\n{FINAL_PREFIX}{answer}" for answer in answers]) == {1.5}
    assert totals([problem.solution for problem in problems]) == {1.5}
    assert totals([f"Some working.\n{FINAL_PREFIX}{parse_number(answer) + 1}" for answer in answers]) == {0.5}
    assert totals([f"Some working.\nThe answer is {answer}" for answer in answers]) == {0.0}
