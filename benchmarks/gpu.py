"""Everything that only a CUDA device can tell, in under nine minutes: python -m benchmarks.gpu (make gpu).

Correctness first: the tests marked `gpu`. Then the benchmarks. Each stage is a process of its own with a time limit, so
that one which fails or hangs costs nothing but its own time; what a stage leaves of it, later ones may use. The last
JSON line that a stage has printed, even if it was cut off, goes to gpu.json at once, with hardware and commit; the
table at the end shows the figures beside their goals. Exit status 0 only if every stage passed; a missed goal is no
failure.

    python -m benchmarks.gpu --rehearse                     the same without a GPU: small, for what can go wrong before
    python -m benchmarks.gpu --only hot_spots tune --results DIR

hot_spots (where the time goes), tune (which tile sizes are fastest), attention (which way is) and the slow peers run
only if --only names them.

A machine without a network needs torch, triton, transformers and pytest; TRL and Liger are compared with where they can
be imported, from a folder of wheels too: pip install --no-index --no-deps --target DIR *.whl, then PYTHONPATH=DIR.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.common import make_parser, measured_on

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHOWN = 2500  # characters of a stage's output: all stages together must fit where only the end is kept


@dataclass(frozen=True)
class Stage:
    """Arguments of python, the seconds allowed, and what is added to rehearse it on a CPU."""

    arguments: str
    limit_s: int
    rehearsal: str = "--repeats 1"


TESTS = sorted(
    (path.name for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text("utf-8")),
    key=lambda name: (name != "test_gpu_resume.py", name),  # first: it starts three programs, which takes longest
)
WORKERS = "-n 10 " if find_spec("xdist") else ""  # these tests mostly wait for a CPU to compile kernels
STAGES = {
    "tests": Stage(
        f"-m pytest -v --tb=short {WORKERS}-m gpu -p no:cacheprovider {' '.join(f'tests/{name}' for name in TESTS)}",
        125,
        "--co",
    ),
    "linear_logprob": Stage("-m kernels.linear_logprob.bench", 60, "--repeats 1 --shape 64 32 500"),
    "training_pass": Stage(
        "-m benchmarks.training_pass --repeats 3", 90, "--repeats 1 --workload tiny --arrangement plain"
    ),
    "rollout": Stage(
        "-m benchmarks.rollout --alone --compile --workload 0.5B", 75, "--repeats 1 --workload tiny --no-compile"
    ),
    "vs_trl": Stage("-m benchmarks.vs_trl --steps 3 --seconds 95", 115, "--workload tiny"),
    "decode_attention": Stage("-m kernels.decode_attention.bench", 25),
    "sample_token": Stage("-m kernels.sample_token.bench", 15),
    "train_step": Stage("-m benchmarks.train_step", 35, "--rounds 1 --prompt 40 --group 4"),
}
MORE = {  # by --only NAME: what tells where to improve next, and what takes too long for nine minutes
    "rollout_plain": Stage("-m benchmarks.rollout --alone --workload 0.5B", 40, "--repeats 1 --workload tiny"),
    "rollout_peers": Stage("-m benchmarks.rollout --workload 0.5B --repeats 1", 60, "--workload tiny"),
    "deterministic_pass": Stage(
        "-m benchmarks.training_pass --arrangement plain --deterministic --repeats 2", 40, "--workload tiny"
    ),
    "rollout_7b": Stage("-m benchmarks.rollout --workload 7B --repeats 3", 80, "--workload tiny"),
    "deterministic_rollout": Stage(
        "-m benchmarks.rollout --alone --deterministic --workload 0.5B", 60, "--workload tiny"
    ),
    "attention": Stage("-m benchmarks.attention", 60),
    "hot_spots": Stage("-m benchmarks.hot_spots", 60, "--tiny"),
    "tune": Stage("-m benchmarks.tune", 240, "--shape 64 32 500"),
}


def best_share(job: str, letter: str, width: int) -> Callable[[dict], float | None]:
    """Reads the share of the matmul limit that the best of our contenders of a mode reaches in the log-prob bench."""

    def read(result: dict) -> float | None:
        rows = [row for row in result["results"] if row["job"] == job and row["width"] == width]
        shares = [row["limit_fraction"] for row in rows if row["contender"].startswith(f"{letter} ")]
        return max((share for share in shares if share), default=None)

    return read


def median_of(name: str) -> Callable[[dict], float | None]:
    """Reads the median seconds of one contender of the training pass, None if it failed or was not asked for."""
    return lambda result: result.get(name, {}).get("median")


GOALS: list[tuple[str, str, Callable[[dict], float | None], str, float]] = [  # stage, figure, where it is, goal
    ("vs_trl", "whole step of 64 x 16, s", lambda result: result.get("seconds_ours"), "<=", 3.0),
    ("vs_trl", "times as fast as TRL", lambda result: result.get("speedup_step"), ">=", 10.0),
    ("linear_logprob", "mode C, D 896, of 6NDV", best_share("training", "C", 896), ">=", 0.62),
    ("linear_logprob", "mode C, D 4096, of 6NDV", best_share("training", "C", 4096), ">=", 0.80),
    ("training_pass", "training pass, plain, s", median_of("step, layers plain"), "<=", 2.0),
    ("training_pass", "training pass, compiled, s", median_of("step, layers compiled"), "<=", 2.0),
    ("rollout", "tokens/s", lambda result: result["tokens_per_second"], ">=", 150_000.0),
    ("train_step", "times as fast as padded rows", lambda result: result["speedup_vs_padded"], ">=", 3.3),
    ("train_step", "peak, of that of padded rows", lambda result: result["peak_vs_padded"], "<=", 0.4),
]


def run_stage(name: str, command: list[str], limit_s: float) -> dict[str, object]:
    """Run one stage; its outcome, seconds, the end of its output, and the JSON of its last line if it ended in one."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    started = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen([sys.executable, "-u", *command], cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
            outcome = "passed" if process.returncode == 0 else f"failed with status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too: they hold the pipe open
            output, _ = process.communicate()
            outcome = f"not done within {limit_s:.0f} s"
    results, text = [], []
    for line in output.strip().splitlines():
        result = json_object(line)
        (text if result is None else results).append(line if result is None else result)
    shown = "\n".join(text)
    print(f"{'...' if len(shown) > SHOWN else ''}{shown[-SHOWN:]}", flush=True)
    record = {"outcome": outcome, "seconds": round(time.perf_counter() - started, 1), "output": shown[-20_000:]}
    return record | ({"result": results[-1]} if results else {})


