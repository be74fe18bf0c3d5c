"""The presets on the embedded task at equal completions, several seeds each: python -m benchmarks.study --out DIR

Every run is `train.py --config configs/demo.yaml --preset P --seed S`, alike in all but the preset: the same base model
for a seed, as many completions, and the same learning rate and warm-up per step. On-policy all surrogates have the same
gradient, so a rollout is used for --minibatches optimizer steps; for only one if the surrogate has no ratio (rloo).
Dynamic sampling draws groups that it drops: a first run counts them, and the run that is compared makes only as many
steps as the budget allows. Test accuracy is of the checkpoint that validation chose. Unknown options go to train.py.

DIR/study.jsonl has one row a run, DIR/runs/ the runs. Called again, it skips finished runs and resumes unfinished ones
from their last checkpoint. The table and the plot are written to --page and next to it; of a page that exists, only the
part between BEGIN and END is replaced. Last line: JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from statistics import mean

import torch

from benchmarks.common import default_device, measured_on
from grpo import checkpoint
from grpo.config import load
from grpo.metrics import TRAINING_PHASES, git_commit, read_metrics
from grpo.objectives import PRESETS

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"
OWN = {"--config", "--preset", "--seed", "--run-dir", "--resume", "--batch.minibatches", "--optim.warmup"}
BEGIN, END = "<!-- begin: written by benchmarks.study -->", "<!-- end: written by benchmarks.study -->"
COMPARED = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")

Train = Callable[[list[str]], int]  # the command line of train.py -> its exit status
Row = dict[str, object]


def run_all(presets: list[str], seeds: list[int], settings: Row, out: Path, train: Train) -> Iterator[Row]:
    """The row of every run, made now or read again. settings: num_steps, minibatches and further options of train.py.

    ValueError where `out` holds a study with other settings or a run fails.
    """
    file = out / "study.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for row in rows:
        if row["settings"] != settings:
            raise ValueError(f"{file} has rows with {row['settings']}, but this call has {settings}; use another --out")
    done = {(row["preset"], row["seed"]): row for row in rows}
    for seed in seeds:
        for preset in presets:
            if (preset, seed) not in done:
                done[preset, seed] = run_one(preset, seed, settings, out, train)
                unfinished = file.with_suffix(".tmp")
                unfinished.write_text("".join(json.dumps(row) + "\n" for row in done.values()))
                unfinished.replace(file)
            yield done[preset, seed]


def run_one(preset: str, seed: int, settings: Row, out: Path, train: Train) -> Row:
    """Train one preset with one seed on the study's budget of completions; its row."""
    name, num_steps = f"{preset}-{seed}", settings["num_steps"]
    minibatches = 1 if PRESETS[preset].surrogate == "reinforce" else settings["minibatches"]
    options = [*settings["options"], f"--preset={preset}", f"--seed={seed}", f"--batch.minibatches={minibatches}"]
    steps = num_steps
    if PRESETS[preset].dynamic_sampling:
        unjudged = [f"--num-steps={num_steps}", "--eval.every=0", "--eval.test-problems=0"]
        drawn = finish_run(out, f"{name}-drawn", [*options, *unjudged], train)
        steps = affordable_steps(draws_by_step(read_metrics(drawn)), num_steps)
    warmup = min(1.0, load(CONFIG).optim.warmup * num_steps / steps)
    run_dir = finish_run(out, name, [*options, f"--num-steps={steps}", f"--optim.warmup={warmup}"], train)
    return {"preset": preset, "seed": seed, "settings": settings, "minibatches": minibatches, **outcome(run_dir)}


def finish_run(out: Path, name: str, options: list[str], train: Train) -> Path:
    """The folder of a finished run, which is found, resumed or started; its output goes to a file beside it."""
    run_dir = out / "runs" / name
    if (run_dir / "summary.json").exists():
        return run_dir
    if run_dir.exists() and checkpoint.latest(run_dir) is None:
        shutil.rmtree(run_dir)  # ended before its first checkpoint
    start = ["--resume", str(run_dir)] if run_dir.exists() else ["--config", str(CONFIG), "--run-dir", str(run_dir)]
    log = run_dir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            status = train([*start, *([] if start[0] == "--resume" else options)])
        except SystemExit as stop:  # an option that train.py does not know
            status = stop.code
    if status:
        raise ValueError(f"the run {name} ended with status {status}; {log} says why; rerun the same command to resume")
    return run_dir


def draws_by_step(metrics: list[Row]) -> list[int]:
    """How often each step drew prompts_per_step groups: more than once with dynamic sampling."""
    return [round(1 / (1 - row["groups_dropped"])) for row in metrics]


def affordable_steps(draws: list[int], budget: int) -> int:
    """How many of the first steps draw no more than `budget` times; at least 1."""
    return max(1, sum(total <= budget for total in accumulate(draws)))


def outcome(run_dir: Path) -> Row:
    """What a row says of a finished run."""
    summary, metrics = json.loads((run_dir / "summary.json").read_text()), read_metrics(run_dir)
    rollout = load(run_dir / "config.yaml").rollout
    drawn = [draws * rollout.prompts_per_step * rollout.group_size for draws in draws_by_step(metrics)]
    curve = [
        (total, row["validation/accuracy"])
        for total, row in zip(accumulate(drawn), metrics, strict=True)
        if "validation/accuracy" in row
    ]
    return {
        "accuracy_before": summary["accuracy_before"],
        "accuracy_after": summary["accuracy_after"],
        "best_step": summary["best_step"],
        "steps": len(metrics),
        "completions": sum(drawn),
        "entropy": [row["entropy"] for row in metrics if row["entropy"] is not None][
            -1
        ],  # None: nothing was learnt from
        "seconds": sum(summary["seconds"].get(phase, 0.0) for phase in TRAINING_PHASES),
        "validation": curve,
        "commit": git_commit(),
        "threads": torch.get_num_threads(),
    }


