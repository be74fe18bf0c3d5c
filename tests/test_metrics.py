"""Metrics are tested like losses: what is written, what is cut off at a resume, what the table and the curves show."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from grpo import metrics
from grpo.live import Progress
from grpo.metrics import PhaseTimer, RunLogger
from grpo.records import Completion, Group, Problem, Scores


def row(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "reward": 0.5, "reward/format": 0.25, "kl": 0.01, "seconds/rollout": 2.0, **more}


@pytest.fixture
def logger(tmp_path):
    logger = RunLogger(tmp_path, is_writer=True)
    yield logger
    logger.close()


def test_each_step_is_one_line_that_is_on_disk_at_once(logger, tmp_path, capsys):
    logger.log(row(1))
    logger.log(row(2, loss=float("nan"), grad_norm=float("inf"), entropy=None))
    assert metrics.read_metrics(tmp_path) == [row(1), row(2, loss=None, grad_norm=None, entropy=None)]
    written = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in written and "Infinity" not in written


def test_a_line_that_is_cut_off_is_left_out_in_the_middle_of_a_character_too(tmp_path):
    whole = json.dumps({"completion": "5 \u20ac \u2028"}, ensure_ascii=False).encode() + b"\n"
    for end in range(len(whole)):
        (tmp_path / "step_1.jsonl").write_bytes(whole + whole[:end])
        assert metrics.read_records(tmp_path / "step_1.jsonl") == [json.loads(whole)]


def test_a_resumed_run_repeats_no_line_and_loses_none(logger, tmp_path):
    logger.log(row(1))
    logger.log_completions(1, ["first\n", "second\n"])
    state = json.loads(json.dumps(logger.state_dict()))
    logger.log(row(2, reward=9.0))
    logger.log_completions(2, ["lost\n"])
    logger.close()
    resumed = RunLogger(tmp_path, is_writer=True)
    resumed.load_state_dict(state)
    kept = {path.name: path.read_text() for path in (tmp_path / "completions").iterdir()}
    assert kept == {"step_1.jsonl": "first\nsecond\n"} and resumed.state_dict() == state
    resumed.log(row(2))
    resumed.log(row(3))
    assert metrics.read_metrics(tmp_path) == [row(1), row(2), row(3)]
    assert resumed.state_dict()["offset"] == (tmp_path / "metrics.jsonl").stat().st_size
    resumed.close()


def test_a_run_that_begins_again_in_its_folder_keeps_no_old_line(logger, tmp_path):
    logger.log(row(1, reward=9.0))
    logger.close()
    again = RunLogger(tmp_path, is_writer=True)
    again.log(row(1))
    again.log(row(2))
    again.close()
    assert metrics.read_metrics(tmp_path) == [row(1), row(2)]


def test_metrics_shorter_than_the_checkpoint_says_are_refused(logger):
    with pytest.raises(ValueError, match="has 0 bytes, but 10 when the checkpoint was written"):
        logger.load_state_dict({"offset": 10, "step": 1, "seconds": {}})


def test_a_second_writer_in_the_same_folder_is_refused(logger, tmp_path):
    with pytest.raises(ValueError, match="is in use by another process; use another --run-dir"):
        RunLogger(tmp_path, is_writer=True)


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_folder_on_a_file_system_without_locks_is_used_with_a_word(error, tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(metrics.fcntl, "flock", flock)
    logger = RunLogger(tmp_path, is_writer=True)
    said = capsys.readouterr().out
    assert f"{tmp_path} cannot be locked ({os.strerror(error)})" in said and "do not start a second run in it" in said
    logger.log(row(1))
    logger.close()
    assert metrics.read_metrics(tmp_path) == [row(1)]


def test_other_ranks_write_and_print_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "can_show", lambda: True)
    logger = RunLogger(tmp_path, is_writer=False)
    logger.log(row(1))
    logger.log_completions(1, ['{"completion": "x"}\n'])
    logger.write_json("env.json", {})
    logger.say("hello")
    logger.draw_curves()
    logger.progress(1, 2)
    logger.load_state_dict(logger.state_dict())
    logger.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_without_matplotlib_a_run_goes_on(logger, tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    logger.log(row(1))
    logger.draw_curves()
    assert "curves.png is not drawn" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_table_is_aligned_and_its_heading_comes_again_every_20_rows(logger, capsys):
    for step in range(1, 42):
        logger.log(row(step))
    lines = capsys.readouterr().out.splitlines()
    headings = [i for i, line in enumerate(lines) if line.lstrip().startswith("step")]
    assert headings == [0, 21, 42]
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:3] == ["step", "reward", "format"]
    assert lines[1].split() == ["1", "0.500", "0.250", "0.0100", "2.00"]
    assert lines[0].index("kl") + 2 == lines[1].index("0.0100") + 6, "a value ends where its heading ends"


def test_a_terminal_gets_the_columns_that_fit():
    whole, some = metrics.table_row(row(1))[0], metrics.table_row(row(1), 40)[0]
    assert len(some) <= 40 < len(whole) and whole.startswith(some)
    assert metrics.table_row(row(1), len(whole))[0] == whole != metrics.table_row(row(1), len(whole) - 1)[0]


def test_phase_seconds_are_measured_taken_once_and_summed_over_the_run(monkeypatch):
    now = iter([0.0, 2.0, 10.0, 10.5, 20.0, 23.0, 30.0, 37.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    timer = PhaseTimer(Progress(is_shown=False))
    with timer("rollout"):
        pass
    with timer("update"):
        pass
    assert metrics.training_seconds(timer.recent) == 2.5
    assert timer.take() == {"seconds/rollout": 2.0, "seconds/update": 0.5}
    assert metrics.training_seconds(timer.recent) == 0.0
    with pytest.raises(KeyError), timer("rollout"):
        raise KeyError
    assert timer.take() == {"seconds/rollout": 3.0}
    with timer("evaluation"):
        pass
    assert metrics.training_seconds(timer.recent) == 0.0
    assert timer.totals == {"rollout": 5.0, "update": 0.5, "evaluation": 7.0}
    assert metrics.training_seconds(timer.totals) == 5.5, "evaluation does not count as training"


def test_seconds_before_a_checkpoint_is_loaded_are_in_no_line(logger):
    state = logger.state_dict()
    with logger.timer("base"):
        pass
    logger.load_state_dict(state)
    assert logger.timer.take() == logger.timer.totals == {}


def test_what_cannot_be_written_is_told_with_the_folder(logger, tmp_path):
    (tmp_path / "completions").write_text("in the way of the folder")
    with pytest.raises(OSError, match=f"could not write in {tmp_path}: .*; free space or fix permissions"):
        logger.log_completions(1, [])


def test_completion_lines_hold_what_the_reward_checker_reads():
    columns = {"tokens": 57, "status": "a column of this name is ours"}
    problem = Problem("train/7", "2+3?", "5", prompt="Question: 2+3?\nAnswer:", columns=columns)
    group = Group(
        problem, [Completion([1], [-0.5], "5!", "stop", 0), Completion([2], [-0.1], "6\u2028", "length", 1)], step=3
    )
    components = torch.tensor([[[1.0, float("nan")], [0.0, 0.0]]])
    status = [[["ok", "abstain"], ["ok", "ok"]]]
    total = torch.tensor([[0.5, 0.0]])
    scores = Scores(("format", "style"), (0.5, 1.0), components, status, total, total >= 0, total.long(), total > 1)
    facts = (scores, torch.tensor([[1.0, -1.0]]), "abc".__getitem__)
    (lines,) = metrics.completion_lines([group], *facts, num_with_tokens=1)
    first, second = map(json.loads, lines.removesuffix("\n").split("\n"))
    assert first == {
        "problem": "train/7",
        "sample": 0,
        "prompt": "Question: 2+3?\nAnswer:",
        "completion": "5!",
        "answer": "5",
        "finish_reason": "stop",
        "rewards": {"format": 1.0, "style": None},
        "status": {"format": "ok", "style": "abstain"},
        "reward": 0.5,
        "advantage": 1.0,
        "tokens": ["b"],
        "logprobs": [-0.5],
    }
    assert (second["completion"], second["finish_reason"], second["advantage"]) == ("6\u2028", "length", -1.0)


def test_a_completion_line_has_no_digits_beyond_those_of_fp32():
    group = Group(Problem("0", "", ""), [Completion([0], [-0.1], "x", "eos", 0)], 1)
    one = torch.ones(1, 1)
    scores = Scores(("c",), (1.0,), one[None] / 3, [[["ok"]]], one / 10, one > 0, one.long(), one > 1)
    (line,) = metrics.completion_lines([group], scores, -one / 7, "a".__getitem__, num_with_tokens=0)
    record = json.loads(line)
    assert (record["rewards"], record["reward"], record["advantage"]) == ({"c": 0.333333}, 0.1, -0.142857)


def test_only_the_first_groups_of_a_step_are_recorded_token_by_token():
    count = 3
    groups = [Group(Problem(str(p), "", ""), [Completion([0], [-0.12345], "x", "eos", 0)], 1) for p in range(count)]
    shape = torch.zeros(count, 1)
    scores = Scores(("format",), (1.0,), shape[..., None], [[["ok"]]] * count, *[shape] * 4)
    lines = metrics.completion_lines(groups, scores, shape, "a".__getitem__, num_with_tokens=2)
    *with_tokens, last = map(json.loads, lines)
    assert [(record["tokens"], record["logprobs"]) for record in with_tokens] == [(["a"], [-0.123])] * (count - 1)
    assert not {"tokens", "logprobs"} & set(last)


def test_lengths_and_speed_by_hand():
    lengths, zeros = torch.tensor([[3, 5], [8, 0]]), torch.zeros(2, 2)
    status = [[["ok"]] * 2] * 2
    scores = Scores(("c",), (1.0,), zeros[..., None], status, zeros, zeros == 0, lengths, lengths > 7)
    expected = {"tokens": 16, "tokens_per_second": 16 / 5, "completion_length": 4.0, "truncated": 0.25}
    assert metrics.length_metrics(scores, 5.0) == expected


def test_the_texts_of_single_tokens_keep_the_spaces_that_join_them():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate(["\u2581a", "\u2581dog", "s", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert wrapped.decode([1]) == "dog", "alone, the space is lost"
    assert [metrics.token_texts(wrapped)(i) for i in (1, 2)] == [" dog", "s"]


def test_curves_show_each_panel_and_both_lines_on_one_axis_of_seconds(logger, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, dpi: drawn.append((self, path)))
    for step in (1, 2, 3):
        more = {"validation/accuracy": 0.2 * step, "seconds/evaluation": 50.0, "seconds/checkpoint": 9.0}
        logger.log(row(step, **(more if step != 2 else {})))
    logger.draw_curves(start_accuracy=0.1, supervised=[(0.0, 0.1), (6.0, 0.3)])
    (chart, path) = drawn[0]
    assert path == tmp_path / "curves.png"
    lines = {line.get_label(): line.get_xydata().tolist() for axes in chart.axes for line in axes.get_lines()}
    assert lines["GRPO"] == [[0, 0.1], [2.0, 0.2], [6.0, pytest.approx(0.6)]], "seconds of training only"
    assert lines["supervised training, same seconds"] == [[0, 0.1], [6, 0.3]]
    assert lines["reward/format"] == [[1, 0.25], [2, 0.25], [3, 0.25]]
    assert lines["kl"] == [[1, 0.01], [2, 0.01], [3, 0.01]]
    named = {axes.get_title() for axes in chart.axes if axes.get_legend()}
    assert named == {"validation accuracy", "mean reward"}, "where there are several lines"


def drawn_lines(logger, tmp_path, monkeypatch, steps):
    """Each line of the chart of so many steps: label, marker and values."""
    figure, charts = pytest.importorskip("matplotlib.figure"), []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, dpi: charts.append(self))
    rows = [row(step, reward=step % 2) for step in range(1, steps + 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics.draw_curves(tmp_path)
    axes = charts[0].axes
    assert [text.get_text() for text in axes[0].texts] == ["not recorded in this run"], "no validation"
    return [(line.get_label(), line.get_marker(), line.get_ydata().tolist()) for line in axes[1].get_lines()]


@pytest.mark.parametrize("has_reference", [True, False])
def test_the_gradient_norm_has_the_panel_of_a_kl_that_there_is_not(logger, monkeypatch, has_reference):
    figure, charts = pytest.importorskip("matplotlib.figure"), []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, dpi: charts.append(self))
    whole = row(1, entropy=0.5, completion_length=9.0, tokens_per_second=70.0, grad_norm=0.1)
    logger.log({key: value for key, value in whole.items() if key != "kl" or has_reference})
    logger.draw_curves(start_accuracy=0.1)
    _, *others = charts[0].axes
    lines = [[line.get_label() for line in axes.get_lines()] for axes in others]
    assert all(lines) and (["kl"] in lines, ["grad_norm"] in lines) == (has_reference, not has_reference)
    assert [axes.get_title() for axes in others][-1] == ("tokens per second" if has_reference else "gradient norm")


def test_curves_of_one_step_are_points_that_can_be_seen(logger, tmp_path, monkeypatch):
    assert ("reward", ".", [1]) in drawn_lines(logger, tmp_path, monkeypatch, 1)


def test_curves_of_many_steps_have_a_running_mean(logger, tmp_path, monkeypatch):
    (mean, raw, *_) = drawn_lines(logger, tmp_path, monkeypatch, 250)
    assert mean[0] == "reward" and raw[2] == [1, 0] * 125
    assert mean[2][100] == pytest.approx(3 / 5) and mean[2][0] == pytest.approx(2 / 3), "of 5 values, of 3 at the edge"


def test_curves_png_is_a_picture(logger, tmp_path):
    pytest.importorskip("matplotlib")
    logger.log(row(1))
    logger.draw_curves()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_environment_names_versions_commit_seed_and_dispatch(logger, tmp_path):
    env = metrics.environment(seed=3, world_size=2, dispatch={"sample_token": "torch"})
    logger.write_json("env.json", env)
    assert json.loads((tmp_path / "env.json").read_text()) == env
    assert (env["seed"], env["world_size"], env["dispatch"]) == (3, 2, {"sample_token": "torch"})
    assert env["versions"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])  # without +cu130


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_told_whole_and_marked_where_files_differ_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "metrics.py"))
    assert metrics.git_commit() is None, "outside git"
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false")
    git = lambda *what: subprocess.check_output(["git", "-C", tmp_path, *who, *what], text=True).strip()
    (tmp_path / "file").write_text("as it was")
    for command in (["init"], ["add", "file"], ["commit", "-m", "one"], ["tag", "-a", "-m", "v1", "v1"]):
        git(*command)
    commit = git("rev-parse", "HEAD")
    assert metrics.git_commit() == commit and len(commit) == 40, "not by its tag"
    (tmp_path / "file").write_text("changed")
    assert metrics.git_commit() == f"{commit}-dirty"


def test_documented_keys_cover_names_within_a_pattern_and_nothing_else():
    assert {"step", "reward", "reward/<component>", "seconds/<phase>"} <= set(metrics.documented_keys())
    keys = ["step", "reward/format", "seconds/rollout", "reward/", "reward/a/b", "rewards", "nonsense"]
    assert [key for key in keys if metrics.definition(key) is None] == ["reward/", "reward/a/b", "rewards", "nonsense"]
    assert "(a checkpoint is counted in the line after it)." in metrics.definition("seconds/rollout")


def test_every_metric_has_a_healthy_range():
    assert [key for key, text in metrics.documented_keys().items() if "*Healthy*: " not in text] == []
