"""The run folder and its checkpoints: written whole or not at all, found again, pruned.

    runs/NAME/checkpoints/step_N/          Hugging Face layout, written by the policy
    runs/NAME/checkpoints/step_N/state/    state.pt: everything needed to resume
    runs/NAME/checkpoints/best.json        which step had the best validation accuracy

A checkpoint is built in a staging folder, flushed to disk and renamed, so a folder named step_N is complete. Rank 0
alone writes; what differs by rank is gathered into `state` first. Called by train.py between steps.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

STAGING = ".staging-"


def default_run_dir(config_name: str) -> Path:
    """runs/CONFIG-TIME; under torchrun runs/CONFIG-ID, so that a rank restarted by it finds its folder again."""
    return Path("runs") / f"{config_name}-{_launch_id() or time.strftime('%Y%m%d-%H%M%S')}"


def restarted_by_launcher() -> bool:
    """Whether torchrun started this process again after a failure: its run is then gone on with."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _launch_id() -> str | None:
    """torchrun's --rdzv-id; without one, the process id and start time of torchrun itself: the same after a restart."""
    given = os.environ.get("TORCHELASTIC_RUN_ID")
    if given != "none":
        return given
    parent = os.getppid()
    started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]  # ticks since boot: man 5 proc
    return f"torchrun-{parent}-{started}"


def open_run_dir(path: Path | str, *, resume: bool) -> Path:
    """The run folder, made if need be. One with anything in it is refused unless the run goes on; rank 0 only.

    A run that the launcher restarts before its first checkpoint may begin again in its folder.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_used = any(path.iterdir())
    except OSError as error:
        raise ValueError(f"cannot use run folder {path}: {error.strerror}; choose another --run-dir") from error
    if is_used and not resume:
        raise ValueError(f"run folder {path} is not empty; go on with --resume {path} or choose another --run-dir")
    if resume and latest(path) is None and not restarted_by_launcher():
        raise ValueError(f"{path} has no checkpoint to resume; start again with another --run-dir")
    return path


def save(
    run_dir: Path,
    step: int,
    write_model: Callable[[Path], None],
    state: dict[str, Any],
    *,
    keep_last: int,
    best_step: int | None,
) -> Path:
    """Write checkpoints/step_N, then prune to the last `keep_last` and the best; returns its folder.

    write_model(folder) writes the model and tokenizer. state: tensors, numbers, text, None and dicts, lists or tuples
    of them. A complete step_N that is there already is kept: the same step has the same state. Raises OSError that
    names the folder where the disk is full or not writable; earlier checkpoints are then untouched.
    """
    target = run_dir / "checkpoints" / f"step_{step}"
    if not target.exists():
        staging = target.with_name(f"{STAGING}{target.name}")
        try:
            _remove_staging(target.parent)
            (staging / "state").mkdir(parents=True)
            write_model(staging)
            _write_state(state, staging / "state" / "state.pt")
            _flush(staging)
            staging.rename(target)
            _flush_one(target.parent)
        except (OSError, SafetensorError, _TorchWriteError) as error:
            raise OSError(f"could not write checkpoint {target}: {error}; free space or mend permissions") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    _prune(target.parent, keep_last=keep_last, best_step=best_step)
    return target


class _TorchWriteError(RuntimeError):
    """torch.save reports a full disk as a bare RuntimeError."""


def _write_state(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise _TorchWriteError(str(error).splitlines()[0]) from error
    # What weights_only refuses would fail at resume, hours later. Mapped: no tensor is read back.
    torch.load(path, mmap=True, weights_only=True)


def _flush(folder: Path) -> None:
    """Bring files and folders to disk, contents before names: a rename must not outlive what it names."""
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_staging(folder: Path) -> None:
    """Leftovers of a kill during `save`."""
    for leftover in folder.glob(f"{STAGING}*"):
        shutil.rmtree(leftover)


def _prune(folder: Path, *, keep_last: int, best_step: int | None) -> None:
    assert keep_last >= 1, keep_last
    steps = _steps(folder)
    for step in sorted(steps)[:-keep_last]:
        if step != best_step:
            # Renamed first: a kill during the removal must not leave half a folder under a good name.
            doomed = steps[step].rename(folder / f"{STAGING}removing-{step}")
            shutil.rmtree(doomed)


def _steps(folder: Path) -> dict[int, Path]:
    found = (path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal())
    return {int(path.name.removeprefix("step_")): path for path in found}


def latest(run_dir: Path | str) -> Path | None:
    """The checkpoint with the highest step, if there is one; staging leftovers do not count."""
    steps = _steps(Path(run_dir) / "checkpoints")
    return steps[max(steps)] if steps else None


def mark_best(run_dir: Path, step: int, accuracy: float) -> None:
    """Note in checkpoints/best.json that step_N has the best validation accuracy so far."""
    path = run_dir / "checkpoints" / "best.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"step": step, "accuracy": accuracy}) + "\n", encoding="utf-8")
    unfinished.replace(path)


def best(run_dir: Path | str) -> Path | None:
    """The checkpoint that best.json names, if it was written and is still there."""
    marker = Path(run_dir) / "checkpoints" / "best.json"
    if not marker.is_file():
        return None
    folder = marker.with_name(f"step_{json.loads(marker.read_text(encoding='utf-8'))['step']}")
    return folder if folder.is_dir() else None


def load_state(checkpoint: Path | str) -> dict[str, Any]:
    """The `state` that `save` was given, tensors on the CPU. ValueError where it is missing or damaged."""
    path = Path(checkpoint) / "state" / "state.pt"
    if not path.is_file():
        raise ValueError(f"{checkpoint} is no complete checkpoint: state/state.pt is missing; name another one")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged ({first_line}); resume from another checkpoint") from error
