"""Everything that only a CUDA device can tell, in under nine minutes: python -m benchmarks.gpu (make gpu).

Correctness first: the tests marked `gpu`. Then every benchmark that is here. Each stage is a process of its own with
a time limit; what a benchmark prints last, one JSON line, is kept in benchmarks/results/ with hardware and commit.
Exit status 0 only if every stage passed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from grpo.metrics import git_commit, package_versions

RESULTS = Path(__file__).parent / "results"
STAGES = {  # name: (arguments of python, seconds allowed)
    "tests": (["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"], 110),
    "rollout": (["-m", "benchmarks.rollout"], 110),
    "training_pass": (["-m", "benchmarks.training_pass"], 80),
    "train_step": (["-m", "benchmarks.train_step"], 50),
    "linear_logprob": (["-m", "kernels.linear_logprob.bench"], 70),
    "decode_attention": (["-m", "kernels.decode_attention.bench"], 25),
    "sample_token": (["-m", "kernels.sample_token.bench"], 15),
    "vs_trl": (["-m", "benchmarks.vs_trl"], 80),  # where TRL is installed
}


def hardware() -> dict[str, object]:
    """What the numbers were measured on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "commit": git_commit(),
        "versions": package_versions(),
    }


def run_stage(name: str, arguments: list[str], limit_s: int) -> dict[str, object]:
    """Run one stage with its output shown; its outcome, seconds, and the JSON of its last line if it ended in one."""
    print(f"\n== {name}", flush=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        outcome = "passed" if process.returncode == 0 else f"failed with status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        outcome = f"not done within {limit_s} s"
    print(output, end="", flush=True)
    record = {"stage": name, "outcome": outcome, "seconds": round(time.perf_counter() - started, 1)}
    last = output.strip().splitlines()[-1] if output.strip() else ""
    return record | ({"result": json.loads(last)} if last.startswith("{") else {})


def main() -> int:
    if not torch.cuda.is_available():
        print("error: no CUDA device here; `make test` runs what a CPU can show", file=sys.stderr)
        return 2
    facts = hardware()
    print(json.dumps(facts))
    RESULTS.mkdir(exist_ok=True)
    records = []
    for name, (arguments, limit_s) in STAGES.items():
        if name == "vs_trl" and find_spec("trl") is None:
            print("\n== vs_trl: left out, TRL is not installed (benchmarks/requirements.txt)")
            continue
        records.append(run_stage(name, arguments, limit_s))
        (RESULTS / f"gpu_{name}.json").write_text(json.dumps(facts | records[-1], indent=2) + "\n")
    print(f"\n{'stage':<18}{'seconds':>8}  outcome")
    for record in records:
        print(f"{record['stage']:<18}{record['seconds']:>8.1f}  {record['outcome']}")
    return 0 if all(record["outcome"] == "passed" for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
