"""The run folder and its checkpoints: written atomically, verified, pruned.

    runs/NAME/checkpoints/step_N/          Hugging Face layout, written by the policy
    runs/NAME/checkpoints/step_N/state/    state.pt: everything needed to resume; manifest.json: every file's hash
    runs/NAME/checkpoints/best.json        which step had the best validation accuracy

A checkpoint is built in a staging folder, flushed to disk and renamed, so a folder named step_N was complete when
written; `verify` finds later damage by the manifest. Only rank 0 writes; what differs by rank is gathered into `state`
first. Written by grpo.run between steps; read by it, grpo.results, grpo.lora and eval.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

STAGING = ".staging-"
MANIFEST = Path("state") / "manifest.json"

WriteModel = Callable[[Path, dict[str, Any]], None]  # (folder, state): writes the model and tokenizer of that state
Best = tuple[float, int] | None  # validation accuracy and step of the best checkpoint so far


class Damaged(ValueError):
    """A checkpoint's files are not as they were written; the message names the file and what is wrong with it."""


def default_run_dir(config_name: str) -> Path:
    """runs/CONFIG-TIME; under torchrun runs/CONFIG-ID, so that ranks that it restarts find their folder again."""
    return Path("runs") / f"{config_name}-{_launch_id() or time.strftime('%Y%m%d-%H%M%S')}"


def restarted_by_launcher() -> bool:
    """Whether torchrun restarted this process after a failure of one on this machine; elsewhere it may not know."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _launch_id() -> str | None:
    """torchrun's --rdzv-id; without one, the process id and (on Linux) start time of torchrun itself: the same after a
    restart. Without the start time a later torchrun may get the same id; `open_run_dir` then refuses the used folder.
    """
    given = os.environ.get("TORCHELASTIC_RUN_ID")
    if given != "none":
        return given
    parent = os.getppid()
    status = Path(f"/proc/{parent}/stat")
    started = status.read_text().rpartition(")")[2].split()[19] if status.is_file() else "0"  # ticks: man 5 proc
    return f"torchrun-{parent}-{started}"


def open_run_dir(path: Path | str, *, resume: bool, is_restart: bool = False) -> Path:
    """Make the run folder if it does not exist. ValueError if it has files and is not resumed; rank 0 only.

    An empty metrics.jsonl does not count: a run that failed while it was being built leaves one.
    is_restart: the launcher restarted the run, which may start again in its folder before its first checkpoint.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_used = any(entry.name != "metrics.jsonl" or entry.stat().st_size for entry in path.iterdir())
    except OSError as error:
        raise ValueError(f"cannot use run folder {path}: {error.strerror}; choose another --run-dir") from error
    if is_used and not (resume or is_restart):
        raise ValueError(
            f"run folder {path} is not empty; continue it with --resume {path} or choose another --run-dir"
        )
    if resume and latest(path) is None and not is_restart:
        raise ValueError(f"{path} has no checkpoint to resume; start again with another --run-dir")
    return path


class Writer:
    """Writes checkpoints in the background, one at a time: training waits only until its state is copied.

    The copy takes as much CPU memory as the state has bytes, until it is written. An error in writing is raised by the
    next `save`, or by `wait`.
    """

    def __init__(self, run_dir: Path, *, keep_last: int):
        self.run_dir, self.keep_last = run_dir, keep_last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")  # joined when the process exits
        self._pending: Future | None = None

    def save(self, step: int, write_model: WriteModel, state: dict[str, Any], *, best: Best) -> None:
        """Wait for the previous checkpoint, copy the state, and start the function `save` in the background."""
        self.wait()
        options = {"keep_last": self.keep_last, "best": best}
        self._pending = self._thread.submit(save, self.run_dir, step, write_model, snapshot(state), **options)

    def wait(self) -> None:
        """Wait until everything is on disk. Raises what the function `save` raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def snapshot(state: Any) -> Any:
    """The same state with every tensor copied to the CPU, so that later changes to the originals do not affect it."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return type(state)(map(snapshot, state)) if isinstance(state, list | tuple) else state


