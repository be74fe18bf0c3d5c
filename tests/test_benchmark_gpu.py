"""`python -m benchmarks.gpu` before there is a GPU: its stages, what it keeps of them, and its goals."""

import json

from benchmarks import gpu

PRINTS = "import json, sys; print('a table'); print(json.dumps({'seconds_ours': 4.5})); sys.exit(int(sys.argv[1]))"


def test_a_stage_that_fails_or_hangs_costs_its_share_and_the_others_are_kept(tmp_path, monkeypatch, capfd):
    script = tmp_path / "stage.py"
    script.write_text(PRINTS)
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time; print('begun', flush=True); time.sleep(60)")
    stages = {"vs_trl": f"{script} 0", "rollout": f"{sleeper}", "tests": f"{script} 1"}
    monkeypatch.setattr(gpu, "STAGES", {name: gpu.Stage(line, 5, "") for name, line in stages.items()})
    assert gpu.main(["--rehearse", "--results", str(tmp_path), "--only", *stages]) == 1
    kept = json.loads((tmp_path / "gpu_rehearsal.json").read_text())
    outcomes = {name: record["outcome"] for name, record in kept["stages"].items()}
    assert outcomes == {"vs_trl": "passed", "rollout": "not done within 15 s", "tests": "failed with status 1"}
    assert kept["stages"]["vs_trl"]["result"] == {"seconds_ours": 4.5} and kept["commit"]
    assert "begun" in kept["stages"]["rollout"]["output"]
    assert "vs_trl: whole step of 64 x 16, s" in (said := capfd.readouterr().out) and "MISSED" in said


def test_the_log_prob_goal_reads_the_best_of_our_contenders_at_its_width():
    rows = [("training", 896, "C torch", 0.5), ("training", 896, "C triton", 0.7), ("training", 896, "eager", 0.9)]
    rows += [("training", 4096, "C triton", 0.8), ("values", 896, "A triton", 0.95)]
    names = ("job", "width", "contender", "limit_fraction")
    result = {"results": [dict(zip(names, row, strict=True)) for row in rows]}
    found = list(gpu.goals({"linear_logprob": {"result": result}, "rollout": {"outcome": "not done"}}))
    assert [value for _, value, *_ in found] == [0.7, 0.8] and all(reached for *_, reached in found)


def test_all_stages_together_are_done_in_nine_minutes():
    assert sum(stage.limit_s for stage in gpu.STAGES.values()) <= 540
