"""The two embedded demos, whole, with what the README promises of them (`make slow`, about a quarter of an hour)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train

CONFIGS = Path(__file__).parents[1] / "configs"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def run(config: str, seed: int) -> dict:
    """summary.json of a run in the working folder."""
    folder = Path(f"{config}{seed}")
    assert train.main(["--config", str(CONFIGS / f"{config}.yaml"), "--seed", str(seed), "--run-dir", str(folder)]) == 0
    return json.loads((folder / "summary.json").read_text())


def test_on_each_of_three_seeds_the_weak_base_becomes_a_good_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summaries = [run("demo", seed) for seed in range(3)]
    before, after = ([summary[f"accuracy_{when}"] for summary in summaries] for when in ("before", "after"))
    assert max(before) <= 0.25
    assert min(after) >= 0.75 and sum(after) / 3 >= 0.80
    assert max(sum(summary["seconds"].values()) for summary in summaries) < 300


def test_grpo_teaches_what_supervised_training_on_its_solutions_cannot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary = run("demo_long", seed=0)
    assert summary["accuracy_after"] >= summary["accuracy_before"] + 0.15
    assert summary["accuracy_after"] >= summary["accuracy_supervised"] + 0.08
    assert sum(summary["seconds"].values()) < 1200
