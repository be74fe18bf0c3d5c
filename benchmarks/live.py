"""What the live view adds to a step of training: python -m benchmarks.live

train.py runs the first steps of the embedded demo in a pseudo-terminal, again and again from the same seed, so that a
step does the same work in every round. Contenders alternate from step to step: plain rows, the view, and twenty views
at once, whose effect a noisy machine cannot hide; a twentieth of it is that of one. Three steps of three rounds are a
Latin square, in which each contender has every step and every round once: a ratio is that of geometric means over a
square, and its median over all squares is shown with a 95 % interval. CPU time is that of the process; `in the view` is
what is spent in the view's own functions. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pty
import runpy
import statistics
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import make_parser, measured_on
from grpo.live import Progress

ROOT = Path(__file__).parents[1]
MANY = 20
CONTENDERS = {"plain": 0, "drawn": 1, f"drawn {MANY} times": MANY}  # views at once
CLOCKS = {"CPU": time.process_time, "wall": time.perf_counter, "in the view": lambda: in_the_view[0]}
FIRST_STEP = 3  # that counts
ERASE = b"\x1b[J"  # begins every drawing but the first of a phase
in_the_view = [0.0]  # seconds of CPU
Times = dict[str, list[list[float]]]  # clock -> seconds by round and step


def contender(step: int, turn: int) -> str:
    return [*CONTENDERS][(step + turn) % 3]


def trainings(steps: int, rounds: int, folder: Path) -> Times:
    """Run inside the terminal: the seconds of every step that counts."""
    torch.set_num_threads(1)
    views: list[Progress] = []
    for name in ("begin", "__call__", "step_done", "close"):
        setattr(Progress, name, to_all(views, getattr(Progress, name)))
    train = runpy.run_path(str(ROOT / "train.py"))["main"]
    train_step, marks, turn = train.__globals__["train_step"], [], 0

    def marked(run: object, step: int) -> dict[str, float]:
        marks.append([clock() for clock in CLOCKS.values()])
        shown = run.log.progress
        assert shown.is_shown or step > 1, "no terminal"
        number = CONTENDERS[contender(step, turn)]
        shown.is_shown = number > 0
        views[:] = [shown, *(Progress(True, steps) for _ in range(number - 1))]
        return train_step(run, step)

    train.__globals__["train_step"] = marked
    found: Times = {name: [] for name in CLOCKS}
    last = FIRST_STEP + steps  # not counted: its start marks the end of the step before
    options = ["--config", str(ROOT / "configs" / "demo.yaml"), "--num-steps", str(last), "--save-every", "1000"]
    options += ["--eval.every", "0", "--eval.test-problems", "0"]
    for turn in range(rounds):  # noqa: B007 (marked reads it)
        marks.clear()
        views.clear()
        if train([*options, "--run-dir", str(folder / str(turn))]):
            raise SystemExit("a training failed")
        for name, values in zip(CLOCKS, zip(*marks[FIRST_STEP - 1 :], strict=True), strict=True):
            found[name].append([end - start for start, end in zip(values, values[1:], strict=False)])
    return found


def to_all(views: list[Progress], function: Callable) -> Callable:
    """The method of the shown view, called for all of them, and timed."""

    def called(shown: Progress, *arguments: object) -> None:
        start = time.process_time()
        for view in views or [shown]:
            function(view, *arguments)
        in_the_view[0] += time.process_time() - start

    return called


def in_a_terminal(options: argparse.Namespace, folder: Path) -> tuple[Times, bytes]:
    """What `trainings` found in a process whose output is a pseudo-terminal, and what it wrote there."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 130))
    inside = [sys.executable, "-m", "benchmarks.live", "--inside", str(folder)]
    inside += ["--steps", str(options.steps), "--rounds", str(options.rounds)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    written: list[bytes] = []
    with subprocess.Popen(inside, cwd=ROOT, env=environment, stdin=slave, stdout=slave) as process:
        os.close(slave)
        reader = threading.Thread(target=read_all, args=(master, written))
        reader.start()
        reader.join()
    os.close(master)
    text = b"".join(written)
    if process.returncode or ERASE not in text:
        raise SystemExit(f"status {process.returncode}, and in the terminal:\n{text[-2000:].decode()}")
    return json.loads((folder / "found.json").read_text()), text


def read_all(master: int, written: list[bytes]) -> None:
    """Read until nobody can write to the terminal any more, which Linux reports as an error."""
    try:
        while part := os.read(master, 65536):
            written.append(part)
    except OSError:
        pass


def ratios(seconds: list[list[float]], name: str) -> list[float]:
    """The ratio of a contender's time to that of `plain`, in each square."""

    def square(turn: int, step: int) -> float:
        cells = [(t, s) for t in range(turn, turn + 3) for s in range(step, step + 3)]
        mean = {
            who: statistics.fmean(math.log(seconds[t][s]) for t, s in cells if contender(s + FIRST_STEP, t) == who)
            for who in (name, "plain")
        }
        return math.exp(mean[name] - mean["plain"])

    return [square(turn, step) for turn in range(0, len(seconds), 3) for step in range(0, len(seconds[0]), 3)]


def median_and_interval(values: list[float]) -> tuple[float, float, float]:
    """The median with its 95 % interval: the order statistics n/2 -+ 0.98 sqrt(n)."""
    values, middle, reach = sorted(values), len(values) / 2, 0.98 * len(values) ** 0.5
    low, high = max(0, math.floor(middle - reach)), min(len(values), math.ceil(middle + reach))
    return statistics.median(values), values[low], values[high - 1]


def report(found: Times, drawings: float) -> None:
    """The tables, then the JSON line."""
    median: dict[str, dict[str, float]] = {name: {} for name in CONTENDERS}
    print("median ms a step" + "".join(f"{clock:>14}" for clock in found))
    for name in CONTENDERS:
        for clock, rounds in found.items():
            of_name = [
                seconds
                for turn, steps in enumerate(rounds)
                for step, seconds in enumerate(steps, FIRST_STEP)
                if contender(step, turn) == name
            ]
            median[name][clock] = 1e3 * statistics.median(of_name)
        print(f"{name:<16}" + "".join(f"{value:>14.2f}" for value in median[name].values()))
    facts: dict[str, object] = {"median_ms": median, "drawings_a_step": drawings}
    for clock in ("CPU", "wall"):
        for name, number in list(CONTENDERS.items())[1:]:
            squares = ratios(found[clock], name)
            ratio, low, high = median_and_interval(squares)
            adds = [(bound - 1) / number for bound in (ratio, low, high)]
            print("{}: {} / plain {:.4f}; so one view adds {:.2%} ({:.2%} to {:.2%})".format(clock, name, ratio, *adds))
            facts[f"{clock}, {name}"] = {"ratio": ratio, "interval": [low, high], "one_adds": adds, "squares": squares}
    share = median["drawn"]["in the view"] / median["drawn"]["CPU"]
    print(f"{drawings:.1f} drawings a step; {share:.2%} of a step's CPU time is spent in the view")
    facts |= {"share_in_the_view": share, "load": os.getloadavg()[0], "seconds": found}
    print(json.dumps(measured_on() | facts | {"threads": 1}))


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=30, help="counted steps per training; a multiple of 3")
    parser.add_argument("--rounds", type=int, default=9, help="trainings; a multiple of 3")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 3 or options.rounds < 3 or options.steps % 3 or options.rounds % 3:
        parser.error(f"--steps {options.steps} and --rounds {options.rounds} must be multiples of 3")
    if options.inside:
        found = trainings(options.steps, options.rounds, options.inside)
        (options.inside / "found.json").write_text(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found, written = in_a_terminal(options, Path(folder))
    steps_of_each = options.rounds * (options.steps + FIRST_STEP) / 3
    report(found, written.count(ERASE) / (steps_of_each * sum(CONTENDERS.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
