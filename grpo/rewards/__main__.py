"""python -m grpo.rewards check TASK [--completions FILE --output FILE]: what the rewards pay, before training.

Without a file: on reference answers and on deliberately wrong ones of the task's validation split.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from itertools import islice

from grpo.config import DataConfig, RewardsConfig
from grpo.records import OK, Completion, Group, Problem
from grpo.rewards.files import score_file
from grpo.rewards.pool import Pool, make_pool
from grpo.rewards.runner import score_groups
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
    problems = list(islice(task.split("validation"), PROBLEMS))
    trials = [task.trial_completions(p, other) for p, other in zip(problems, problems[1:] + problems[:1], strict=True)]
    groups = [_group(problem, list(trial.values())) for problem, trial in zip(problems, trials, strict=True)]
    scores = score_groups(groups, task.rewards, require_finish=False, score=pool)
    rows = [["", *task.rewards, "reward", "not ok"]]
    for i, name in enumerate(trials[0]):
        means = [*scores.components[:, i].nanmean(0).tolist(), scores.total[:, i].mean().item()]
        failed = sum(status != OK for group in scores.status for status in group[i])
        rows.append([name, *("-" if math.isnan(mean) else f"{mean:.3f}" for mean in means), str(failed)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"mean over {len(problems)} problems of the validation split of {task.name}:", *lines])


def _group(problem: Problem, texts: list[str]) -> Group:
    completions = [Completion([], [], text, "stop", i) for i, text in enumerate(texts)]
    return Group(replace(problem, prompt=problem.question), completions, step=0)


def report(summary: dict, output_path: str) -> str:
    """The summary of `score_file` as a few lines of text."""
    means = {"reward": summary["reward"], **summary["rewards"]}
    lines = [f"{name:<20} {'-' if mean is None else f'{mean:.4f}'}" for name, mean in means.items()]
    counts = ", ".join(f"{count} {status}" for status, count in summary["status"].items())
    head = f"{summary['completions']} completions ({counts}), mean of:"
    return "\n".join([head, *lines, f"written to {output_path}"])


if __name__ == "__main__":
    sys.exit(main())
