"""A run that is stopped or fails on one rank: long proofs with real processes (`make slow`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_train import DEMO, ROOT
from tests.trainee import rows_without_clock

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STEPS = 12
RUN = [*DEMO, f"--num-steps={STEPS}", "--save-every=3", "--seed=1"]


def start(folder: Path, *arguments: str, ranks: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, "-u", *launcher, str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(folder: Path, *arguments: str, ranks: int = 1) -> str:
    process = start(folder, *arguments, ranks=ranks)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    """Until metrics.jsonl has that many lines."""
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step_{STEPS}" / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a run that nothing disturbed, and the base model in the cache."""
    place = tmp_path_factory.mktemp("faults")
    run(place, *RUN, "--run-dir", "whole")
    return place


def assert_same_as_undisturbed(folder: Path, name: str) -> None:
    assert rows_without_clock(folder / name) == rows_without_clock(folder / "whole")
    ours, theirs = weights(folder / name), weights(folder / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert json.loads((folder / name / "summary.json").read_text())["accuracy_after"] is not None


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_nothing_is_lost(folder, number, status):
    name = f"stopped{status}"
    process = start(folder, *RUN, "--run-dir", name)
    wait_for_step(folder / name, 4, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == status
    assert f"resume with: python train.py --resume {name}" in output
    run(folder, "--resume", name)
    assert_same_as_undisturbed(folder, name)


FAULTY = """
import os
from grpo.tasks.word_problems import WordProblems

class Endless:
    endless = True
    def __init__(self, problems): self.problems = problems
    def __getitem__(self, i):
        if os.environ["RANK"] == "1" and i % 2**20 > 20: raise RuntimeError("rank 1 is broken")
        return self.problems[i]

class BreaksInTraining(WordProblems):
    def load(self, split):
        return Endless(super().load(split)) if split == "train" else super().load(split)

class BreaksInBaseTraining(WordProblems):
    version = 0  # never cached
    @property
    def solved(self): raise RuntimeError("rank 0 is broken")
"""


@pytest.mark.parametrize("task", ["BreaksInTraining", "BreaksInBaseTraining"])
def test_all_ranks_end_when_one_fails(folder, task):
    """In the middle of training, and while the others wait for rank 0 to train the base model."""
    (folder / "faulty.py").write_text(FAULTY)
    started = time.monotonic()
    process = start(folder, *RUN, "--task", f"faulty.py:{task}", "--run-dir", task, ranks=2)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "is broken" in output
    assert time.monotonic() - started < 90
