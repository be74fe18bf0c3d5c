"""On one CUDA device (`make gpu`): with `deterministic: true` a run that is killed and goes on ends with the same bits.

In bf16, with CUDA graphs, a reference on the CPU and two optimizer steps a rollout. The command line's tyro is not
needed: the config goes from a file straight to train.py's own `run_command`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo.checkpoint import newest_intact
from grpo.metrics import read_metrics
from tests.tiny import save_tiny_model, write_gsm8k_files
from tests.trainee import rows_without_clock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
ROOT = Path(__file__).parents[1]
DRIVER = """
import json, os, signal, sys
from pathlib import Path
import train
from grpo import distributed
from grpo.command_line import Command
from grpo.config import from_dict
values, run_dir, resume, dies_before = json.loads(sys.argv[1])
config = from_dict(values)
distributed.make_deterministic()
step_of = train.train_step
def train_step(run, step):
    if step == dies_before:
        run.writer.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return step_of(run, step)
train.train_step = train_step
sys.exit(train.run_command(Command(config, Path("tiny"), "", run_dir, resume, False), distributed.start()))
"""


def config(folder: Path) -> dict:
    return {
        "task": "gsm8k",
        "num_steps": 5,
        "save_every": 2,
        "deterministic": True,
        "track": [],
        "model": {"path": str(folder / "model"), "reference_offload": True},
        "data": {"path": str(folder / "data")},
        "prompt": {"shots": 0},
        "rewards": {"functions": [f"{ROOT}/tests/reward_functions.py:length_of"], "require_finish": False},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 24},
        "objective": {"preset": "grpo", "beta": 0.02},
        "batch": {"minibatches": 2},
        "optim": {"lr": 1e-3},
        "eval": {"every": 0, "test_problems": 0},
    }


def run(folder: Path, run_dir: str, *, resume: bool = False, dies_before: int = 0) -> int:
    where = (None, run_dir) if resume else (run_dir, None)
    arguments = json.dumps([config(folder), *where, dies_before])
    process = subprocess.run(
        [sys.executable, "-c", DRIVER, arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    (folder / f"{run_dir}.txt").write_text(process.stdout + process.stderr)
    return process.returncode


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_tiny_model(tmp_path / "model", context=1024, **shape)
    write_gsm8k_files(tmp_path / "data")
    said = lambda name: (tmp_path / f"{name}.txt").read_text()
    assert run(tmp_path, "whole") == 0, said("whole")
    assert all(row["grad_norm"] for row in read_metrics(tmp_path / "whole"))
    assert run(tmp_path, "killed", dies_before=4) == -9, said("killed")
    assert run(tmp_path, "killed", resume=True) == 0, said("killed")
    assert rows_without_clock(tmp_path / "killed") == rows_without_clock(tmp_path / "whole")
    ours, theirs = (load_file(newest_intact(tmp_path / name) / "model.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