def json_object(line: str) -> dict | None:
    """The object on this line; None if there is none, or only half of one."""
    with contextlib.suppress(ValueError):
        return json.loads(line) if line.startswith("{") else None


def goals(records: dict[str, dict]) -> Iterator[tuple[str, float, str, float, bool]]:
    """Figure, value, comparison, goal, whether it is reached; for the stages that gave a result."""
    for stage, figure, read, comparison, goal in GOALS:
        value = read(records[stage]["result"]) if "result" in records.get(stage, {}) else None
        if value is not None:
            yield f"{stage}: {figure}", value, comparison, goal, value <= goal if comparison == "<=" else value >= goal


def show(records: dict[str, dict]) -> None:
    """The two tables."""
    print(f"\n{'stage':<18}{'seconds':>8}  outcome")
    for name, record in records.items():
        print(f"{name:<18}{record['seconds']:>8.1f}  {record['outcome']}")
    print(f"\n{'figure':<48}{'found':>12}{'goal':>14}")
    for figure, value, comparison, goal, is_reached in goals(records):
        print(f"{figure:<48}{value:>12,.3g}{comparison:>4}{goal:>10,.3g}  {'reached' if is_reached else 'MISSED'}")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=STAGES | MORE, default=list(STAGES), help=f"default: all but {', '.join(MORE)}"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of gpu.json")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, small: gpu_rehearsal.json")
    chosen = parser.parse_args(argv)
    if not chosen.rehearse and not torch.cuda.is_available():
        print("error: no CUDA device here; --rehearse, or `make test`, runs what works on a CPU", file=sys.stderr)
        return 2
    facts = measured_on(torch.device("cpu" if chosen.rehearse else "cuda"))
    print(json.dumps(facts))
    chosen.results.mkdir(parents=True, exist_ok=True)
    path = chosen.results / ("gpu_rehearsal.json" if chosen.rehearse else "gpu.json")
    records: dict[str, dict] = {}
    started, allowed = time.perf_counter(), 0.0
    for name in chosen.only:
        stage = (STAGES | MORE)[name]
        command = stage.arguments.split() + (stage.rehearsal.split() if chosen.rehearse else [])
        allowed += stage.limit_s * (3 if chosen.rehearse else 1)
        records[name] = run_stage(name, command, allowed - (time.perf_counter() - started))
        path.write_text(json.dumps(facts | {"stages": records}, indent=2) + "\n", encoding="utf-8")
    show(records)
    print(f"written: {path}")
    return 0 if all(record["outcome"] == "passed" for record in records.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