def save(
    run_dir: Path, step: int, write_model: WriteModel, state: dict[str, Any], *, keep_last: int, best: Best
) -> Path:
    """Write checkpoints/step_N, note the best step, prune to the last `keep_last` and the best; returns the folder.

    state: tensors, numbers, text, None and dicts, lists or tuples of them. If step_N exists it is kept: the same step
    has the same state. OSError names the folder if the disk is full or not writable; earlier checkpoints are then
    untouched.
    """
    target = run_dir / "checkpoints" / f"step_{step}"
    if not target.exists():
        staging = target.with_name(f"{STAGING}{target.name}")
        try:
            for leftover in target.parent.glob(f"{STAGING}*"):  # left by a kill during `save`
                shutil.rmtree(leftover, ignore_errors=True)
            (staging / "state").mkdir(parents=True)
            write_model(staging, state)
            _write_state(state, staging / "state" / "state.pt")
            _write_manifest(staging)
            # Flush contents before the rename: after a crash no complete name may have incomplete contents.
            _flush(*sorted(staging.rglob("*"), reverse=True), staging)
            staging.rename(target)
            _flush(target.parent)
        except (OSError, SafetensorError) as error:
            raise OSError(f"could not write checkpoint {target}: {error}; free space or fix permissions") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    if best is not None:
        mark_best(run_dir, *best)
    _prune(target.parent, keep_last=keep_last, best_step=best[1] if best else None)
    return target


