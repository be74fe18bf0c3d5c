"""Benchmarks that need neither a GPU, nor another trainer, nor an hour: python -m benchmarks (make bench)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


# gpu runs the others on a CUDA device; attention, tune and hot_spots are made for one; parity_trl and vs_trl need
# benchmarks/requirements.txt; study takes an hour; common and letters are no benchmarks.
NOT_HERE = {"attention", "common", "gpu", "hot_spots", "letters", "parity_trl", "study", "tune", "vs_trl"}


def modules() -> list[str]:
    """benchmarks.NAME and kernels.OP.bench."""
    names = sorted({path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py")} - NOT_HERE)
    ops = [f"kernels.{path.parent.name}.bench" for path in sorted((ROOT / "kernels").glob("*/bench.py"))]
    return [f"benchmarks.{name}" for name in names] + ops


def main() -> int:
    status = 0
    for module in modules():
        print(f"\n== python -m {module}", flush=True)
        status |= subprocess.run([sys.executable, "-m", module], cwd=ROOT, check=False).returncode
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
