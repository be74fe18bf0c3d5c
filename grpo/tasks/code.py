"""Task `code`: write a Python function; scored by running it against tests (grpo.rewards.code), in a sandbox.

Rows are as in MBPP or HumanEval, from a file, a folder or the hub (data.path); without a path the 66 small problems in
data/code.jsonl, which were written for this project: a quarter each for validation and test.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from grpo.config import DataConfig, RewardsConfig
from grpo.records import Problem
from grpo.rewards import Reward
from grpo.rewards.code import parses, read_tests, runs, tests_passed
from grpo.rewards.sandbox import find_sandbox
from grpo.tasks.rows import DATA, RowTask

WALL_SHARE = 0.6  # of rewards.timeout_s is the program's; the rest is for putting up the walls, on a busy machine


class Code(RowTask):
    """Constructing it tests the sandbox; ValueError where there is none (see rewards.sandbox)."""

    name = "code"
    embedded = DATA / "code.jsonl"
    instruction = "Write the Python function that is asked for. Answer with one code block and nothing else."

    def __init__(self, data: DataConfig | None = None, rewards: RewardsConfig | None = None):
        super().__init__(data, rewards)
        rewards = rewards or RewardsConfig()
        sandbox = find_sandbox(rewards.sandbox, WALL_SHARE * rewards.timeout_s)
        self.rewards = {
            "parses": Reward(parses, 0.1),
            "runs": Reward(partial(runs, sandbox=sandbox), 0.2, batch_size=1),
            "correctness": Reward(partial(tests_passed, sandbox=sandbox), 0.7, batch_size=1),
        }

    def _problem(self, id: str, where: str, row: dict[str, Any]) -> Problem:
        question, code = row.get("prompt") or row.get("text"), row.get("code") or row.get("canonical_solution") or ""
        if not question:
            raise ValueError(f"{where}: no column `prompt` or `text` among {sorted(row)}")
        if not isinstance(question, str) or not isinstance(code, str):
            raise ValueError(f"{where}: prompt={question!r:.80} and code={code!r:.80} must be strings")
        try:
            read_tests(row | {"answer": code})
        except (ValueError, SyntaxError, KeyError, TypeError) as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"{where}: {kind}{error}") from None
        rest = {name: value for name, value in row.items() if name not in ("prompt", "text", "code")}
        return Problem(id=id, question=question, answer=code, solution=f"```python\n{code}\n```", columns=rest)
