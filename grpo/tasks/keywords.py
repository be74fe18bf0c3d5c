"""Task `keywords`: domain text, scored by the required terms that it uses in sentences (grpo.rewards.keywords).

Rows have `prompt`, `groups` and optionally `answer` (a reference text), `sections` and `ordered`, from data.path;
without a path twelve short medical cases in data/keywords.jsonl, written for this project to show the format. They
are no medical advice.
"""

from __future__ import annotations

from typing import Any

from grpo.config import DataConfig, RewardsConfig
from grpo.records import Problem
from grpo.rewards import Reward
from grpo.rewards.keywords import keyword_reward, stems
from grpo.tasks.rows import DATA, RowTask


class Keywords(RowTask):
    """Full marks, which accuracy counts, are for all groups, in prose and where they belong."""

    name = "keywords"
    embedded = DATA / "keywords.jsonl"
    instruction = "Answer in full sentences, with the headings `Diagnosis:` and `Therapy:`."
    rewards = {"correctness": Reward(keyword_reward, 1.0)}

    def __init__(self, data: DataConfig | None = None, rewards: RewardsConfig | None = None):
        super().__init__(data, rewards)
        if data and data.path and self.instruction == Keywords.instruction:  # the headings are of the embedded rows
            self.instruction = "Answer in full sentences."

    def _problem(self, id: str, where: str, row: dict[str, Any]) -> Problem:
        groups, headings = row.get("groups"), row.get("sections")
        is_groups = isinstance(groups, list) and groups and all(isinstance(g, list) and g for g in groups)
        if not is_groups or not all(isinstance(term, str) and stems(term) for group in groups for term in group):
            raise ValueError(f"{where}: groups={groups!r:.80} is not a list of groups of terms, each with a word")
        is_text = isinstance(headings, list) and all(isinstance(heading, str | None) for heading in headings)
        if headings is not None and not (is_text and len(headings) == len(groups)):
            raise ValueError(
                f"{where}: sections={headings!r:.80} for {len(groups)} groups; give a heading or null for each"
            )
        answer = self._text(row, "answer", where) if row.get("answer") else ""
        rest = {name: value for name, value in row.items() if name not in ("prompt", "answer")}
        return Problem(id=id, question=self._text(row, "prompt", where), answer=answer, solution=answer, columns=rest)
