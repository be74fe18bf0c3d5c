"""python -m grpo.rewards check TASK [--completions FILE --output FILE]: what the rewards pay, before training.

With --completions it scores the completions of a file, as eval.py --completions does; no model and no data set is
loaded. Without, it scores reference answers and deliberately wrong ones of the task's validation split.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from itertools import compress, islice
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo.config import DataConfig, RewardsConfig
from grpo.records import ABSTAIN, ERROR, OK, TIMEOUT, Completion, Group
from grpo.rewards.pool import Pool, make_pool
from grpo.rewards.runner import (
    Outcome,
    Reward,
    Scorer,
    held_log,
    refuse_failed,
    score_finished,
    score_groups,
    score_texts,
    weighted_total,
)
from grpo.tasks import Task, make_task
from grpo.tasks.rows import as_text, read_jsonl

PROBLEMS = 20  # of the validation split, tried if no file is given
_IS_VALID = {  # field of a line: whether its value is valid
    "completion": lambda value: isinstance(value, str),
    "answer": lambda value: as_text(value) is not None,
    "finish_reason": lambda value: isinstance(value, str | None),
}
_WORST_FIRST = (ERROR, TIMEOUT, ABSTAIN, OK)


def main(argv: list[str] | None = None) -> int:
    """Shows what a task's rewards pay; 0 on success, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m grpo.rewards", description=__doc__)
    check = parser.add_subparsers(required=True).add_parser("check", help="what each component pays")
    check.add_argument("task", help="task name, or path/to/file.py:ClassName")
    check.add_argument("--completions", help="JSONL with `completion` and `answer` on every line")
    check.add_argument("--output", help="the same lines with `rewards`, `reward` and `status` added")
    check.add_argument("--data.path", "--data", dest="data_path", default="", help="where the task's problems are")
    for name in ("prompt", "answer"):
        dest, text = f"{name}_column", f"column of the {name} (task jsonl; default: {name})"
        check.add_argument(f"--data.{name}-column", dest=dest, default=name, help=text)
    check.add_argument("--rewards.functions", dest="functions", nargs="+", default=[], help="as in train.py")
    check.add_argument("--rewards.weights", dest="weights", nargs="+", default=[], help="as in train.py")
    args = parser.parse_args(argv)
    if bool(args.completions) != bool(args.output):
        check.error("--completions and --output must be given together")
    settings = RewardsConfig(functions=tuple(args.functions), weights=tuple(args.weights))
    try:
        data = DataConfig(path=args.data_path, prompt_column=args.prompt_column, answer_column=args.answer_column)
        task = make_task(args.task, data, settings)
        with make_pool(settings) as pool:
            if args.completions:
                options = {"require_finish": settings.require_finish, "score": pool}
                print(report(score_file(task.rewards, args.completions, args.output, **options), args.output))
            else:
                print(trial_table(task, pool))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def trial_table(task: Task, pool: Pool) -> str:
    """A row for each kind of trial completion: the mean of every component and of the reward, and what failed."""
    problems = list(islice(task.split("validation"), PROBLEMS))
    trials = [task.trial_completions(p, other) for p, other in zip(problems, problems[1:] + problems[:1], strict=True)]
    groups = []
    for problem, trial in zip(problems, trials, strict=True):
        completions = [Completion([], [], text, "stop", i) for i, text in enumerate(trial.values())]
        groups.append(Group(replace(problem, prompt=problem.question), completions, step=0))
    with held_log():
        scores = score_groups(groups, task.rewards, require_finish=False, score=pool)
        refuse_failed([row for group in scores.status for row in group], task.rewards)
    rows = [["", *task.rewards, "reward", "not ok"]]
    for i, name in enumerate(trials[0]):
        means = [*scores.components[:, i].nanmean(0).tolist(), scores.total[:, i].mean().item()]
        failed = sum(status != OK for group in scores.status for status in group[i])
        rows.append([name, *("-" if math.isnan(mean) else f"{mean:.3f}" for mean in means), str(failed)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"mean over {len(problems)} problems of the validation split of {task.name}:", *lines])


def score_file(
    rewards: dict[str, Reward],
    completions_path: Path | str,
    output_path: Path | str,
    *,
    require_finish: bool,
    score: Scorer = score_texts,
) -> list[dict[str, Any]]:
    """Scores every line of a JSONL file and writes it back with `rewards`, `reward` and `status` added.

    A line needs `completion` and `answer`; `finish_reason` is optional: a missing one counts as finished, and with
    require_finish "length" earns nothing. Other keys reach the reward functions as columns and are kept.
    `rewards` holds each component (null where it is not ok), `reward` the weighted total, `status` the worst
    status of the components. Returns what it wrote. Errors name the file and the line.
    """
    rows = [_checked(row, where) for where, row in read_jsonl(Path(completions_path))]
    if not rows:
        raise ValueError(f"{completions_path} contains no completions; write one JSON object per line")
    is_finished = [not (require_finish and (row.get("finish_reason") or "").lower() == "length") for row in rows]
    texts, columns = [row["completion"] for row in rows], [_columns(row) for row in rows]
    with held_log():
        table = score_finished(texts, columns, is_finished, rewards, score)
        refuse_failed([[outcome.status for outcome in row] for row in compress(table, is_finished)], rewards)
    scored = [row | _verdict(outcomes, rewards) for row, outcomes in zip(rows, table, strict=True)]
    Path(output_path).parent.mkdir(parents=True, exist_ok=True)
    with open(output_path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in scored)
    return scored


def _checked(row: dict, where: str) -> dict:
    """The row, or an error that says what is wrong with the line."""
    for name, is_valid in _IS_VALID.items():
        if not is_valid(row.get(name)):
            raise ValueError(
                f"{where}: {name}={row.get(name)!r}; every line needs `completion`, a string, and `answer`, a string "
                'or number; `finish_reason` is "stop", "eos" or "length", or left out'
            )
    if "completions" in row:
        raise ValueError(f"{where}: reward functions receive the texts as 'completions'; rename this column")
    return row


def _columns(row: dict) -> dict[str, Any]:
    """What the reward functions may see of a line: everything but the completion itself and how it ended."""
    rest = {name: value for name, value in row.items() if name not in ("completion", "finish_reason")}
    return rest | {"answer": as_text(row["answer"])}


def _verdict(outcomes: list[Outcome], rewards: dict[str, Reward]) -> dict[str, Any]:
    return {
        "rewards": {name: o.value if o.status == OK else None for name, o in zip(rewards, outcomes, strict=True)},
        "reward": weighted_total(outcomes, rewards),
        "status": min((o.status for o in outcomes), key=_WORST_FIRST.index),
    }


def report(rows: list[dict], output_path: str) -> str:
    """Sums up what `score_file` wrote: counts by status, mean of each component and of the reward where none failed."""
    values = {"reward": [None if row["status"] in (ERROR, TIMEOUT) else row["reward"] for row in rows]}
    values |= {name: [row["rewards"][name] for row in rows] for name in rows[0]["rewards"]}
    known = {name: [value for value in column if value is not None] for name, column in values.items()}
    lines = [f"{name:<20} {f'{fmean(column):.4f}' if column else '-'}" for name, column in known.items()]
    counts = ", ".join(f"{count} {status}" for status, count in Counter(row["status"] for row in rows).items())
    return "\n".join([f"{len(rows)} completions ({counts}), mean of:", *lines, f"written to {output_path}"])


if __name__ == "__main__":
    sys.exit(main())
