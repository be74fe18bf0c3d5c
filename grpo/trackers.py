"""Trackers that get what metrics.jsonl gets: TensorBoard, Weights & Biases, MLflow and trackio, by name.

Called by grpo.metrics.RunLogger on rank 0. A library is imported when its tracker is opened; where it sends its data is
set by its own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR ...). Steps that a resumed run
repeats replace the lost ones in TensorBoard; in the others they may appear twice.

A tracker is made with the run folder, every setting by its dotted key, the tracker's own `id` if the run is resumed
(None for a new run), and the first step that it will log. Rows of completions have COMPLETION_COLUMNS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROJECT = "grpo"
COMPLETION_COLUMNS = ("problem", "sample", "prompt", "completion", "answer", "finish_reason", "reward", "advantage")


class TensorBoard:
    """Event files in the run folder; no tables. Earlier events from next_step on, of a killed run, are hidden."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], run_id: str | None, next_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.id = run_dir.name
        self._writer = SummaryWriter(run_dir, purge_step=next_step)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)

    def log_completions(self, step: int, rows: list[list[Any]]) -> None:
        pass

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in the project `grpo`."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], run_id: str | None, next_step: int):
        import wandb

        options = {"id": run_id, "resume": "allow"} if run_id else {}
        self._table = wandb.Table
        self._run = wandb.init(project=PROJECT, name=run_dir.name, dir=run_dir, config=dict(config), **options)
        self.id = self._run.id

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def log_completions(self, step: int, rows: list[list[Any]]) -> None:
        self._run.log({"completions": self._table(columns=list(COMPLETION_COLUMNS), data=rows)}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run in the experiment `grpo`; completions are table artifacts, one per step."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], run_id: str | None, next_step: int):
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(PROJECT)
        self.id = mlflow.start_run(run_id=run_id, run_name=run_dir.name).info.run_id
        settings = list(config.items()) if run_id is None else []  # a resumed run has them, and they cannot be changed
        for start in range(0, len(settings), 100):  # the limit of one request
            mlflow.log_params(dict(settings[start : start + 100]))

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._mlflow.log_metrics(scalars, step=step)

    def log_completions(self, step: int, rows: list[list[Any]]) -> None:
        columns = dict(zip(COMPLETION_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
        self._mlflow.log_table(columns, f"completions/step_{step}.json")

    def close(self) -> None:
        self._mlflow.end_run()


class Trackio(WeightsAndBiases):
    """The same API as Weights & Biases. Runs are identified by name: of several with one name the latest is resumed."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], run_id: str | None, next_step: int):
        import trackio

        self._table = trackio.Table
        options = {"resume": "must" if run_id else "never", "embed": False}
        self._run = trackio.init(project=PROJECT, name=run_id or run_dir.name, config=dict(config), **options)
        self.id = self._run.name


Tracker = TensorBoard | WeightsAndBiases | MLflow
TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow, "trackio": Trackio}


def chosen(names: Sequence[str] | None) -> tuple[str, ...]:
    """The trackers that a config asks for: by default TensorBoard, if it is installed.

    ValueError for one that is not installed, before any long work.
    """
    if names is None:
        return ("tensorboard",) if find_spec("tensorboard") else ()
    for name in names:
        if not find_spec(name):
            every = "or all trackers: pip install -e '.[track]'"
            raise ValueError(f"track={list(names)}, but {name} is not installed; pip install {name}, {every}")
    return tuple(names)
