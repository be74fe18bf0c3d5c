"""Checkpoints are written while training goes on, from a copy of the state, one after the other."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from grpo import checkpoint
from grpo.policy import Policy
from tests.tiny import tiny_qwen2, word_tokenizer


def test_save_returns_before_anything_is_written_and_what_changes_then_is_not_saved(tmp_path):
    may_write = threading.Event()
    writer, weight = checkpoint.Writer(tmp_path, keep_last=2), torch.ones(3)
    state = {"weight": weight, "history": [weight], "pair": (weight, None)}
    writer.save(1, lambda folder, state: may_write.wait(), state, best=None)
    assert checkpoint.latest(tmp_path) is None
    weight.zero_()
    may_write.set()
    writer.wait()
    saved = checkpoint.load_state(checkpoint.latest(tmp_path))
    assert all(torch.equal(tensor, torch.ones(3)) for tensor in (saved["weight"], *saved["history"], saved["pair"][0]))


def test_the_next_save_waits_for_the_one_before_so_order_and_pruning_stay(tmp_path):
    writer, written = checkpoint.Writer(tmp_path, keep_last=1), []
    for step in range(1, 6):
        writer.save(step, lambda folder, state: written.append(state["step"]), {"step": step}, best=(0.5, 2))
        assert written == list(range(1, step)) or written == list(range(1, step + 1))
    writer.wait()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_2", "step_5", "best.json"}
    assert checkpoint.best(tmp_path).name == "step_2"


def test_what_went_wrong_while_writing_is_raised_by_the_next_save_or_at_the_end(tmp_path):
    def disk_full(folder: Path, state: dict) -> None:
        raise OSError(28, "No space left on device")

    writer = checkpoint.Writer(tmp_path, keep_last=1)
    message = "could not write checkpoint .*step_2: .*No space left.*free space"
    writer.save(1, lambda folder, state: None, {}, best=None)
    writer.save(2, disk_full, {}, best=None)
    with pytest.raises(OSError, match=message):
        writer.save(3, lambda folder, state: None, {}, best=None)
    writer.save(2, disk_full, {}, best=None)
    with pytest.raises(OSError, match=message):
        writer.wait()
    writer.wait()  # raised once
    assert checkpoint.newest_intact(tmp_path).name == "step_1"


@pytest.mark.parametrize("tied", [True, False])
def test_a_policy_writes_an_earlier_state_as_it_would_have_written_itself(tmp_path, tied):
    policy = Policy(tiny_qwen2(tie_word_embeddings=tied), word_tokenizer(), "bf16")
    policy.save(tmp_path / "then")
    state = checkpoint.snapshot(policy.state_dict())
    with torch.no_grad():
        for parameter in policy.masters.parameters():
            parameter.add_(1)
    policy.refresh()
    policy.save(tmp_path / "later", state)
    for path in (tmp_path / "then").iterdir():
        assert path.read_bytes() == (tmp_path / "later" / path.name).read_bytes(), path.name
