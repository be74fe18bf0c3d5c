"""The embedded demo on three seeds, whole (`make slow`, about eight minutes): what the README promises of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_on_each_of_three_seeds_the_weak_base_becomes_a_good_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, after = [], []
    for seed in range(3):
        assert train.main(["--config", str(CONFIG), "--seed", str(seed), "--run-dir", f"seed{seed}"]) == 0
        summary = json.loads((tmp_path / f"seed{seed}" / "summary.json").read_text())
        before.append(summary["accuracy_before"])
        after.append(summary["accuracy_after"])
        assert sum(summary["seconds"].values()) < 300
    assert max(before) <= 0.25
    assert min(after) >= 0.75 and sum(after) / 3 >= 0.80
