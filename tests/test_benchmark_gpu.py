"""`python -m benchmarks.gpu` before there is a GPU: its stages, what it keeps of them, and its goals."""

import json

from benchmarks import gpu

PRINTS = "import json, sys; print('a table'); print(json.dumps({'seconds_ours': 4.5})); sys.exit(int(sys.argv[1]))"
SLEEPS = """
import sys, time
print('begun', '{"tokens_per_second": 1}', '{"tokens_per_second": 2}', '{"tokens_per', sep='\\n', flush=True)
time.sleep(int(sys.argv[1]))
"""


def run_stages(folder, monkeypatch, stages):
    """Exit status and what gpu.json has of stages (limit in seconds, arguments of python)."""
    (folder / "stage.py").write_text(PRINTS)
    (folder / "sleeper.py").write_text(SLEEPS)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(gpu, "ROOT", folder)
    monkeypatch.setattr(gpu, "STAGES", {name: gpu.Stage(line, limit / 3, "") for name, (limit, line) in stages.items()})
    status = gpu.main(["--rehearse", "--results", str(folder), "--only", *stages])  # which has three times the limit
    kept = json.loads((folder / "gpu_rehearsal.json").read_text())
    assert kept["commit"]
    return status, kept["stages"]


def test_a_stage_that_fails_or_hangs_costs_its_share_and_the_others_are_kept(tmp_path, monkeypatch, capfd):
    stages = {"rollout": (2, "sleeper.py 60"), "vs_trl": (15, "stage.py 0"), "tests": (15, "stage.py 1")}
    status, kept = run_stages(tmp_path, monkeypatch, stages)
    outcomes = {name: record["outcome"] for name, record in kept.items()}
    assert outcomes == {"rollout": "not done within 2 s", "vs_trl": "passed", "tests": "failed with status 1"}
    assert status == 1 and kept["vs_trl"]["result"] == {"seconds_ours": 4.5}
    assert "vs_trl: whole step of 64 x 16, s" in (said := capfd.readouterr().out) and "MISSED" in said


def test_a_stage_that_is_cut_off_leaves_its_last_whole_result_and_has_the_time_that_others_left(tmp_path, monkeypatch):
    stages = {"vs_trl": (4, "stage.py 0"), "rollout": (0, "sleeper.py 1"), "tests": (0, "sleeper.py 60")}
    _, kept = run_stages(tmp_path, monkeypatch, stages)
    assert kept["rollout"]["outcome"] == "passed" and kept["tests"]["outcome"].startswith("not done within ")
    assert kept["tests"]["seconds"] < 4 and kept["tests"]["result"] == {"tokens_per_second": 2}
    assert kept["tests"]["output"] == 'begun\n{"tokens_per'


def test_the_log_prob_goal_reads_the_best_of_our_contenders_at_its_width():
    rows = [("training", 896, "C torch", 0.5), ("training", 896, "C triton", 0.7), ("training", 896, "eager", 0.9)]
    rows += [("training", 4096, "C triton", 0.8), ("values", 896, "A triton", 0.95)]
    names = ("job", "width", "contender", "limit_fraction")
    result = {"results": [dict(zip(names, row, strict=True)) for row in rows]}
    found = list(gpu.goals({"linear_logprob": {"result": result}, "rollout": {"outcome": "not done"}}))
    assert [value for _, value, *_ in found] == [0.7, 0.8] and all(reached for *_, reached in found)


def test_all_stages_together_are_done_in_nine_minutes():
    assert sum(stage.limit_s for stage in gpu.STAGES.values()) <= 540
