"""The whole job on a small scale: `train.py` as a user calls it, its run folder, resuming, several ranks, mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from grpo import checkpoint, run
from grpo.config import from_dict
from grpo.distributed import World
from grpo.metrics import definition, read_metrics
from grpo.rewards import Reward, score_groups
from tests import trainee
from tests.ranks import Ranks, run_ranks
from tests.tiny import made_up_groups, save_tiny_model, write_gsm8k_files
from tests.trainee import rows_without_clock

ROOT = Path(__file__).parents[1]
SMALL = [
    "--base.steps=30",
    "--base.habit-steps=5",
    "--base.validation-problems=20",
    "--rollout.prompts-per-step=4",
    "--rollout.group-size=4",
    "--eval.every=2",
    "--eval.validation-problems=20",
    "--eval.test-problems=20",
    "--num-steps=4",
    "--save-every=2",
    "--objective.ref-refresh-every=1",  # what moves the reference or the entropy must survive a resume, too
    "--objective.ref-mix=0.5",
    "--objective.entropy-bonus=0.01",
]
DEMO = ["--config", str(ROOT / "configs" / "demo.yaml"), *SMALL]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A working directory of its own, so that the cache of base models starts empty; with a tiny model in it."""
    folder = tmp_path_factory.mktemp("train")
    save_tiny_model(folder / "model", context=4096)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def finished(workplace):
    """A whole small run."""
    assert train.main([*DEMO, "--run-dir", "whole", "--seed", "3"]) == 0
    return workplace / "whole"


def test_the_run_folder_holds_what_the_readme_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
        "completions",
        "checkpoints",
    } <= names
    assert [row["step"] for row in read_metrics(finished)] == [1, 2, 3, 4]
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["objective"]["clip_low"] == 0.2 and config["seed"] == 3  # the preset's values are written out
    summary = json.loads((finished / "summary.json").read_text())
    assert {"accuracy_before", "accuracy_after", "accuracy_supervised", "seconds"} <= set(summary)
    environment = json.loads((finished / "env.json").read_text())
    assert environment["seed"] == 3 and environment["dispatch"]["linear_logprob"]["impl"] == "torch"


def test_every_logged_key_is_documented(finished):
    assert {key for row in read_metrics(finished) for key in row if definition(key) is None} == set()


