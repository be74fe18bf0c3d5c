"""python -m grpo.rewards check TASK --completions FILE.jsonl --output FILE.jsonl: what the rewards pay."""

from __future__ import annotations

import argparse
import sys

from grpo.config import DataConfig, RewardsConfig
from grpo.rewards.files import score_file
from grpo.rewards.pool import make_pool
from grpo.tasks import make_task


def main(argv: list[str] | None = None) -> int:
    """Scores a file of completions with a task's rewards; 0 on success, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m grpo.rewards", description=__doc__)
    check = parser.add_subparsers(required=True).add_parser("check", help="score a file of completions")
    check.add_argument("task", help="task name, or path/to/file.py:ClassName")
    check.add_argument("--completions", required=True, help="JSONL with `completion` and `answer` on every line")
    check.add_argument("--output", required=True, help="the same lines with `rewards`, `reward` and `status` added")
    args = parser.parse_args(argv)
    settings = RewardsConfig()
    try:
        task = make_task(args.task, DataConfig(), settings)
        with make_pool(settings) as pool:
            options = {"require_finish": settings.require_finish, "score": pool}
            summary = score_file(task.rewards, args.completions, args.output, **options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(summary, args.output))
    return 0


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
