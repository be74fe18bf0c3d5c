"""Every tracker against its real library, offline: what it is given is read back from where the library put it."""

import json
import struct
import time

import pytest

from grpo import trackers
from grpo.metrics import RunLogger

RECORD = {"problem": "p/0", "sample": 0, "prompt": "2+3?", "completion": "5", "answer": "5", "finish_reason": "eos"}
RECORD |= {"reward": 1.5, "advantage": 0.5, "tokens": ["5"], "logprobs": [-0.1]}
LINES = json.dumps(RECORD) + "\n"
TABLE_ROW = ["p/0", 0, "2+3?", "5", "5", "eos", 1.5, 0.5]


def run_two_steps_die_and_go_on(name, folder):
    """Steps 1 and 2, a checkpoint behind step 1; a new process resumes there and repeats step 2."""
    first = RunLogger(folder, is_writer=True, track=[name], config={"optim.lr": 0.5})
    first.log_completions(1, [LINES, "", "not of the first groups"])
    first.log({"step": 1, "reward": 0.25, "kl": float("nan")})
    state = first.state_dict()
    first.log({"step": 2, "reward": 9.0})
    first.close()
    time.sleep(1.01)  # event files are read in the order of their names, which tell the second
    again = RunLogger(folder, is_writer=True, track=[name], config={"optim.lr": 0.5})
    again.load_state_dict(state)
    again.log({"step": 2, "reward": 0.75})
    again.log({"step": 3, "reward": 1.0})
    again.close()
    return state["trackers"][name]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The run folder; every library keeps its files beside it and calls nobody."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_tracker_gets_settings_its_id_the_next_step_scalars_and_tables(place, monkeypatch):
    calls = []

    class Recorder:
        def __init__(self, folder, config, run_id, next_step):
            calls.append((config, run_id, next_step))
            self.id = run_id or "its id"

        log = log_completions = lambda self, *given: calls.append(given)
        close = lambda self: calls.append("closed")

    monkeypatch.setitem(trackers.TRACKERS, "recorder", Recorder)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert run_two_steps_die_and_go_on("recorder", place) == "its id"
    settings = {"optim.lr": 0.5}
    first = [(settings, None, 1), (1, [TABLE_ROW]), (1, {"reward": 0.25}), (2, {"reward": 9.0}), "closed"]
    assert calls == [*first, (settings, "its id", 2), (2, {"reward": 0.75}), (3, {"reward": 1.0}), "closed"]


def test_tensorboard_hides_the_lost_steps_of_a_killed_run(place):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_two_steps_die_and_go_on("tensorboard", place)
    written = events.EventAccumulator(str(place)).Reload()
    assert [(event.step, event.value) for event in written.Scalars("reward")] == [(1, 0.25), (2, 0.75), (3, 1.0)]
    assert written.Tags()["scalars"] == ["reward"], "neither the step nor what is not finite"


def test_mlflow_gets_settings_metrics_and_tables_in_one_run(place):
    mlflow = pytest.importorskip("mlflow", minversion="3")
    run_id = run_two_steps_die_and_go_on("mlflow", place)
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    assert run.info.run_name == "run" and run.data.params == {"optim.lr": "0.5"}
    history = client.get_metric_history(run_id, "reward")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 0.25), (2, 0.75), (2, 9.0), (3, 1.0)]
    table = mlflow.artifacts.load_dict(f"runs:/{run_id}/completions/step_1.json")
    assert (table["columns"], table["data"]) == (list(trackers.COMPLETION_COLUMNS), [TABLE_ROW])
    assert len(client.search_runs([run.info.experiment_id])) == 1


def wandb_records(path):
    """The records of an offline run's file: a header of 7 bytes, then checksum, length and kind before each."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position = path.read_bytes(), 7
    assert len(data) < 32768, "further on records are split"
    while position < len(data):
        _, length, _ = struct.unpack_from("<IHB", data, position)
        record = Record()
        record.ParseFromString(data[position + 7 : position + 7 + length])
        yield record
        position += 7 + length


def test_wandb_gets_settings_metrics_and_tables_in_one_run(place):
    pytest.importorskip("wandb")
    run_id = run_two_steps_die_and_go_on("wandb", place)
    files = sorted((place / "wandb").glob("offline-run-*/*.wandb"))
    records = [record for file in files for record in wandb_records(file)]
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.run_id, run.display_name, run.project) for run in runs} == {(run_id, "run", "grpo")}
    assert {"optim.lr": "0.5"}.items() <= {update.key: update.value_json for update in runs[0].config.update}.items()
    steps = [{item.nested_key[0]: item.value_json for item in r.history.item} for r in records if r.HasField("history")]
    logged = sorted((int(step["_step"]), float(step["reward"])) for step in steps)
    assert logged == [(1, 0.25), (2, 0.75), (2, 9.0), (3, 1.0)]
    (table,) = (place / "wandb").glob("offline-run-*/files/media/table/completions_*.json")
    assert json.loads(table.read_text()) == {"columns": list(trackers.COMPLETION_COLUMNS), "data": [TABLE_ROW]}


def test_trackio_gets_settings_metrics_and_tables_in_one_run(place):
    pytest.importorskip("trackio", minversion="0.2")
    from trackio.sqlite_storage import SQLiteStorage

    name = run_two_steps_die_and_go_on("trackio", place)
    assert len(SQLiteStorage.get_runs("grpo")) == 1
    assert SQLiteStorage.get_run_config("grpo", name)["optim.lr"] == 0.5
    table, *rows = SQLiteStorage.get_logs("grpo", name)
    assert table["completions"]["_value"] == [dict(zip(trackers.COMPLETION_COLUMNS, TABLE_ROW, strict=True))]
    assert [(row["step"], row["reward"]) for row in rows] == [(1, 0.25), (2, 9.0), (2, 0.75), (3, 1.0)]


def test_by_default_tensorboard_is_fed_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: name == "tensorboard")
    assert trackers.chosen(None) == ("tensorboard",)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert trackers.chosen(None) == ()
    assert trackers.chosen([]) == ()


def test_a_tracker_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"mlflow is not installed; pip install mlflow, or .*'\.\[track\]'"):
        trackers.chosen(["mlflow"])


def test_other_ranks_open_no_tracker(place):
    logger = RunLogger(place, is_writer=False, track=["tensorboard"])
    logger.log({"step": 1, "reward": 1.0})
    logger.log_completions(1, [LINES])
    logger.close()
    assert list(place.iterdir()) == []
