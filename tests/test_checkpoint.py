"""A checkpoint is whole or absent, the right ones are kept, and what does not work says so."""

import errno
import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from grpo import checkpoint

STATE = {"step": 3, "moments": {"exp_avg": torch.arange(4.0)}, "random": (1, [2, 3], None), "name": "cosine"}


def write_model(folder: Path, state: dict) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


def save(run_dir: Path, step: int, *, keep_last: int = 2, best: tuple | None = None, state: dict = STATE) -> Path:
    return checkpoint.save(run_dir, step, write_model, state, keep_last=keep_last, best=best)


def names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir()}


def test_state_comes_back_as_it_was_saved(tmp_path):
    state = checkpoint.load_state(save(tmp_path, 3))
    assert torch.equal(state["moments"].pop("exp_avg"), torch.arange(4.0))
    assert state == {"step": 3, "moments": {}, "random": (1, [2, 3], None), "name": "cosine"}


def test_the_top_holds_what_the_model_wrote_and_the_rest_is_under_state(tmp_path):
    folder = save(tmp_path, 3)
    assert folder == tmp_path / "checkpoints" / "step_3"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "state"}


def test_the_last_k_and_the_best_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep_last=2, best=(0.5, 5))
    assert names(tmp_path) == {"step_5", "step_15", "step_20"}
    save(tmp_path, 25, keep_last=2, best=(0.5, 20))
    assert names(tmp_path) == {"step_20", "step_25"}


def test_latest_counts_steps_as_numbers_and_ignores_leftovers(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    for step in (9, 10):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / ".staging-step_11").mkdir()
    (tmp_path / "checkpoints" / "step_12.old").mkdir()
    assert checkpoint.latest(tmp_path).name == "step_10"


def test_a_failing_write_leaves_no_folder_and_keeps_the_earlier_checkpoint(tmp_path):
    save(tmp_path, 1)

    def disk_full(folder: Path, state: dict) -> None:
        write_model(folder, state)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="could not write checkpoint .*step_2: .*No space left.*free space"):
        checkpoint.save(tmp_path, 2, disk_full, STATE, keep_last=1, best=None)
    assert names(tmp_path) == {"step_1"}


def test_a_state_that_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path):
    with pytest.raises(Exception, match="[Ww]eights.only"):
        save(tmp_path, 1, state={"stream": Path("x")})
    assert names(tmp_path) == set()


