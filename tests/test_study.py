"""The study of presets: its table by hand, equal completions, nothing done twice. No model is trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import study
from grpo.command_line import parse_command
from grpo.config import save

SETTINGS = {"num_steps": 4, "minibatches": 2, "options": ["--rollout.group-size=4"]}


class FakeTrain:
    """Writes what train.py would: two draws a step with dynamic sampling, one without."""

    def __init__(self):
        self.calls: list[str] = []
        self.fails = False

    def __call__(self, argv: list[str]) -> int:
        command = parse_command(argv)
        run_dir, config = Path(command.run_dir or command.resume), command.config
        self.calls.append(f"{'resume ' if command.resume else ''}{run_dir.name}: {config.num_steps}")
        run_dir.mkdir(parents=True, exist_ok=True)
        save(config, run_dir / "config.yaml")
        if self.fails:
            return 2
        dropped = 0.5 if config.objective.preset == "dapo" else 0.0
        row = {"groups_dropped": dropped, "entropy": 0.25, "validation/accuracy": 0.5}
        lines = [json.dumps({"step": step} | row) + "\n" for step in range(1, config.num_steps + 1)]
        (run_dir / "metrics.jsonl").write_text("".join(lines))
        seconds = {"rollout": 2.0, "score": 1.0, "update": 3.0, "evaluation": 100.0}
        summary = {"accuracy_before": 0.1, "accuracy_after": 0.6, "best_step": 2, "seconds": seconds}
        (run_dir / "summary.json").write_text(json.dumps(summary))
        return 0


def run(out, train, presets=("grpo", "dapo"), seeds=(0,), settings=SETTINGS):
    return list(study.run_all(list(presets), list(seeds), settings, out, train))


def test_every_preset_draws_as_many_completions_though_dynamic_sampling_makes_fewer_steps(tmp_path):
    train = FakeTrain()
    grpo, dapo = run(tmp_path, train)
    assert train.calls == ["grpo-0: 4", "dapo-0-drawn: 4", "dapo-0: 2"]
    # 16 prompts x 4, once a step or twice
    assert (grpo["steps"], grpo["completions"]) == (4, 4 * 64) and (dapo["steps"], dapo["completions"]) == (2, 2 * 128)
    assert dapo["validation"] == [(128, 0.5), (256, 0.5)] and dapo["seconds"] == 6.0
    warmups = [study.load(tmp_path / "runs" / name / "config.yaml").optim.warmup for name in ("grpo-0", "dapo-0")]
    assert warmups == [0.1, 0.2]  # 0.4 steps each


def test_steps_that_fit_a_budget_of_draws():
    assert study.affordable_steps([1, 1, 1], 3) == 3
    assert study.affordable_steps([2, 1, 4, 1], 7) == 3
    assert study.affordable_steps([2, 1, 4, 1], 6) == 2
    assert study.affordable_steps([4, 4], 2) == 1


def test_what_is_finished_is_not_run_again_and_what_is_not_goes_on(tmp_path):
    train = FakeTrain()
    first = run(tmp_path, train, presets=["grpo"])
    begun, lost = (tmp_path / "runs" / name for name in ("rloo-0", "gspo-0"))
    (begun / "checkpoints" / "step_2").mkdir(parents=True)
    save(study.load(tmp_path / "runs" / "grpo-0" / "config.yaml"), begun / "config.yaml")
    lost.mkdir()
    (lost / "metrics.jsonl").write_text("")
    rows = run(tmp_path, train, presets=["grpo", "rloo", "gspo"])
    assert train.calls == ["grpo-0: 4", "resume rloo-0: 4", "gspo-0: 4"]
    assert json.dumps(rows[0]) == json.dumps(first[0])
    assert len((tmp_path / "study.jsonl").read_text().splitlines()) == 3


def test_a_surrogate_without_a_ratio_makes_one_optimizer_step(tmp_path):
    assert [row["minibatches"] for row in run(tmp_path, FakeTrain(), presets=["grpo", "rloo"])] == [2, 1]


def test_other_settings_and_failed_runs_are_refused(tmp_path):
    train = FakeTrain()
    run(tmp_path, train, presets=["grpo"])
    with pytest.raises(ValueError, match="'num_steps': 4.* but this call has .*'num_steps': 5.*use another --out"):
        run(tmp_path, train, settings=SETTINGS | {"num_steps": 5})
    train.fails = True
    with pytest.raises(ValueError, match="the run rloo-0 ended with status 2; .*rloo-0.log says why; rerun the same"):
        run(tmp_path, train, presets=["rloo"])
    with pytest.raises(ValueError, match="the run gspo-0 ended with status 2"):
        run(tmp_path / "other", parse_command, presets=["gspo"], settings=SETTINGS | {"options": ["--no-such-option"]})


def test_options_go_to_train_py_unless_the_study_decides_them(capsys):
    chosen = study.parse(["--out", "DIR", "--seeds", "3", "--rollout.group-size=4", "--optim.lr", "1e-4"])
    assert (chosen.seeds, chosen.options) == ([3], ["--rollout.group-size=4", "--optim.lr", "1e-4"])
    with pytest.raises(SystemExit):
        study.parse(["--out", "DIR", "--seed", "3", "--batch.minibatches=4"])
    assert "--batch.minibatches, --seed: the study sets this for every run" in capsys.readouterr().err


def a_row(preset, after, entropy):
    validation = [(64, 0.2), (128, after)]
    columns = {"accuracy_before": 0.125, "completions": 6400, "seconds": 90.4, "commit": "c0ffee"}
    return {"preset": preset, "accuracy_after": after, "entropy": entropy, "validation": validation} | columns


def test_the_table_by_hand_and_the_page(tmp_path):
    rows = [a_row("grpo", 0.5, 0.1), a_row("rloo", 0.25, 0.5), a_row("grpo", 0.7, 0.3)]
    assert study.table(rows).splitlines()[2:] == [
        "| `grpo` | 2 | 12.5% | 60.0% | 50.0% to 70.0% | 0.200 | 6,400 | 90 |",
        "| `rloo` | 1 | 12.5% | 25.0% | 25.0% to 25.0% | 0.500 | 6,400 | 90 |",
    ]
    study.write_page(rows, tmp_path / "docs" / "study.md", "python -m benchmarks.study --out DIR")
    page = (tmp_path / "docs" / "study.md").read_text()
    assert study.table(rows) in page and "`python -m benchmarks.study --out DIR`" in page and "`c0ffee`" in page
    assert "![accuracy by preset](study.png)" in page and (tmp_path / "docs" / "study.png").stat().st_size > 10_000


def test_what_a_person_wrote_around_the_table_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "draw_plot", lambda rows, path: None)
    page, old, new = tmp_path / "study.md", [a_row("grpo", 0.5, 0.1)], [a_row("rloo", 0.25, 0.5)]
    study.write_page(old, page, "first")
    page.write_text(page.read_text().replace("embedded task\n", "embedded task\n\nBefore \\1.\n") + "\nAfter.\n")
    study.write_page(new, page, "second")
    text = page.read_text()
    assert study.table(new) in text and study.table(old) not in text and "first" not in text
    assert text.startswith("# The presets on the embedded task\n\nBefore \\1.\n") and text.endswith("\n\nAfter.\n")
    page.write_text("A page of another kind.\n")
    study.write_page(new, page, "third")
    assert page.read_text().startswith("A page of another kind.\n\n") and study.table(new) in page.read_text()


def test_the_page_in_docs_has_the_marks():
    assert all((study.ROOT / "docs" / "study.md").read_text().count(mark) == 1 for mark in (study.BEGIN, study.END))