def test_completions_hold_rewards_and_advantages_that_sum_to_zero_in_every_group(finished):
    lines = [json.loads(line) for line in (finished / "completions" / "step_4.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    for start in range(0, 16, 4):
        assert len({line["problem"] for line in lines[start : start + 4]}) == 1
        assert sum(line["advantage"] for line in lines[start : start + 4]) == pytest.approx(0, abs=1e-4)
    for line in lines:
        assert line["reward"] == pytest.approx(0.5 * line["rewards"]["format"] + line["rewards"]["correctness"])


def test_the_last_checkpoint_opens_as_a_plain_hugging_face_model(finished):
    folder = finished / "checkpoints" / "step_4"
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = torch.load(folder / "state" / "state.pt", weights_only=True)
    assert torch.equal(model.model.norm.weight, state["policy"]["masters"]["model.norm.weight"])
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["model.safetensors"]


def test_a_run_whose_last_checkpoint_is_damaged_repeats_the_lost_steps_bit_for_bit(finished, workplace, capsys):
    resumed = workplace / "resumed"
    shutil.copytree(finished, resumed)
    weights = resumed / "checkpoints" / "step_4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")  # the last byte of an fp32 1.0 is "?"
    (resumed / "summary.json").unlink()
    of_an_older_version = yaml.safe_load((resumed / "config.yaml").read_text())
    del of_an_older_version["objective"]["entropy_share"]
    (resumed / "config.yaml").write_text(yaml.safe_dump(of_an_older_version))
    assert train.main(["--resume", str(resumed), "--eval.test-problems=10"]) == 0
    said = capsys.readouterr().out
    assert "step_4/model.safetensors is not what was written" in said and "step_2 is used" in said
    assert "changed: eval.test_problems: 20 -> 10" in said and "CHANGED" not in said
    assert rows_without_clock(resumed) == rows_without_clock(finished)
    ours, theirs = (load_file(run / "checkpoints" / "step_4" / "model.safetensors") for run in (resumed, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_a_run_that_goes_on_may_change_takes_effect(finished, workplace):
    """Adam's settings, which torch loads with its state; groups too large for the sampler's old plan."""
    changed = workplace / "changed"
    shutil.copytree(finished, changed)
    (changed / "completions" / "step_9.jsonl").touch()  # of steps that were lost with a later checkpoint
    options = ["--num-steps=5", "--optim.betas", "0.8", "0.95", "--optim.weight-decay=0.25", "--optim.eps=1e-6"]
    assert train.main(["--resume", str(changed), *options, "--rollout.group-size=32"]) == 0
    (group,) = checkpoint.load_state(changed / "checkpoints" / "step_5")["optimizer"]["param_groups"]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.95), 0.25, 1e-6)
    assert sorted(path.name for path in (changed / "completions").iterdir()) == [f"step_{i}.jsonl" for i in range(1, 6)]
    assert (changed / "completions" / "step_5.jsonl").read_text().count("\n") == 4 * 32


def test_a_checkpoint_saved_without_a_part_is_refused_by_its_name(finished, monkeypatch):
    monkeypatch.setattr(run, "stateful_parts", lambda run: {"moon": None})
    with pytest.raises(ValueError, match="step_4 has no state of the moon: it was saved under another config"):
        run.load_checkpoint(None, finished / "checkpoints" / "step_4")


def test_two_ranks_train_like_one(finished, workplace):
    """The same global batch on two gloo ranks: the same prompts and, but for rounding, the same rewards and weights."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py"), *DEMO]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "--run-dir", "two", "--seed", "3"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "\nbefore the habit  " in result.stdout and "\nsupervised  " not in result.stdout
    for ours, theirs in zip(rows_without_clock(workplace / "two"), rows_without_clock(finished), strict=True):
        assert ours.keys() == theirs.keys()
        for key in {"reward", "tokens", "kl", "entropy", "grad_norm", "validation/accuracy"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), (ours["step"], key)
    ours, theirs = (
        load_file(workplace / run / "checkpoints" / "step_4" / "model.safetensors") for run in ("two", "whole")
    )
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


def is_written(world, folder):
    """A run at its end, whose last checkpoint takes half a second to be written."""

    def wait():
        if world.is_writer:
            time.sleep(0.5)
            (folder / "written").touch()

    parts = {"config": SimpleNamespace(num_steps=4), "first_step": 5, "log": None, "writer": SimpleNamespace(wait=wait)}
    assert train.train(SimpleNamespace(**parts, world=world), None) == 0
    return (folder / "written").exists()


def test_no_rank_goes_on_to_the_result_before_the_last_checkpoint_is_on_disk(tmp_path):
    assert run_ranks(2, is_written, tmp_path) == [True, True]


ODD = """
from grpo.records import Problem
from grpo.rewards import Reward
from grpo.tasks import Task

def correctness(completions, answer, **columns):
    return [float(int(number) % 2) for number in answer]

class Odd(Task):
    stop_strings = ()
    def __init__(self, **options):
        super().__init__(**options)
        self.rewards = {"correctness": Reward(correctness, 1.0)}
    def load(self, split):
        return [Problem(id=f"{split}/{i}", question=f"{i}?", answer=str(i)) for i in range(6)]
"""


def visited(run_dir):
    """Problems and completions of every step."""
    files = [(run_dir / "completions" / f"step_{step}.jsonl").read_text().splitlines() for step in range(1, 7)]
    return [[(row["problem"], row["completion"]) for row in map(json.loads, lines)] for lines in files]


def test_a_curriculum_is_the_same_on_two_ranks_and_after_a_resume(workplace):
    """Odd problems are solved whatever is answered; nothing has spread, so that the weights stand still."""
    (workplace / "odd.py").write_text(ODD)
    save_tiny_model(workplace / "still", context=128)
    options = (
        f"--config {ROOT}/configs/demo.yaml --task odd.py:Odd --model.path ./still --preset dr_grpo --eval.every 0"
    )
    options += " --data.curriculum drop_solved --rollout.prompts-per-step 2 --rollout.group-size 2 --num-steps 6"
    options += " --rollout.max-new-tokens 4 --rewards.no-require-finish --save-every 4 --eval.test-problems 0"
    assert train.main([*options.split(), "--run-dir", "odd"]) == 0
    expected = visited(workplace / "odd")
    problems = [[row[0] for row in step[::2]] for step in expected]
    assert sorted(sum(problems[:3], [])) == [f"train/{i}" for i in range(6)]
    assert sorted([*problems[3], problems[4][0]]) == ["train/0", "train/2", "train/4"]
    assert read_metrics(workplace / "odd")[3]["problems/skipped"] == 0.5
    shutil.rmtree(workplace / "odd" / "checkpoints" / "step_6")
    assert train.main(["--resume", "odd"]) == 0
    assert visited(workplace / "odd") == expected
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *options.split(), "--run-dir", "odd2"], env=environment, check=True, timeout=200)
    assert visited(workplace / "odd2") == expected


@pytest.mark.parametrize("log_groups", [None, 3, 1, 0])
@pytest.mark.parametrize("used", [[1, 2, 4, 7], list(range(8))], ids=["some are dropped", "all"])
def test_groups_that_are_used_go_to_their_ranks_and_into_the_file_in_order_however_many_ranks(used, log_groups):
    groups = made_up_groups(8, 2)
    drawn = score_groups(groups, {"length": Reward(lengths_of_texts, 1.0)}, require_finish=True)
    scores, advantages = drawn.pick(used), torch.arange(2.0 * len(used)).view(-1, 2)

    def work_of(ranks):
        class Rank(World):
            def gather(self, item):
                return ranks.gather(self.rank, item)

        def work(rank):
            world, written = Rank(rank, ranks.size, torch.device("cpu")), []
            log = SimpleNamespace(log_completions=lambda step, lines: written.extend(lines))
            config = SimpleNamespace(log_groups=log_groups)
            of_rank = SimpleNamespace(world=world, log=log, token_text=str, config=config)
            share = train.pick(of_rank, world.local_share(groups), used)
            train.log_completions(of_rank, 1, share, scores, advantages)
            return [group.index for group in share], written

        return ranks.run(work)

    (_, alone), *_ = work_of(Ranks(1))
    records = [json.loads(line) for lines in alone for line in lines.splitlines()]
    assert [record["advantage"] for record in records] == advantages[:log_groups].flatten().tolist()
    assert ["tokens" in record for record in records] == ([True] * 4 + [False] * (2 * len(used) - 4))[: len(records)]
    for size in (1, 2, 4):
        for rank, (share, written) in enumerate(work_of(Ranks(size))):
            assert share == used[rank::size] and written == alone


def lengths_of_texts(completions, **columns):
    return [float(len(text)) for text in completions]


OTHER_DATA = """
import os
from grpo.records import Problem
from grpo.tasks import Task

class OtherData(Task):
    def load(self, split):
        odd = os.environ["RANK"] == "2"
        return [Problem(id=str(i), question=f"{i}?", answer=str(i + odd)) for i in range(6)]
"""


def test_a_rank_that_has_other_training_problems_is_named(workplace):
    (workplace / "other.py").write_text(OTHER_DATA)
    options = f"--config {ROOT}/configs/demo.yaml --task other.py:OtherData --model.path ./model --run-dir other"
    processes = trainee.start(workplace, [*options.split(), "--rollout.prompts-per-step=3", "--track"], ranks=3)
    assert trainee.wait(processes, at_most_s=60) == 2
    assert "error: rank 2 has training problems=" in (workplace / "output.txt").read_text()


def test_gsm8k_from_local_files_with_a_local_model_takes_the_real_path(workplace):
    """configs/gsm8k.yaml on CPU: 8-shot prompts, a byte-level tokenizer, three steps of a model that knows nothing."""
    write_gsm8k_files(workplace / "data")
    options = ["--config", str(ROOT / "configs" / "gsm8k.yaml"), "--model.path", "model", "--data.path", "data"]
    options += ["--rollout.prompts-per-step=2", "--rollout.group-size=2", "--rollout.max-new-tokens=8"]
    options += ["--num-steps=3", "--run-dir", "gsm8k"]
    options += ["--eval.every=2", "--eval.validation-problems=2", "--eval.test-problems=2"]
    assert train.main(options) == 0
    rows = read_metrics(workplace / "gsm8k")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["grad_norm"] == row["grad_norm"] for row in rows)
    prompt = json.loads((workplace / "gsm8k" / "completions" / "step_1.jsonl").read_text().splitlines()[0])["prompt"]
    assert prompt.count("#### The final answer is ") == 9 and prompt.endswith(
        "Answer:"
    )  # instruction and eight exemplars


def refusal(capsys, arguments):
    """Exit status and the last line on standard error."""
    try:
        status = train.main(arguments)
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lrr", "1"], "unknown option --optim.lrr; the nearest is --optim.lr"),
        (["--config", "nowhere.yaml"], "cannot read config nowhere.yaml"),
        (["--task", "gsm9k"], "unknown task 'gsm9k'; the nearest is gsm8k"),
        (["--task", "keywords"], "task keywords without model.path: the embedded model knows word_problems only"),
        pytest.param(
            ["--task", "code"],
            "task code without model.path: the embedded model knows word_problems only",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the task itself is refused"),
        ),
        (["--preset", "grop"], "unknown preset 'grop'; the nearest is grpo"),
        (["--rollout.group-size", "1"], "rollout.group_size=1"),
        (["--batch.minibatches", "3"], "not divisible by batch.minibatches=3"),
        (["--model.path", "./nowhere"], "model path './nowhere' is not a folder"),
        (
            ["--model.path", "whole"],
            "model.path='whole' is a run folder; name one of its checkpoints: whole/checkpoints",
        ),
        (["--task", "gsm8k", "--data.path", "nowhere/", "--model.path", "model"], "nowhere"),
        (["--resume", "nowhere"], "no config.yaml there"),
        (
            ["--data.curriculum", "drop_solved"],
            "data.curriculum=drop_solved: the training split of this task is endless",
        ),
        (["--rollout.max-new-tokens", "600"], "exceed the model's context of 512"),
    ],
)
def test_a_mistake_is_one_clear_line_and_status_2(finished, capsys, arguments, message):
    start = [] if {"--config", "--resume"} & set(arguments) else [*DEMO, "--run-dir", "refused"]
    status, error = refusal(capsys, [*start, *arguments, "--seed", "3"])
    shutil.rmtree("refused", ignore_errors=True)
    assert status == 2
    assert message in error and "Traceback" not in error


def test_kernels_that_cannot_run_here_are_refused_by_a_dry_run_too(capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    status, error = refusal(capsys, [*DEMO, "--impl", "triton", "--dry-run"])
    assert status == 2 and "Triton kernels need a CUDA device, not cpu; use impl=auto" in error


def test_a_run_that_goes_on_cannot_change_what_its_checkpoint_depends_on(finished, capsys):
    status, error = refusal(capsys, ["--resume", str(finished), "--seed", "4"])
    assert status == 2 and "cannot change seed: 3 -> 4" in error


@pytest.mark.parametrize(
    "settings, compiled",
    [
        ({}, True),
        ({"deterministic": True}, False),
        ({"model": {"gradient_checkpointing": True}}, False),
        ({"distributed": {"strategy": "fsdp"}}, False),
        ({"model": {"compile": False}}, False),
        ({"model": {"compile": True}, "deterministic": True}, True),
    ],
)
def test_what_depends_on_the_device_is_settled_before_a_run(settings, compiled, monkeypatch):
    monkeypatch.setattr(run, "missing_to_launch", lambda: None)
    worlds = {kind: World(0, 1, torch.device(kind)) for kind in ("cpu", "cuda")}
    resolved = {kind: run.resolve_config(from_dict(settings), world)[0] for kind, world in worlds.items()}
    assert resolved["cuda"].model.compile == compiled
    assert resolved["cpu"].model.compile == settings.get("model", {}).get("compile", False)
    assert [resolved[kind].batch.tokens_per_micro_batch for kind in ("cuda", "cpu")] == [16384, 4096]
    asked = from_dict(settings | {"batch": {"tokens_per_micro_batch": 7}})
    assert run.resolve_config(asked, World(0, 1, torch.device("cpu")))[0].batch.tokens_per_micro_batch == 7
    monkeypatch.setattr(run, "old_capability", lambda device: "7.5")
    old = run.resolve_config(from_dict(settings), World(0, 1, torch.device("cuda")))[0]
    assert old.model.compile == settings.get("model", {}).get("compile", False)
    monkeypatch.setattr(run, "old_capability", lambda device: None)
    monkeypatch.setattr(run, "missing_to_launch", lambda: "there is no C compiler")
    without = run.resolve_config(from_dict(settings), World(0, 1, torch.device("cuda")))[0]
    assert without.model.compile == settings.get("model", {}).get("compile", False)


def test_a_run_that_cannot_go_on_keeps_its_config(finished, workplace, capsys):
    kept = shutil.copytree(finished, Path("kept"))
    before = (kept / "config.yaml").read_text()
    status, error = refusal(capsys, ["--resume", "kept", "--num-steps", "3"])
    assert status == 2 and "num_steps=3: kept/checkpoints/step_4 was saved after more steps; use 4 or more" in error
    assert (kept / "config.yaml").read_text() == before


def test_paths_of_ones_own_files_are_settled_whole(tmp_path, monkeypatch):
    reward = "\ndef two(completions, **columns):\n    return [0.0 for _ in completions]\n"
    surrogate = "def one(logprobs, old, advantages):\n    return advantages * logprobs\n"
    (tmp_path / "own.py").write_text(surrogate + reward)
    monkeypatch.chdir(tmp_path)
    match = "grpo.rewards.matching:exact_match"
    own = {"rewards": {"functions": ["own.py:two", match]}, "objective": {"surrogate": "own.py:one"}}
    resolved, objective = run.resolve_config(from_dict(own), World(0, 1, torch.device("cpu")))
    whole = f"{tmp_path}/own.py:one"  # a run may go on from another folder, where own.py is another file
    assert resolved.rewards.functions == (f"{tmp_path}/own.py:two", match)
    assert resolved.objective.surrogate == objective.surrogate == whole and resolved.task == "word_problems"


def test_a_used_run_folder_is_refused_with_the_way_to_go_on(finished, capsys):
    status, error = refusal(capsys, [*DEMO, "--run-dir", str(finished)])
    assert status == 2 and f"continue it with --resume {finished}" in error


def test_dry_run_prints_the_batch_and_the_memory_and_makes_nothing(workplace, capsys):
    assert train.main([*DEMO, "--run-dir", "dry", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "4 prompts x 4 = 16 completions" in printed and "memory per rank" in printed
    assert not Path("dry").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "gsm8k"], "task gsm8k without model.path: the embedded model knows word_problems only"),
        (
            ["--task", "gsm8k", "--model.path", "model", "--data.path", "/nope"],
            "data.path='/nope' does not exist; give a",
        ),
        (
            ["--data.curriculum", "drop_solved"],
            "data.curriculum=drop_solved: the training split of this task is endless",
        ),
        (["--rewards.functions", "grpo.rewards.matching:regex_format"], "argument: 'pattern'; declare it as function("),
        (["--model.path", "runs/nope"], "error: model 'runs/nope': there is no such folder here, and the hub has no"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(workplace, capsys, arguments, message):
    status, error = refusal(capsys, [*DEMO, *arguments, "--dry-run"])
    assert status == 2 and message in error and "\n" not in error