def _write_state(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # what torch.save raises on a full disk
        raise OSError(str(error).partition("\n")[0]) from error
    # Fail now, not at resume, if weights_only refuses something in it. With mmap no tensor is read back.
    torch.load(path, mmap=True, weights_only=True)


def _write_manifest(folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)] for path in paths}
    (folder / MANIFEST).write_text(json.dumps({"files": files, "sha256": _manifest_hash(files)}, indent=2) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_hash(files: dict[str, list]) -> str:
    """The manifest's own hash: tells a bit flipped in the manifest from one flipped in a file that it lists."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def verify(folder: Path, *, state: bool = True) -> None:
    """Raises Damaged unless every file has the size and the SHA-256 with which it was written.

    state: also check the files in state/, which only a resumed run reads.
    """
    manifest = folder / MANIFEST
    try:
        record = json.loads(manifest.read_bytes())
        files = record["files"]
        if record["sha256"] != _manifest_hash(files):
            raise ValueError("it is not what was written: its checksum does not match")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{manifest} cannot be read: {error!r}") from error
    for name, (size, sha256) in files.items():
        if name.startswith("state/") and not state:
            continue
        path = folder / name
        try:
            if path.stat().st_size != size:
                raise Damaged(f"{path} has {path.stat().st_size} bytes, but {size} were written")
            if _sha256(path) != sha256:
                raise Damaged(f"{path} is not what was written: its {size} bytes have another SHA-256")
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from error


def newest_intact(run_dir: Path | str, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint with the highest step that passes `verify`; None if there are no checkpoints. Rank 0 only.

    Later ones, which are damaged, are reported and renamed to damaged_step_N. ValueError if all are: none is renamed.
    """
    damaged: dict[Path, Damaged] = {}
    for _, folder in sorted(_steps(Path(run_dir) / "checkpoints").items(), reverse=True):
        try:
            verify(folder)
        except Damaged as error:
            damaged[folder] = error
            continue
        for bad, error in damaged.items():
            aside = bad.with_name(f"damaged_{bad.name}")
            shutil.rmtree(aside, ignore_errors=True)
            say(f"damaged: {error}; set aside as {bad.rename(aside)}, and {folder.name} is used")
        return folder
    if damaged:
        reasons = "\n".join(map(str, damaged.values()))
        raise ValueError(f"every checkpoint of {run_dir} is damaged; restore one or start another run\n{reasons}")
    return None


def _flush(*paths: Path) -> None:
    """fsync files and folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot fsync folders
                raise
        finally:
            os.close(descriptor)


def _prune(folder: Path, *, keep_last: int, best_step: int | None) -> None:
    assert keep_last >= 1, keep_last
    steps = _steps(folder)
    for step in sorted(steps)[:-keep_last]:
        if step != best_step:
            # Renamed first: a kill during the removal must not leave a step_N that is incomplete.
            doomed = steps[step].rename(folder / f"{STAGING}removing-{step}")
            shutil.rmtree(doomed, ignore_errors=True)  # on NFS open files remain: the next save tries again


def _steps(folder: Path) -> dict[int, Path]:
    found = (path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal())
    return {int(path.name.removeprefix("step_")): path for path in found}


def latest(run_dir: Path | str) -> Path | None:
    """The checkpoint with the highest step, not verified; None without one. Staging leftovers do not count."""
    steps = _steps(Path(run_dir) / "checkpoints")
    return steps[max(steps)] if steps else None


def mark_best(run_dir: Path, accuracy: float, step: int) -> None:
    """Note in checkpoints/best.json that step_N has the best validation accuracy so far."""
    path = run_dir / "checkpoints" / "best.json"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"step": step, "accuracy": accuracy}) + "\n", encoding="utf-8")
    unfinished.replace(path)


def best(run_dir: Path | str) -> Path | None:
    """The checkpoint named by best.json; None if either is missing. Damaged if best.json cannot be read."""
    marker = Path(run_dir) / "checkpoints" / "best.json"
    if not marker.is_file():
        return None
    try:
        folder = marker.with_name(f"step_{json.loads(marker.read_bytes())['step']}")
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{marker} cannot be read ({error!r}); remove it, or name a checkpoint") from error
    return folder if folder.is_dir() else None


def model_folder(path: Path | str) -> tuple[Path, Path | None]:
    """The folder to load for a path, and the run folder that it belongs to, if any.

    A run folder stands for its best checkpoint, else its last; ValueError if it has none. A checkpoint's model is
    verified, and Damaged raised if it fails. Any other path, such as a hub id, is returned unchanged and unchecked.
    """
    folder = Path(path).expanduser()
    run = folder if (folder / "config.yaml").is_file() else None
    if run:
        folder = best(run) or latest(run)
        if folder is None:
            raise ValueError(f"run folder {path} has no checkpoint yet; wait for one or name a model folder")
    elif folder.parent.name == "checkpoints" and (folder.parent.parent / "config.yaml").is_file():
        run = folder.parent.parent
    if run or (folder / MANIFEST).is_file():
        try:
            verify(folder, state=False)
        except Damaged as error:
            remedy = "name another step, or a copy without state/ if you changed the file yourself"
            raise Damaged(f"{error}; {remedy}") from error
    return folder, run


def restore_best(run_dir: Path, best: Best, say: Callable[[str], None] = print) -> Best:
    """The best step of a resumed run, written to best.json again; None if its checkpoint is missing or damaged."""
    if best is not None:
        try:
            verify(run_dir / "checkpoints" / f"step_{best[1]}")
            mark_best(run_dir, *best)
        except Damaged as error:
            say(f"the best checkpoint so far is lost: {error}; validation chooses another from here on")
            return None
    return best


def random_state() -> dict[str, torch.Tensor]:
    """The state of torch's random generators, on the CPU and on this process's CUDA device."""
    on_device = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **on_device}


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Restore a `random_state`; its CUDA part is ignored if there is no CUDA device."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def load_state(checkpoint: Path | str) -> dict[str, Any]:
    """The `state` that was given to `save`, tensors on the CPU. ValueError if it is missing or damaged."""
    path = Path(checkpoint) / "state" / "state.pt"
    try:
        # With mmap a rank reads only the rows that it keeps, not the whole file.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"{path} is missing or damaged ({first_line}); resume from another checkpoint") from error