def table(rows: list[Row]) -> str:
    """A line for each preset, in Markdown: means over its seeds, and the lowest and highest test accuracy."""
    heading = (
        "preset",
        "seeds",
        "before",
        "after, mean",
        "lowest to highest",
        "entropy at the end",
        "completions",
        "seconds",
    )
    lines = [f"| {' | '.join(heading)} |", f"|{'---|' * len(heading)}"]
    for preset in dict.fromkeys(row["preset"] for row in rows):
        runs = [row for row in rows if row["preset"] == preset]
        over = lambda key: mean(row[key] for row in runs)  # noqa: B023
        after = [row["accuracy_after"] for row in runs]
        cells = [f"`{preset}`", str(len(runs)), f"{over('accuracy_before'):.1%}", f"{mean(after):.1%}"]
        cells += [f"{min(after):.1%} to {max(after):.1%}", f"{over('entropy'):.3f}", f"{over('completions'):,.0f}"]
        lines.append(f"| {' | '.join(cells)} | {over('seconds'):.0f} |")
    return "\n".join(lines)


def draw_plot(rows: list[Row], path: Path) -> None:
    """Validation accuracy over completions, a line a run; and each run's test accuracy, with the mean of its preset."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    curves, dots = figure.subplots(1, 2)
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    for x, preset in enumerate(presets):
        runs = [row for row in rows if row["preset"] == preset]
        for i, row in enumerate(runs):
            curves.plot(*zip(*row["validation"], strict=True), ".-", color=f"C{x}", label=None if i else preset)
        after = [row["accuracy_after"] for row in runs]
        dots.plot([x] * len(runs), after, "o", color=f"C{x}", alpha=0.5)
        dots.plot([x - 0.3, x + 0.3], [mean(after)] * 2, color=f"C{x}")
    curves.set(title="validation accuracy", xlabel="completions", ylim=(0, 1))
    curves.legend()
    dots.set(title="test accuracy: runs and mean", ylim=(0, 1), xticks=range(len(presets)), xticklabels=presets)
    for axes in (curves, dots):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def write_page(rows: list[Row], page: Path, command: str) -> None:
    """Write the table and what made it between BEGIN and END of the page, or at its end if it lacks them. The rest of
    the page stays. The plot is written next to it, where matplotlib is installed."""
    plot = page.with_suffix(".png")
    page.parent.mkdir(parents=True, exist_ok=True)
    try:
        draw_plot(rows, plot)
        picture = f"![accuracy by preset]({plot.name})\n"
    except ModuleNotFoundError as error:
        picture = f"(no plot: {error.name} was not installed)\n"
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(row["commit"] for row in rows))
    where = measured_on(default_device())
    hardware = f"{where['device']}, {where['cpus']} cores, threads per run: {where['threads']}"
    made_by = f"Table and plot by `{command}`; {hardware}, torch {torch.__version__}, commit {commits}"
    part = f"{BEGIN}\n\n{table(rows)}\n\n{picture}\n{made_by}\n\n{END}"
    text = page.read_text() if page.exists() else "# The presets on the embedded task\n"
    replaced, count = re.subn(f"{BEGIN}.*?{END}", lambda _: part, text, flags=re.DOTALL)
    page.write_text(replaced if count else f"{text.rstrip()}\n\n{part}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    what = f"{__doc__.partition(':')[0]}. Further options are those of train.py, for every run."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=what, allow_abbrev=False)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(COMPARED), metavar="PRESET")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--num-steps", type=int, default=50, help="the budget, in rollouts (default: 50)")
    parser.add_argument("--minibatches", type=int, default=2, help="optimizer steps per rollout (default: 2)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--page", type=Path, help="Markdown file for the result (default: DIR/study.md)")
    chosen, chosen.options = parser.parse_known_args(argv)
    taken = sorted(OWN & {option.split("=")[0].replace("_", "-") for option in chosen.options})
    if taken:
        parser.error(f"{', '.join(taken)}: the study sets this for every run; see --help for its own options")
    return chosen


def main(argv: list[str] | None = None) -> int:
    chosen = parse(argv)
    settings = {name: getattr(chosen, name) for name in ("num_steps", "minibatches", "options")}
    train = runpy.run_path(str(ROOT / "train.py"))["main"]  # in this process: importing torch anew costs 8 s a run
    rows = []
    try:
        for row in run_all(chosen.presets, chosen.seeds, settings, chosen.out, train):
            rows.append(row)
            print(
                f"{row['preset']}, seed {row['seed']}: {row['accuracy_after']:.1%}, {row['seconds']:.0f} s", flush=True
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = " ".join(["python -m benchmarks.study", *(sys.argv[1:] if argv is None else argv)])
    write_page(rows, chosen.page or chosen.out / "study.md", command)
    print(f"\n{table(rows)}\n")
    print(json.dumps({"rows": rows} | measured_on(default_device())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
