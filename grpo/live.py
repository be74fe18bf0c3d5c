"""The progress display of a terminal, below the table of steps: a few lines, rewritten in place.

Used by grpo.metrics: the current phase with its bar and, after the first training step, how far the run is. Outside
phases the lines are erased, so that anything may print. Without a terminal nothing is written.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from statistics import fmean
from typing import Any

INTERVAL_S = 0.1  # between two redraws, of about 20 microseconds each
RECENT_STEPS = 20  # from which the time left is estimated
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 30  # of the bar and of a sparkline, at most: numbers have priority on a narrow terminal
CURVES = {"reward": "reward {:.3f}", "validation/accuracy": "validation accuracy {:.1%}"}


def can_show() -> bool:
    """Whether standard output is a terminal that can move its cursor and print the bars."""
    encodes = "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()  # None if it was closed
    return encodes and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def line_width() -> float:
    """Columns of the terminal; infinite if standard output cannot show the display."""
    return shutil.get_terminal_size().columns if can_show() else math.inf


def print_any_text() -> None:
    """Print characters that the terminal cannot encode as escapes: a model's text must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def fold(text: str, width: float) -> str:
    """Break lines wider than `width` between words; a terminal would break within one."""
    how = {"subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, int(width), **how) if len(line) > width else line for line in text.split("\n"))


class Progress:
    """Called as progress(done, total, note) within a phase; `begin` and `close` are called around it."""

    def __init__(self, is_shown: bool, num_steps: int = 0):
        self.is_shown = is_shown
        self.num_steps = num_steps  # of the run
        self._phase, self._begun_at, self._drawn_at = "", 0.0, 0.0
        self._first = self._done = self._total = 0  # of the current count; its pace is measured from _first on
        self._num_lines = 0  # on the screen
        self._standing: list[str] = []  # the lines below the bar
        self._curves: dict[str, list[float]] = {key: [] for key in CURVES}
        self._ends: deque[float] = deque(maxlen=RECENT_STEPS + 1)

    def begin(self, phase: str) -> None:
        """Begin a phase and show its name."""
        if self.is_shown:
            self._phase, self._begun_at = phase, time.monotonic()
            self._first = self._done = self._total = 0
            self._show([phase, *self._standing])

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if not self.is_shown:
            return
        now = time.monotonic()
        if self._total and (total != self._total or done < self._done):  # the phase starts another count
            self._first, self._begun_at = done, now
        self._done, self._total = done, total
        if now - self._drawn_at < INTERVAL_S:
            return
        share = done / max(total, 1)
        each = (now - self._begun_at) / (done - self._first) if done > self._first else None
        left = "" if each is None else f", {_clock(each * (total - done))} left"
        numbers = f"{share:4.0%}  {done:,}/{total:,}{left}  {note}".rstrip()
        width = _fitting(_columns() - len(f"{self._phase:<10}  {numbers}"))
        bar = ("━" * round(width * share)).ljust(width, "─")
        self._show([f"{self._phase:<10} {bar} {numbers}", *self._standing])

    def step_done(self, row: Mapping[str, Any]) -> None:
        """Update the lines below the bar from a row of metrics.jsonl."""
        if not self.is_shown:
            return
        self._ends.append(time.monotonic())
        for key, values in self._curves.items():
            if row.get(key) is not None:
                values.append(row[key])
        left = ""
        if len(self._ends) > 1:
            mean = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
            left = f", {mean:.2f} s a step, {_clock(mean * (self.num_steps - row['step']))} left"
        said = {key: CURVES[key].format(values[-1]) for key, values in self._curves.items() if values}
        width = _fitting((_columns() - len("   ".join(f" {text}" for text in said.values()))) // max(1, len(said)))
        curves = [f"{sparkline(self._curves[key], width)} {text}" for key, text in said.items()]
        phases = {key.removeprefix("seconds/"): row[key] for key in row if key.startswith("seconds/")}
        seconds = "seconds: " + ", ".join(f"{phase} {value:.2f}" for phase, value in phases.items())
        self._standing = [f"step {row['step']} of {self.num_steps}{left}", "   ".join(curves), seconds]

    def close(self) -> None:
        """Erase the display."""
        if self._num_lines:
            self._show([])

    def _show(self, lines: list[str]) -> None:
        """Overwrite the lines on the screen and erase only what remains of them, to avoid flicker."""
        back = f"\x1b[{self._num_lines}F" if self._num_lines else ""
        rewritten = "".join(f"{line[: _columns()]}\x1b[K\n" for line in lines)
        sys.stdout.write(f"{back}{rewritten}\x1b[J")
        sys.stdout.flush()
        self._num_lines, self._drawn_at = len(lines), time.monotonic()


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """At most `width` bars, each the mean of about equally many values, scaled from the lowest mean to the highest."""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [fmean(values[start:end]) for start, end in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def _columns() -> int:
    """Columns of the terminal minus one, so that no line wraps: it would be two lines to rewrite."""
    return shutil.get_terminal_size().columns - 1


def _fitting(room: int) -> int:
    """The width of a bar or sparkline if `room` columns are left for it."""
    return min(WIDTH, max(room, 8))


def _clock(seconds: float) -> timedelta:
    """Rounded to whole seconds: 65.2 is shown as 0:01:05."""
    return timedelta(seconds=round(max(seconds, 0.0)))
