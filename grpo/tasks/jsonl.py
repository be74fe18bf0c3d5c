"""Task `jsonl`: any file with a prompt and an answer column, asked and scored like GSM8K.

Column names are `data.prompt_column` and `data.answer_column`; every other column reaches the reward functions.
The reference answer must be a number: other answers need a task and rewards of your own (path/to/file.py:ClassName).
"""

from __future__ import annotations

from grpo.config import DataConfig, RewardsConfig
from grpo.rewards import FINAL_PREFIX, parse_number
from grpo.tasks.gsm8k import EXEMPLARS
from grpo.tasks.rows import RowTask


class Jsonl(RowTask):
    """The user's own rows. Their solutions are the final line alone, so `prompt.exemplars: builtin` teaches more."""

    name = "jsonl"
    exemplars = EXEMPLARS
    column_remedy = "; name another with --data.prompt_column or --data.answer_column"

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
