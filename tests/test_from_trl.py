"""docs/from_trl.md names keys that exist here and, where TRL is installed, every field that exists there."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from grpo.config import known_keys

PAGE = (Path(__file__).parents[1] / "docs" / "from_trl.md").read_text(encoding="utf-8")
ROWS = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| `")]


def test_every_key_on_our_side_exists():
    keys = {name for _, ours in ROWS for name in re.findall(r"`([a-z_]+\.[a-z_]+)`", ours)} - {"train.py", "eval.py"}
    assert len(keys) > 40 and keys <= {*known_keys(), "metrics.jsonl"}


def test_every_key_of_our_objective_is_named():
    ours = {key for key in known_keys() if key.startswith("objective.")}
    assert ours == {key for key in ours if f"`{key}`" in PAGE}


def test_every_field_of_trl_and_every_argument_of_its_trainer_has_a_row():
    trl = pytest.importorskip("trl")
    named = {name for theirs, _ in ROWS for name in re.findall(r"`([a-z_0-9]+)`", theirs)}
    arguments = inspect.signature(trl.GRPOTrainer).parameters.keys() - {"args"}
    assert named == {field.name for field in fields(trl.GRPOConfig)} | arguments
