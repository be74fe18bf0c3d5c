"""What happens to a checkpoint after it was written is found out, named, and the checkpoint before it used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import eval as evaluation
from grpo import checkpoint, lora

STATE = {"step": 0, "moments": torch.arange(500.0)}
FILES = ["config.json", "model.safetensors", "tokenizer/vocabulary.txt", "state/state.pt", "state/manifest.json"]


def write_model(folder: Path, state: dict) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocabulary.txt").write_text("one two three")


def torn(path: Path) -> None:
    """Cut in the middle of a block that was never written."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zeroed(path: Path) -> None:
    """As long as it was: what some filesystems leave after a power cut."""
    path.write_bytes(bytes(path.stat().st_size))


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n{}")


def missing(path: Path) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    for step in (1, 2):
        checkpoint.save(run_dir, step, write_model, STATE, keep_last=2, best=None)
    return run_dir


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [torn, emptied, bit_flipped, zeroed, grown, missing], ids=lambda f: f.__name__)
def test_every_damage_to_every_file_is_named_and_the_checkpoint_before_is_used(two_checkpoints, tmp_path, damage, name):
    run_dir, said = tmp_path / "run", []
    shutil.copytree(two_checkpoints, run_dir)
    damage(run_dir / "checkpoints" / "step_2" / name)
    assert checkpoint.newest_intact(run_dir, said.append).name == "step_1"
    assert len(said) == 1 and f"step_2/{name}" in said[0] and "step_1 is used" in said[0]
    folders = {path.name for path in (run_dir / "checkpoints").iterdir()}
    # set aside: it neither counts among the last ones nor blocks a new step_2
    assert folders == {"step_1", "damaged_step_2"}


def test_messages_say_what_was_found_and_what_was_written(two_checkpoints, tmp_path):
    folder = tmp_path / "step_2"
    shutil.copytree(two_checkpoints / "checkpoints" / "step_2", folder)
    checkpoint.verify(folder)
    torn(folder / "model.safetensors")
    with pytest.raises(checkpoint.Damaged, match="model.safetensors has 5120 bytes, but 10240 were written"):
        checkpoint.verify(folder)
    write = (two_checkpoints / "checkpoints" / "step_2" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(write)
    bit_flipped(folder / "state" / "state.pt")
    with pytest.raises(checkpoint.Damaged, match="state.pt is not what was written: its .* another SHA-256"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("named", ["run", "run/checkpoints/step_2"])
@pytest.mark.parametrize("command", ["eval", "merge"])
def test_a_damaged_model_is_neither_evaluated_nor_merged(two_checkpoints, tmp_path, capsys, command, named):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("task: word_problems\n")
    bit_flipped(tmp_path / "run" / "checkpoints" / "step_2" / "model.safetensors")
    path = str(tmp_path / named)
    arguments = {"eval": ["--model", path], "merge": ["merge", path, str(tmp_path / "out")]}[command]
    assert {"eval": evaluation.main, "merge": lora.main}[command](arguments) == 2
    said = capsys.readouterr().err
    assert "step_2/model.safetensors is not what was written" in said and "name another step" in said


def test_of_a_checkpoint_only_the_model_has_to_be_whole_to_be_loaded_and_of_another_folder_nothing(
    two_checkpoints, tmp_path
):
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    (run_dir / "config.yaml").touch()
    folder, plain = run_dir / "checkpoints" / "step_2", tmp_path / "checkpoints" / "plain"
    torn(folder / "state" / "state.pt")
    assert checkpoint.model_folder(run_dir) == checkpoint.model_folder(folder) == (folder, run_dir)
    emptied(folder / "config.json")
    shutil.copytree(folder, plain)
    for path in (run_dir, folder, plain):
        with pytest.raises(checkpoint.Damaged, match="config.json has 0 bytes.*or a copy without state/"):
            checkpoint.model_folder(path)
    assert checkpoint.model_folder(run_dir / "checkpoints" / "step_1") == (run_dir / "checkpoints" / "step_1", run_dir)
    shutil.rmtree(plain / "state")
    assert checkpoint.model_folder(plain) == (plain, None)
    missing(folder / "state" / "manifest.json")
    with pytest.raises(checkpoint.Damaged, match="manifest.json cannot be read"):
        checkpoint.model_folder(folder)


def test_where_every_checkpoint_is_damaged_all_are_named_and_none_is_touched(two_checkpoints, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    missing(run_dir / "checkpoints" / "step_1" / "state" / "state.pt")
    bit_flipped(run_dir / "checkpoints" / "step_2" / "config.json")
    with pytest.raises(ValueError, match="every checkpoint .* is damaged(.|\n)*step_2/config.json(.|\n)*step_1/state"):
        checkpoint.newest_intact(run_dir)
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step_1", "step_2"}


def test_a_run_without_checkpoints_has_no_newest_one(tmp_path):
    assert checkpoint.newest_intact(tmp_path) is None


def test_the_best_step_of_a_run_that_goes_on_is_noted_again_and_forgotten_where_it_is_damaged(
    two_checkpoints, tmp_path
):
    run_dir, said = tmp_path / "run", []
    shutil.copytree(two_checkpoints, run_dir)
    checkpoint.mark_best(run_dir, 0.9, 7)  # of steps that the resumed run has yet to repeat
    assert checkpoint.restore_best(run_dir, (0.5, 1), said.append) == (0.5, 1)
    assert checkpoint.best(run_dir).name == "step_1" and not said
    torn(run_dir / "checkpoints" / "step_1" / "model.safetensors")
    assert checkpoint.restore_best(run_dir, (0.5, 1), said.append) is None
    assert "the best checkpoint so far is lost" in said[0] and "model.safetensors" in said[0]
