"""Scores completions that exist already, from a file to a file. Loads no model and no data set.

Called by `python -m grpo.rewards check` and by eval.py --completions.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo.records import ABSTAIN, ERROR, OK, TIMEOUT
from grpo.rewards.runner import Outcome, Reward, Scorer, score_paid, score_texts, weighted_total
from grpo.tasks.rows import read_jsonl

_KINDS = {"completion": str, "answer": str | int | float, "finish_reason": str | None}
_WORST_FIRST = (ERROR, TIMEOUT, ABSTAIN, OK)


def score_file(
    rewards: dict[str, Reward],
    completions_path: Path | str,
    output_path: Path | str,
    *,
    require_finish: bool,
    score: Scorer = score_texts,
) -> dict[str, Any]:
    """Scores every line of a JSONL file and writes it back with `rewards`, `reward` and `status` added.

    A line needs `completion` and `answer`; `finish_reason` is optional: absent counts as finished, and "length"
    pays nothing while require_finish. Other keys reach the reward functions as columns and are kept.
    `rewards` holds each component (null where it is not ok), `reward` the weighted total, `status` the worst
    status of the components. Returns the summary: count, mean reward, mean of each component, count by status.
    Errors name the file and the line.
    """
    rows = [_checked(row, where) for where, row in read_jsonl(Path(completions_path))]
    if not rows:
        raise ValueError(f"{completions_path} holds no completions; write one JSON object a line")
    is_paid = [not (require_finish and row.get("finish_reason") == "length") for row in rows]
    table = score_paid([row["completion"] for row in rows], [_columns(row) for row in rows], is_paid, rewards, score)
    scored = [row | _verdict(outcomes, rewards) for row, outcomes in zip(rows, table, strict=True)]
    with open(output_path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in scored)
    return _summary(scored, rewards)


def _checked(row: dict, where: str) -> dict:
    """The row, or an error that says what is wrong with the line."""
    for name, kinds in _KINDS.items():
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(
                f"{where}: {name}={value!r}; every line needs `completion`, a text, and `answer`, a text or number; "
                '`finish_reason` is "stop", "eos" or "length", or left out'
            )
    return row


def _columns(row: dict) -> dict[str, Any]:
    """What the reward functions may see of a line: everything but the completion itself and how it ended."""
    rest = {name: value for name, value in row.items() if name not in ("completion", "finish_reason")}
    return rest | {"answer": str(row["answer"])}


def _verdict(outcomes: list[Outcome], rewards: dict[str, Reward]) -> dict[str, Any]:
    return {
        "rewards": {name: o.value if o.status == OK else None for name, o in zip(rewards, outcomes, strict=True)},
        "reward": weighted_total(outcomes, rewards),
        "status": min((o.status for o in outcomes), key=_WORST_FIRST.index),
    }


def _summary(rows: list[dict], rewards: dict[str, Reward]) -> dict[str, Any]:
    values = {name: [row["rewards"][name] for row in rows if row["rewards"][name] is not None] for name in rewards}
    return {
        "completions": len(rows),
        "reward": fmean(row["reward"] for row in rows),
        "rewards": {name: fmean(known) if known else None for name, known in values.items()},
        "status": dict(Counter(row["status"] for row in rows)),
    }
