"""Task `gsm8k`: grade-school word problems (arXiv:2110.14168), from the hub (openai/gsm8k) or local files; and task
`jsonl`: any file with a prompt and an answer column, asked and scored like it.

GSM8K's answer column is worked reasoning with calculator marks `<<48/2=24>>`, then a line `#### 24`. The marks are
removed, and a worked solution ends in the line that the rewards ask for.
"""

from __future__ import annotations

import re

from grpo.config import DataConfig, RewardsConfig
from grpo.records import Problem
from grpo.rewards import FINAL_PREFIX, parse_number
from grpo.tasks.rows import DATA, RowTask, read_file

# Written for this project: short, and with plain, money, comma, percent and negative answers among them.
EXEMPLARS = tuple(Problem(id=id, **row) for id, _, row in read_file(DATA / "exemplars.jsonl"))
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


class Gsm8k(RowTask):
    """7,473 training and 1,319 test problems; 10 % of the training problems are held out for validation."""

    name = "gsm8k"
    question_column, answer_column = "question", "answer"
    hub = ("openai/gsm8k", "main")
    exemplars = EXEMPLARS

    def read_answer(self, text: str) -> tuple[str, str]:
        reasoning, mark, answer = (part.strip() for part in text.rpartition("####"))
        if not mark or parse_number(answer) is None:
            raise ValueError(f"the answer does not end in '#### <number>': {text[-60:]!r}")
        return answer, "\n".join([_CALCULATOR_MARK.sub("", reasoning), FINAL_PREFIX + answer])


class Jsonl(RowTask):
    """The user's own rows: columns `data.prompt_column` and `data.answer_column`; every other one reaches the rewards.

    The reference answer must be a number; others need a task of your own. The solutions are the final line alone, so
    `prompt.exemplars: builtin` teaches more.
    """

    name = "jsonl"
    exemplars = EXEMPLARS

    def __init__(self, data: DataConfig | None = None, rewards: RewardsConfig | None = None):
        super().__init__(data, rewards)
        self.question_column, self.answer_column = self.data.prompt_column, self.data.answer_column

    def read_answer(self, text: str) -> tuple[str, str]:
        if parse_number(text) is None:
            raise ValueError(
                f"answer {text[:60]!r} is not a number; "
                "other answers need a task of your own: --task path/to/file.py:ClassName"
            )
        return text, FINAL_PREFIX + text
