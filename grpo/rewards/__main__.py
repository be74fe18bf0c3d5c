"""python -m grpo.rewards check TASK [--completions FILE --output FILE]: what the rewards pay, before training.

Without a file: on reference answers and on deliberately wrong ones of the task's validation split.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import fmean

from grpo.config import DataConfig, RewardsConfig
from grpo.records import OK, Problem
from grpo.rewards.files import score_file
from grpo.rewards.pool import Pool, make_pool
from grpo.rewards.runner import score_paid, weighted_total
from grpo.tasks import Task, make_task

PROBLEMS = 20  # of the validation split, tried where no file is given


def main(argv: list[str] | None = None) -> int:
    """Shows what a task's rewards pay; 0 on success, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m grpo.rewards", description=__doc__)
    check = parser.add_subparsers(required=True).add_parser("check", help="what each component pays")
    check.add_argument("task", help="task name, or path/to/file.py:ClassName")
    check.add_argument("--completions", help="JSONL with `completion` and `answer` on every line")
    check.add_argument("--output", help="the same lines with `rewards`, `reward` and `status` added")
    check.add_argument("--data.path", dest="data_path", default="", help="where the task's problems are")
    check.add_argument("--rewards.functions", dest="functions", nargs="+", default=[], help="as in train.py")
    check.add_argument("--rewards.weights", dest="weights", nargs="+", default=[], help="as in train.py")
    args = parser.parse_args(argv)
    if bool(args.completions) != bool(args.output):
        check.error("--completions and --output go together")
    settings = RewardsConfig(functions=tuple(args.functions), weights=tuple(args.weights))
    try:
        task = make_task(args.task, DataConfig(path=args.data_path), settings)
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
    split = task.split("validation")
    problems = [split[i] for i in range(PROBLEMS if getattr(split, "endless", False) else min(PROBLEMS, len(split)))]
    trials = [task.trial_completions(p, other) for p, other in zip(problems, problems[1:] + problems[:1], strict=True)]
    rows = [["", *task.rewards, "reward", "not ok"]]
    for name in trials[0]:
        rows.append([name, *_means(task, pool, problems, [trial[name] for trial in trials])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"mean over {len(problems)} problems of the validation split of {task.name}:", *lines])


def _means(task: Task, pool: Pool, problems: Sequence[Problem], texts: list[str]) -> list[str]:
    columns = [{**p.columns, "answer": p.answer, "question": p.question, "prompt": p.question} for p in problems]
    table = score_paid(texts, columns, [True] * len(texts), task.rewards, pool)
    known = [[outcome.value for outcome in column if outcome.status == OK] for column in zip(*table, strict=True)]
    reward = fmean(weighted_total(row, task.rewards) for row in table)
    failed = sum(outcome.status != OK for row in table for outcome in row)
    return [*(f"{fmean(values):.3f}" if values else "-" for values in known), f"{reward:.3f}", str(failed)]


def report(summary: dict, output_path: str) -> str:
    """The summary of `score_file` as a few lines of text."""
    means = {"reward": summary["reward"], **summary["rewards"]}
    lines = [f"{name:<20} {'-' if mean is None else f'{mean:.4f}'}" for name, mean in means.items()]
    counts = ", ".join(f"{count} {status}" for status, count in summary["status"].items())
    return "\n".join(
        [f"{summary['completions']} completions ({counts}), mean of:", *lines, f"written to {output_path}"]
    )


if __name__ == "__main__":
    sys.exit(main())