@pytest.mark.parametrize("moment", ["write_model", "_write_state", "_flush"])
def test_a_kill_while_saving_leaves_the_earlier_checkpoint_as_the_latest(tmp_path, moment):
    program = f"""
        import os, sys
        from pathlib import Path
        from grpo import checkpoint
        run_dir = Path({str(tmp_path)!r})
        write_model = lambda folder, state: (folder / "model.safetensors").write_bytes(b"weights")
        checkpoint.save(run_dir, 1, write_model, {{"step": 1}}, keep_last=1, best=None)
        die = lambda *_: os.kill(os.getpid(), 9)
        write_model = die if {moment!r} == "write_model" else write_model
        setattr(checkpoint, {moment!r}, die)
        checkpoint.save(run_dir, 2, write_model, {{"step": 2}}, keep_last=1, best=None)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=Path(__file__).parents[1])
    assert ended.returncode == -9
    assert checkpoint.load_state(checkpoint.latest(tmp_path)) == {"step": 1}
    save(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == {"step_2"}, "the leftover goes with the next save"


def test_a_complete_checkpoint_of_the_same_step_is_not_written_again(tmp_path):
    save(tmp_path, 1)
    folder = checkpoint.save(tmp_path, 1, lambda *_: pytest.fail("written twice"), {}, keep_last=1, best=None)
    assert checkpoint.load_state(folder)["step"] == 3


def test_damaged_and_incomplete_checkpoints_are_named(tmp_path):
    folder = save(tmp_path, 1)
    path = folder / "state" / "state.pt"
    for damage in (lambda: path.write_bytes(path.read_bytes()[:100]), lambda: path.write_bytes(b""), path.unlink):
        damage()
        with pytest.raises(ValueError, match="step_1/state/state.pt is missing or damaged .*another checkpoint"):
            checkpoint.load_state(folder)


def test_best_is_remembered_until_its_folder_is_gone(tmp_path):
    assert checkpoint.best(tmp_path) is None
    save(tmp_path, 4)
    checkpoint.mark_best(tmp_path, 0.75, 4)
    assert checkpoint.best(tmp_path).name == "step_4"
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {"step": 4, "accuracy": 0.75}
    checkpoint.mark_best(tmp_path, 0.8, 8)
    assert checkpoint.best(tmp_path) is None
    (tmp_path / "checkpoints" / "best.json").write_text("")
    with pytest.raises(checkpoint.Damaged, match="checkpoints/best.json cannot be read .*; remove it, or name"):
        checkpoint.best(tmp_path)


def test_a_used_run_folder_is_refused_with_the_remedy(tmp_path):
    fresh = checkpoint.open_run_dir(tmp_path / "a" / "b", resume=False)
    assert fresh.is_dir()
    (fresh / "metrics.jsonl").touch()  # all that a mistake in the data leaves: the same command, corrected, may run
    assert checkpoint.open_run_dir(fresh, resume=False) == fresh
    (fresh / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=f"{fresh} is not empty; continue it with --resume {fresh} or choose another"):
        checkpoint.open_run_dir(fresh, resume=False)
    with pytest.raises(ValueError, match="has no checkpoint to resume"):
        checkpoint.open_run_dir(fresh, resume=True)
    save(fresh, 1)
    assert checkpoint.open_run_dir(fresh, resume=True) == fresh


def test_a_run_restarted_by_the_launcher_before_its_first_checkpoint_begins_again(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not checkpoint.restarted_by_launcher()
    with pytest.raises(ValueError, match="has no checkpoint to resume"):
        checkpoint.open_run_dir(tmp_path, resume=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert checkpoint.restarted_by_launcher()
    for resume in (True, False):
        assert checkpoint.open_run_dir(tmp_path, resume=resume, is_restart=True) == tmp_path


def test_an_impossible_run_folder_names_the_reason(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot use run folder .*: (Not a directory|File exists); choose another"):
        checkpoint.open_run_dir(tmp_path / "file", resume=False)


def test_the_default_run_folder_follows_the_launcher_so_that_a_restart_finds_it(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    assert checkpoint.default_run_dir("demo") == Path("runs/demo-job-7")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun without --rdzv-id: known by its process
    assert f"demo-torchrun-{os.getppid()}-" in checkpoint.default_run_dir("demo").name
    assert checkpoint.default_run_dir("demo") == checkpoint.default_run_dir("demo")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert checkpoint.default_run_dir("demo").name.startswith("demo-2")


def test_a_file_system_that_cannot_flush_folders_is_written_to_all_the_same(tmp_path, monkeypatch):
    """Some network file systems; what goes wrong with a file is still told."""
    refused = [stat.S_ISDIR]

    def fsync(descriptor: int) -> None:
        if any(is_refused(os.fstat(descriptor).st_mode) for is_refused in refused):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.verify(save(tmp_path, 1))
    refused.append(stat.S_ISREG)
    with pytest.raises(OSError, match="could not write checkpoint .*step_2: .*Invalid argument"):
        save(tmp_path, 2)


def test_a_file_that_is_open_elsewhere_on_nfs_delays_its_removal_and_no_checkpoint(tmp_path, monkeypatch):
    """There it gets another name instead of going, and its folder stays; after --resume state.pt may be such a file."""
    unlink, is_open = os.unlink, [True]

    def unlink_on_nfs(path: str, *, dir_fd: int) -> None:
        if path == "state.pt" and is_open[0]:
            os.rename(path, ".nfs01", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        elif path == ".nfs01" and is_open[0]:
            raise OSError(errno.EBUSY, "Device or resource busy")
        else:
            unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink_on_nfs)
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=1)
    assert {name for name in names(tmp_path) if not name.startswith(".")} == {"step_3"}
    is_open[0] = False
    save(tmp_path, 4, keep_last=1)
    assert names(tmp_path) == {"step_4"}
