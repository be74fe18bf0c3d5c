"""What a run records and shows: metrics, completions, curves, the console.

RunLogger writes these files of the run folder (on rank 0; on other ranks every call does nothing). Its position in
metrics.jsonl is part of the checkpoint, so a resumed run repeats no line. docs/metrics.md defines every key.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import distributions
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from grpo.live import Progress, can_show, fold, line_width
from grpo.records import Group, Scores
from grpo.trackers import COMPLETION_COLUMNS, TRACKERS, Tracker

PACKAGED = Path(__file__).with_name("metrics.md")  # a symlink to docs/metrics.md; in a wheel the file itself
DEFINITIONS = PACKAGED if PACKAGED.is_file() else PACKAGED.parents[1] / "docs" / "metrics.md"  # copies may lose links
PACKAGES = ("torch", "transformers", "datasets", "safetensors", "tokenizers", "triton", "numpy", "tyro")
GROUPS_WITH_TOKENS = 2  # per step: in all groups, tokens would make completions/ several times as large
TRAINING_PHASES = ("rollout", "score", "update")
COLUMNS = {  # key: heading, format; reward components come after `reward`
    "step": ("step", "d"),
    "reward": ("reward", ".3f"),
    "validation/accuracy": ("val acc", ".1%"),
    "kl": ("kl", ".4f"),
    "entropy": ("entropy", ".3f"),
    "completion_length": ("length", ".1f"),
    "tokens_per_second": ("tok/s", ",.0f"),
    **{f"seconds/{phase}": (f"{phase} s", ".2f") for phase in TRAINING_PHASES},
}
PANELS = {  # title: first part of the key; validation accuracy has a panel of its own
    "mean reward": "reward",
    "KL to the reference, nats": "kl",
    "entropy, nats": "entropy",
    "completion length, tokens": "completion_length",
    "tokens per second": "tokens_per_second",
    "gradient norm": "grad_norm",  # shown only if the run lacks one of the others
}


Points = Sequence[tuple[float, float]]


class PhaseTimer:
    """Wall seconds by phase: `with timer("rollout"): ...`. On a terminal it also shows the current phase."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.totals: dict[str, float] = {}  # of the whole run
        self.recent: dict[str, float] = {}  # since `take`

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.progress.begin(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.progress.close()
            seconds = time.perf_counter() - start
            for record in (self.totals, self.recent):
                record[phase] = record.get(phase, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, as `seconds/<phase>`."""
        taken, self.recent = self.recent, {}
        return {f"seconds/{phase}": seconds for phase, seconds in taken.items()}


def training_seconds(seconds: Mapping[str, float], prefix: str = "") -> float:
    """Seconds of rollout, score and update, given seconds by phase; evaluation, checkpoints and base do not count."""
    return sum(seconds.get(prefix + phase, 0.0) for phase in TRAINING_PHASES)


def comparison_name(habit_steps: int) -> str:
    """Name of the embedded task's comparison: the model before the habit phase, or supervised training continued."""
    return "before the habit" if habit_steps else "supervised instead"


def table_row(row: Mapping[str, Any], width: float = math.inf) -> tuple[str, str]:
    """Heading and cells of one step, aligned. A missing value is blank; columns beyond `width` characters are left out,
    so that no row wraps."""
    components = {key: (key.removeprefix("reward/"), ".3f") for key in row if key.startswith("reward/")}
    columns = {key: COLUMNS[key] for key in ("step", "reward")} | components | COLUMNS
    headings, cells = [], []
    for key, (heading, form) in columns.items():
        heading, value = heading.rjust(8), row.get(key)
        if len(" ".join([*headings, heading])) > width:
            break
        headings.append(heading)
        cells.append(("" if value is None else format(value, form)).rjust(len(heading)))
    return " ".join(headings), " ".join(cells)


class RunLogger:
    """Writes metrics.jsonl, completions/, env.json, summary.json and curves.png; prints the table; feeds the trackers.

    track: names of trackers, opened at the first step that is logged.  config: every setting by its dotted key, for
    them; num_steps is for the display. ValueError if another process is using the same folder.
    """

    def __init__(
        self, run_dir: Path, *, is_writer: bool, track: Sequence[str] = (), config: Mapping[str, Any] | None = None
    ):
        self.run_dir = run_dir
        self.is_writer = is_writer
        self._track, self._config = tuple(track), config or {}
        self.progress = Progress(is_writer and can_show(), self._config.get("num_steps", 0))
        self.timer = PhaseTimer(self.progress)
        self.width = line_width()  # of what is printed
        self._num_rows = 0  # printed so far: the heading is repeated every 20 rows
        self._trackers: dict[str, Tracker] = {}
        self._tracker_ids: dict[str, str] = {}
        self._last_step = 0
        self._is_truncated = False  # whether metrics.jsonl has been cut to where this process begins
        if is_writer:
            self._file = (run_dir / "metrics.jsonl").open("ab")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it ends
            except BlockingIOError as error:
                raise ValueError(f"run folder {run_dir} is in use by another process; use another --run-dir") from error
            except OSError as error:  # Lustre, NFS and others may be mounted without locks
                self.say(f"run folder {run_dir} cannot be locked ({error.strerror}): do not start a second run in it")

    def say(self, text: str) -> None:
        """Print on rank 0, flushed."""
        if self.is_writer:
            self.progress.close()
            print(fold(text, self.width), flush=True)

    def log(self, row: dict[str, float | int | None]) -> None:
        """One training step: a line in metrics.jsonl, scalars for the trackers, a row of the table on the console."""
        if not self.is_writer:
            return
        if not self._is_truncated:
            self._truncate_at(0)  # no checkpoint was loaded: the run starts from scratch
        row = {key: None if value is None or not math.isfinite(value) else value for key, value in row.items()}
        with self._naming_the_folder():
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()
        scalars = {key: float(value) for key, value in row.items() if value is not None and key != "step"}
        for tracker in self._open_trackers().values():
            tracker.log(row["step"], scalars)
        self._last_step = row["step"]
        self.progress.step_done(row)
        heading, cells = table_row(row, self.width)
        self.say(f"{heading}\n{cells}" if self._num_rows % 20 == 0 else cells)
        self._num_rows += 1

    def _open_trackers(self) -> dict[str, Tracker]:
        for name in self._track:
            if name not in self._trackers:  # only now is it known whether the run was resumed, and from where
                run_id = self._tracker_ids.get(name)
                self._trackers[name] = TRACKERS[name](self.run_dir, self._config, run_id, self._last_step + 1)
                self._tracker_ids[name] = self._trackers[name].id
        return self._trackers

    def log_completions(self, step: int, groups: Sequence[str]) -> None:
        """completions/step_N.jsonl: the lines of each group (see `completion_lines`); trackers get the first groups."""
        if self.is_writer:
            folder = self.run_dir / "completions"
            if trackers := self._open_trackers():
                lines = "".join(groups[:GROUPS_WITH_TOKENS]).split("\n")[:-1]
                rows = [[record[name] for name in COMPLETION_COLUMNS] for record in map(json.loads, lines)]
                for tracker in trackers.values():
                    tracker.log_completions(step, rows)
            with self._naming_the_folder():
                folder.mkdir(exist_ok=True)
                (folder / f"step_{step}.jsonl").write_text("".join(groups), encoding="utf-8")

    @contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        """Adds the folder's name to an OSError: that of a full disk names none."""
        try:
            yield
        except OSError as error:
            raise OSError(f"could not write in {self.run_dir}: {error}; free space or fix permissions") from error

    def write_json(self, name: str, record: dict[str, Any]) -> None:
        """env.json, summary.json and the like, indented."""
        if self.is_writer:
            (self.run_dir / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def draw_curves(self, **more: Any) -> None:
        """curves.png (see the function `draw_curves`); without matplotlib a line says how to get it."""
        if self.is_writer:
            try:
                draw_curves(self.run_dir, **more)
            except ModuleNotFoundError as error:
                self.say(f"curves.png is not drawn: {error.name} is not installed (pip install matplotlib)")

    def state_dict(self) -> dict[str, Any]:
        """The end of metrics.jsonl, the last step, the seconds spent so far and the ids of the trackers' runs."""
        offset = self._file.tell() if self.is_writer else 0
        state = {"offset": offset, "step": self._last_step, "seconds": dict(self.timer.totals)}
        return state | {"trackers": dict(self._tracker_ids)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where a checkpoint was saved: remove later lines and completions; their steps will be repeated."""
        self._last_step = state["step"]
        self.timer.totals, self.timer.recent = dict(state["seconds"]), {}
        if self.is_writer:
            size = self._file.seek(0, os.SEEK_END)
            if size < state["offset"]:
                wrote = f"{self.run_dir}/metrics.jsonl has {size} bytes, but {state['offset']} when the checkpoint was"
                raise ValueError(f"{wrote} written; restore the lost lines or start another run")
            self._truncate_at(state["offset"])
            self._tracker_ids = dict(state["trackers"])
            for path in (self.run_dir / "completions").glob("step_*.jsonl"):
                if int(path.stem.removeprefix("step_")) > self._last_step:
                    path.unlink()

    def _truncate_at(self, offset: int) -> None:
        self._file.truncate(offset)
        self._file.seek(0, os.SEEK_END)
        self._is_truncated = True

    def close(self) -> None:
        self.progress.close()
        if self.is_writer:
            self._file.close()
            for tracker in self._trackers.values():
                tracker.close()


def completion_lines(
    groups: Sequence[Group],
    scores: Scores,
    advantages: Tensor,
    token_text: Callable[[int], str],
    *,
    num_with_tokens: int,
) -> list[str]:
    """The lines of each group in completions/, one JSON object per completion. advantages: [P, G].

    `python -m grpo.rewards check` can score these lines again, unless a reward needs further columns of the problem. A
    component without a value is null; its status says why. Numbers have 6 digits. The first num_with_tokens groups also
    have each token's text and sampler log-prob (natural log, 3 decimals).
    """
    texts = [""] * len(groups)
    columns = (scores.components.tolist(), scores.status, scores.total.tolist(), advantages.tolist())
    for p, (group, *rows) in enumerate(zip(groups, *columns, strict=True)):
        for completion, values, status, reward, advantage in zip(group.completions, *rows, strict=True):
            record = {
                "problem": group.problem.id,
                "sample": completion.sample,
                "prompt": group.problem.prompt,
                "completion": completion.text,
                "answer": group.problem.answer,
                "finish_reason": completion.finish,
                "rewards": {n: None if math.isnan(v) else _short(v) for n, v in zip(scores.names, values, strict=True)},
                "status": dict(zip(scores.names, status, strict=True)),
                "reward": _short(reward),
                "advantage": _short(advantage),
            }
            if p < num_with_tokens:
                record["tokens"] = [token_text(token) for token in completion.ids]
                record["logprobs"] = [round(logprob, 3) for logprob in completion.logprobs]
            texts[p] += json.dumps(record, ensure_ascii=False) + "\n"
    return texts


def _short(value: float) -> float:
    """Rounded to the 6 digits that fp32 guarantees: 0.1, not 0.10000000149011612."""
    return float(f"{value:.6g}")


def token_texts(tokenizer: Any) -> Callable[[int], str]:
    """A cached function: token id -> text. Decoded behind another token, as some tokenizers drop a leading space."""
    before = tokenizer.encode("a", add_special_tokens=False)[-1:]
    start = len(tokenizer.decode(before))
    return cache(lambda token: tokenizer.decode([*before, token])[start:])


def length_metrics(scores: Scores, seconds: float) -> dict[str, float]:
    """Number of tokens, tokens per second (`seconds`: of rollout, scoring and update), mean length, share truncated."""
    num_tokens, num_completions = int(scores.lengths.sum()), scores.lengths.numel()
    return {
        "tokens": num_tokens,
        "tokens_per_second": num_tokens / seconds,
        "completion_length": num_tokens / num_completions,
        "truncated": int(scores.truncated.sum()) / num_completions,
    }


def environment(*, seed: int, world_size: int, dispatch: dict[str, Any]) -> dict[str, Any]:
    """The content of env.json: enough to trace where a result came from."""
    return {"command": sys.argv, "seed": seed, "world_size": world_size, "dispatch": dispatch, **machine()}


def machine() -> dict[str, Any]:
    """The commit of this code, versions of what it is built on, and the hardware."""
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},  # those that can change results
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def installed(package: str) -> str:
    """The version of an installed package, else "not installed"."""
    return next((found.version for found in distributions(name=package)), "not installed")


def git_commit() -> str | None:
    """The commit of this checkout, with `-dirty` if tracked files differ from it; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return read_records(run_dir / "metrics.jsonl")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file of a run, without an unfinished last line. NaN becomes None."""
    lines = path.read_bytes().split(b"\n")[:-1]  # bytes: a kill may cut a character, and text may contain U+2028
    try:
        return [json.loads(line, parse_constant=lambda _: None) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not JSON ({error}); fix or remove it") from None


def draw_curves(run_dir: Path, *, start_accuracy: float | None = None, supervised: Points = ()) -> None:
    """curves.png: reward by component, validation accuracy, KL, entropy, length and speed over training steps; the
    gradient norm if there is no KL.

    start_accuracy: validation accuracy before the first step. supervised: (seconds, accuracy) of continued supervised
    training; the accuracy panel is then over training seconds (without evaluation and checkpoints), so that the two
    lines can be compared.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(run_dir)
    figure = Figure(figsize=(11, 6.2), layout="constrained")  # readable at the width of a page
    accuracy_axes, *others = figure.subplots(2, 3).flat
    _draw_accuracy(accuracy_axes, rows, start_accuracy, supervised)
    recorded = sorted({name for row in rows for name in row})
    lines = {title: [name for name in recorded if name.split("/")[0] == key] for title, key in PANELS.items()}
    shown = sorted(PANELS, key=lambda title: not lines[title])[: len(others)]
    for axes, title in zip(others, sorted(shown, key=[*PANELS].index), strict=True):
        for name in lines[title]:
            _draw_line(axes, *_points(rows, name), name)
        axes.set(title=title, xlabel="training step")
        axes.yaxis.set_major_formatter("{x:,g}")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if not axes.get_lines():
            axes.text(0.5, 0.5, "not recorded in this run", ha="center", va="center", transform=axes.transAxes)
        elif len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(fontsize="small")
    figure.savefig(run_dir / "curves.png", dpi=140)


def _draw_line(axes: Any, steps: list[int], values: list[float], name: str) -> None:
    """Plot the values; if there are many steps, pale behind a running mean over a fiftieth of them."""
    width = len(steps) // 50 | 1  # odd: symmetric
    if width < 5:
        axes.plot(steps, values, marker="." if len(steps) < 5 else None, label=name)
        return
    row = torch.tensor([values], dtype=torch.float64)
    means = avg_pool1d(row, width, 1, width // 2, count_include_pad=False)[0].tolist()
    (line,) = axes.plot(steps, means, label=name, zorder=3)
    axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.5)


def _draw_accuracy(axes: Any, rows: list[dict[str, Any]], start_accuracy: float | None, supervised: Points) -> None:
    places, accuracies = _points(rows, "validation/accuracy")
    if supervised:
        seconds = accumulate(training_seconds(row, "seconds/") for row in rows)
        at_step = dict(zip((row["step"] for row in rows), seconds, strict=True))
        places = [at_step[step] for step in places]
    if start_accuracy is not None:
        places, accuracies = [0, *places], [start_accuracy, *accuracies]
    if places:
        axes.plot(places, accuracies, marker=".", label="GRPO")
    if supervised:
        axes.plot(*zip(*supervised, strict=True), marker=".", label="supervised training, same seconds")
    axes.set(title="validation accuracy", xlabel="training seconds" if supervised else "training step")
    axes.set(ylim=(-0.03, 1.03), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter("{x:.0%}")


def _points(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key, without missing values."""
    present = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in present], [row[key] for row in present]


@cache
def documented_keys() -> dict[str, str]:
    """The text of docs/metrics.md for each key that it defines; `<...>` in a key stands for a name."""
    text = DEFINITIONS.read_text(encoding="utf-8")
    found = re.findall(r"^- `([^`]+)`: (.*(?:\n  .*)*)", text, flags=re.MULTILINE)
    return {key: " ".join(words.split()) for key, words in found}


def definition(key: str) -> str | None:
    """The text of docs/metrics.md for a logged key, or None."""
    patterns = {re.sub(r"<[^>]+>", "[^/]+", re.escape(known)): text for known, text in documented_keys().items()}
    return next((text for pattern, text in patterns.items() if re.fullmatch(pattern, key)), None)
