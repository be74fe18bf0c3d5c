"""python -m grpo.report RUN [RUN ...]: curves, results and completions of runs as one offline HTML page, and as CSV.

Reads run folders and the JSON files of eval.py. The page is report.html with the result of `collect` inserted: plain
numbers and texts, from which a script in the page draws. Runs whose configs differ only by the seed form one group: a
line with a band.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from grpo.config import flat
from grpo.metrics import comparison_name, definition, read_metrics, read_records

TEMPLATE = Path(__file__).with_name("report.html")
PLACEHOLDER = "@DATA@"
CHARACTERS = 4000  # shown of a completion: with 2,560 whole completions of some 4,500 tokens the page took 89 MB


def main(argv: list[str] | None = None) -> int:
    """Write the page and, if asked, the CSV files. Returns the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m grpo.report", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    add("--out", type=Path, help="the page (default: report.html in the first run folder)")
    add("--evals", nargs="+", type=Path, default=[], metavar="FILE", help="JSON of eval.py: accuracy by shots")
    add("--csv", type=Path, metavar="DIR", help="write the same numbers there as CSV files")
    add("--steps", type=int, default=20, help="steps a run whose completions are shown, evenly spread (default: 20)")
    add("--groups", type=int, default=8, help="groups of each such step that are shown, the first ones (default: 8)")
    long = "of a longer completion as many are shown, half from its beginning and half from its end"
    add("--characters", type=int, default=CHARACTERS, help=f"{long} (default: {CHARACTERS})")
    options = parser.parse_args(argv)
    limits = {name: getattr(options, name) for name in ("steps", "groups", "characters")}
    if min(limits.values()) < 1:
        parser.error(f"{', '.join(f'--{name} {limit}' for name, limit in limits.items())} must be 1 or more")
    out = options.out or options.runs[0] / "report.html"
    try:
        data = collect(options.runs, options.evals, **limits)
        out.write_text(page(data), encoding="utf-8")
        if options.csv:
            write_csv(data, options.csv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {out}" + (f" and {options.csv}/*.csv" if options.csv else ""))
    return 0


def page(data: dict[str, Any]) -> str:
    """The whole page. `<` is escaped in the data, so that no completion can close the script element that holds it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, text, 1)


def collect(
    folders: Sequence[Path], evals: Iterable[Path] = (), *, steps: int, groups: int, characters: int = CHARACTERS
) -> dict[str, Any]:
    """Everything that the page shows, as plain values. ValueError for what is not a run folder or an eval.py file."""
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file() or not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder} holds no metrics.jsonl and config.yaml; name a run folder such as runs/NAME")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    configs = [flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))) for folder in folders]
    limits = {"steps": steps, "groups": groups, "characters": characters}
    runs = [_run(*these, **limits) for these in zip(names, folders, configs, strict=True)]
    keys = dict.fromkeys(key for config in configs for key in config)
    different = [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]
    return {
        "runs": runs,
        "groups": _seeds_together(configs),
        "config": {key: [config.get(key) for config in configs] for key in different},
        "definitions": {key: definition(key) for key in sorted({key for run in runs for key in run["metrics"]})},
        "shots": [row for path in evals for row in _shots(path)],
    }


def _run(name: str, folder: Path, config: dict[str, Any], **limits: int) -> dict[str, Any]:
    rows = read_metrics(folder)
    if not rows:
        raise ValueError(f"{folder}/metrics.jsonl holds no step yet; leave this run out or wait for its first")
    keys = dict.fromkeys(key for row in rows for key in row)
    summary, environment = (_json(folder / f"{part}.json") for part in ("summary", "env"))
    phases = [key.removeprefix("seconds/") for key in keys if key.startswith("seconds/")]
    spent = {phase: sum(row.get(f"seconds/{phase}") or 0.0 for row in rows) for phase in phases}
    results, titles = summary.get("results", {}), {"supervised": comparison_name(config.get("base.habit_steps", 0))}
    facts = {key: environment.get(key) for key in ("commit", "seed", "world_size", "devices", "cpus", "platform")}
    return {
        "name": name,
        "metrics": {key: [row.get(key) for row in rows] for key in keys},
        "accuracy": [{"when": titles.get(when, when), **_accuracy(row)} for when, row in results.items()],
        "best_step": summary.get("best_step"),
        "seconds": summary.get("seconds", spent),
        "tokens": sum(row.get("tokens") or 0 for row in rows),
        "facts": facts | {"task": config.get("task"), "preset": config.get("objective.preset")},
        **_completions(folder, **limits),
    }


def _accuracy(entry: dict[str, Any]) -> dict[str, Any]:
    low, high = entry["interval"]
    return {"accuracy": entry["accuracy"], "low": low, "high": high, "problems": entry["problems"]}


def _shots(path: Path) -> list[dict[str, Any]]:
    """A row for each model and number of shots in a file written by eval.py."""
    models = _json(path).get("models")
    if not models:
        raise ValueError(f"{path} holds no results of eval.py; pass the file that eval.py --output wrote")
    return [
        {"model": model, "shots": int(shots), **_accuracy(entry)}
        for model, by_shots in models.items()
        for shots, entry in by_shots.items()
    ]


def _completions(folder: Path, *, steps: int, groups: int, characters: int) -> dict[str, Any]:
    """Groups of evenly spaced steps, including the first and the last: each prompt once, with its completions."""
    files = {int(path.stem.removeprefix("step_")): path for path in (folder / "completions").glob("step_*.jsonl")}
    known = sorted(files)
    count, last = min(steps, len(known)), len(known) - 1
    chosen = [known[round(i * last / max(1, count - 1))] for i in range(count)]
    shown = [group for step in chosen for group in _groups(step, files[step])[:groups]]
    num_cut = sum(_cut(sample, characters) for group in shown for sample in group["samples"])
    limits = {"steps_shown": len(chosen), "steps_recorded": len(known), "groups_shown": groups}
    return {"completions": shown, "characters_shown": characters if num_cut else None, **limits}


def _cut(sample: dict[str, Any], characters: int) -> bool:
    """Cut the middle out of a long completion and its tokens, in place; returns whether it was too long."""
    text, half = sample["completion"], characters // 2
    if len(text) <= characters:
        return False
    gap = f"\n[... {len(text) - 2 * half:,} characters left out ...]\n"
    sample["completion"] = text[:half] + gap + text[len(text) - half :]
    if tokens := sample.get("tokens"):
        ends = list(accumulate(map(len, tokens)))
        first, last = bisect_right(ends, half), bisect_left(ends, ends[-1] - half) + 1
        sample["tokens"] = [*tokens[:first], gap, *tokens[last:]]
        sample["logprobs"] = [*sample["logprobs"][:first], 0.0, *sample["logprobs"][last:]]
    return True


def _groups(step: int, path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for record in read_records(path):
        shared = {key: record.pop(key) for key in ("problem", "prompt", "answer")}
        if not found or record["sample"] == 0:
            found.append({"step": step, **shared, "samples": []})
        found[-1]["samples"].append(record)
    return found


def _seeds_together(configs: list[dict[str, Any]]) -> list[list[int]]:
    """Indices of the runs, grouped: runs whose configs differ only by the seed are together."""
    groups: dict[str, list[int]] = {}
    for i, config in enumerate(configs):
        groups.setdefault(json.dumps({**config, "seed": None}, sort_keys=True), []).append(i)
    return list(groups.values())


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; {} if it does not exist, as in a run that is still going."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); pass what eval.py --output or train.py wrote") from None


def write_csv(data: dict[str, Any], folder: Path) -> None:
    """Write metrics, accuracy, seconds, shots and config, one file each; a missing value is an empty cell."""
    folder.mkdir(parents=True, exist_ok=True)
    runs, keys = data["runs"], list(data["definitions"])
    keys.insert(0, keys.pop(keys.index("step")))
    tables = {"metrics": [["run", *keys]], "accuracy": [], "seconds": [["run", "phase", "seconds"]], "shots": []}
    for run in runs:
        empty = [None] * len(run["metrics"]["step"])
        columns = [run["metrics"].get(key, empty) for key in keys]
        tables["metrics"] += [[run["name"], *values] for values in zip(*columns, strict=True)]
        tables["seconds"] += [[run["name"], *item] for item in run["seconds"].items()]
        tables["accuracy"] += [{"run": run["name"], **entry} for entry in run["accuracy"]]
    for name, rows in (("accuracy", tables["accuracy"]), ("shots", data["shots"])):
        tables[name] = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
    tables["config"] = [["key", *(run["name"] for run in runs)], *([key, *row] for key, row in data["config"].items())]
    for name, table in tables.items():
        if table:
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(table)


if __name__ == "__main__":
    sys.exit(main())
