"""Intervals, pass@k and maj@k against hand-worked numbers and enumeration; eval.py as a user calls it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as eval_command
from grpo import checkpoint
from grpo import run as run_room
from grpo.config import Config, DataConfig, RewardsConfig, RolloutConfig, from_dict
from grpo.distributed import World
from grpo.evaluation import (
    CORRECTNESS,
    Evaluation,
    evaluate,
    majority_accuracy,
    paired_difference,
    pass_at_k,
    result_table,
    wilson_interval,
)
from grpo.records import Completion, Group, Problem
from grpo.rewards import Reward, correctness_reward, format_reward, score_groups
from grpo.rollout import EVALUATION
from grpo.tasks import TASKS
from tests.tiny import save_tiny_model, write_gsm8k_files

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
REWARDS = {"format": Reward(format_reward, 0.5), "correctness": Reward(correctness_reward, 1.0)}


def scored_by(rewards):
    return partial(score_groups, rewards=rewards, require_finish=True)


def group_of(answers, reference="5", index=0):
    """A group whose samples end in these answers; None writes no final line."""
    texts = ["no idea" if answer is None else f"so\n#### The final answer is {answer}" for answer in answers]
    completions = [Completion([3, 4], [-1.0, -1.0], text, "eos", i) for i, text in enumerate(texts)]
    return Group(Problem(id=str(index), question="?", answer=reference, index=index), completions, step=0)


class Scripted:
    """A sampler that answers from a script."""

    def __init__(self, script):
        self.script = script

    def generate(self, problems, step):
        return [group_of(self.script[problem.index], problem.answer, problem.index) for problem in problems]


def test_wilson_interval_is_where_the_score_test_just_rejects():
    # The bounds are the p with (x - n p)^2 = z^2 n p (1 - p): 41 of 100 gives 0.3187 and 0.5080.
    low, high = wilson_interval(41, 100)
    assert (round(low, 4), round(high, 4)) == (0.3187, 0.5080)
    for bound in (low, high):
        assert (41 - 100 * bound) ** 2 == pytest.approx(1.959964**2 * 100 * bound * (1 - bound))
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 1 and wilson_interval(0, 0) == (0, 1)


@pytest.mark.parametrize(("samples", "correct"), [(6, 0), (6, 2), (6, 5), (6, 6), (1, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(samples, correct):
    outcomes = [i < correct for i in range(samples)]
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_without_any_final_answer_there_is_no_majority_in_summary_or_table():
    correct = torch.tensor([[True, False]])
    summary = Evaluation([group_of([None, None])], correct, {CORRECTNESS: 0.5}, 0.5, 3.0, 0.0, 0.0).summary()
    assert summary["maj_at_k"] == {} and summary["pass_at_k"]["2"] == 1.0
    assert "pass@2" in result_table({"code": summary}) and "maj" not in result_table({"code": summary})


def test_majority_ignores_completions_without_an_answer_and_takes_the_first_of_equals():
    groups = [group_of([None, "4", "5", "5"]), group_of(["4", "5", "5", "4"]), group_of([None, None, None, None])]
    correct = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert majority_accuracy(groups, correct, 4) == pytest.approx(1 / 3)  # 5 wins; 4 and 5 tie, 4 was first; no vote
    assert majority_accuracy(groups, correct, 1) == 0


def test_forms_of_one_number_vote_together():
    group = group_of(["4", "5", "$5.00", "005 apples.", "4"])
    assert majority_accuracy([group], torch.tensor([[False, True, True, True, False]]), 5) == 1


@pytest.mark.parametrize("cut_off", [0, 1, 2])
def test_a_completion_that_was_cut_off_votes_but_does_not_make_a_right_answer_wrong(cut_off):
    correct = torch.tensor([[sample != cut_off for sample in range(3)]])
    assert majority_accuracy([group_of(["5", "5", "5"])], correct, 3) == 1


def test_evaluate_counts_accuracy_format_and_length():
    sampler = Scripted({0: ["5", "6"], 1: [None, "5"], 2: ["5", "5"]})
    problems = [Problem(id=str(i), question="?", answer="5", index=i) for i in range(3)]
    summary = evaluate(sampler, problems, scored_by(REWARDS), world=ALONE).summary()
    assert summary["accuracy"] == pytest.approx(4 / 6)
    assert summary["pass_at_k"] == {"1": pytest.approx(4 / 6), "2": 1.0}
    assert summary["maj_at_k"]["2"] == 1.0  # of 5 and 6 the first wins; the only vote is right; both right
    assert summary["reward/format"] == pytest.approx(5 / 6)
    assert summary["reward"] == pytest.approx((5 * 0.5 + 4) / 6)
    assert summary["completion_length"] == 2 and summary["truncated"] == summary["unscored"] == 0
    assert "unscored" not in result_table({"model": summary})


def test_length_and_truncation_are_means_over_completions():
    group = group_of(["5", "5", "5"])
    group.completions.append(Completion([3] * 8, [-1.0] * 8, "so", "length", 3))
    sampler = SimpleNamespace(generate=lambda problems, step: [group])
    result = evaluate(sampler, [group.problem], scored_by(REWARDS), world=ALONE)
    assert (result.truncated, result.completion_length) == (1 / 4, (3 * 2 + 8) / 4)


def test_a_component_that_abstains_has_its_mean_over_what_it_judged():
    def on_fives(completions, **columns):
        return [1.0 if "5" in text else None for text in completions]

    rewards = REWARDS | {"fives": Reward(on_fives, 0.0), "never": Reward(lambda texts, **_: [None] * len(texts), 0.0)}
    sampler, problems = Scripted({0: ["5", "6", "5", "7"]}), [Problem(id="0", question="?", answer="5")]
    summary = evaluate(sampler, problems, scored_by(rewards), world=ALONE).summary()
    assert (summary["reward/fives"], summary["reward/never"], summary["accuracy"]) == (1.0, None, 0.5)
    header, row = result_table({"model": summary}).splitlines()
    end = header.index("never") + len("never")
    assert row[end - len("never") : end] == " " * len("never")


def test_validation_leaves_out_a_component_that_judged_nothing(monkeypatch):
    components = {CORRECTNESS: 1.0, "format": 0.5, "never": None}
    result = Evaluation([group_of(["5"])], torch.ones(1, 1, dtype=torch.bool), components, 1.5, 2.0, 0.0, 0.0)
    monkeypatch.setattr(run_room, "evaluate_greedily", lambda *arguments, **options: result)
    row = run_room.validate(SimpleNamespace(config=Config(), best=None), 0)
    assert row == {"validation/accuracy": 1.0, "validation/format": 0.5}


def test_completions_whose_reward_fails_count_as_wrong_and_are_told():
    def picky(completions, **columns):
        return [1.0 if "5" in text else 1 / 0 for text in completions]

    sampler, problems = Scripted({0: ["5", "6", "5", "7"]}), [Problem(id="0", question="?", answer="5")]
    result = evaluate(sampler, problems, scored_by({CORRECTNESS: Reward(picky, 1.0)}), world=ALONE)
    assert (result.accuracy, result.unscored) == (0.5, 0.5)
    assert str(result).endswith("; 50.0% could not be scored and count as wrong")
    assert result_table({"model": result.summary()}).split()[4] == "unscored"


def test_a_terminal_gets_the_columns_of_the_table_that_fit():
    sampler, problems = Scripted({0: ["5"]}), [Problem(id="0", question="?", answer="5")]
    summary = evaluate(sampler, problems, scored_by(REWARDS), world=ALONE).summary()
    whole = result_table({"model": summary}).splitlines()
    for width in range(len(whole[0]) + 2):
        shown = result_table({"model": summary}, width).splitlines()
        assert all(line.startswith(part) for line, part in zip(whole, shown, strict=True))
        assert len(shown[0]) <= max(width, len("model  accuracy"))
    assert shown == whole


def test_a_right_answer_is_right_where_another_component_fails():
    def unlucky(completions, **columns):
        return [1 / 0 for _ in completions]

    sampler, problems = Scripted({0: ["5", "5", "5", "7"]}), [Problem(id="0", question="?", answer="5")]
    rewards = REWARDS | {"unlucky": Reward(unlucky, 1.0)}
    result = evaluate(sampler, problems, scored_by(rewards), world=ALONE)
    assert (result.accuracy, result.unscored, result.components["unlucky"]) == (0.75, 0, None)


def test_two_results_on_the_same_problems_are_compared_problem_by_problem():
    summary = lambda *correct, samples=1: {"correct": list(correct), "samples": samples}
    # Two of four problems solved by the one alone: (2 + 1/2 - 1/2) / 6, variance (3 - 2^2 / 6) / 6^2.
    difference, (low, high) = paired_difference(summary(1, 1, 0, 1), summary(0, 1, 0, 0))
    half = 1.959964 * math.sqrt((3 - 4 / 6) / 36)
    assert difference == 0.5 and (low, high) == pytest.approx((1 / 3 - half, 1 / 3 + half))
    assert paired_difference(summary(2, 2, 0, 2, samples=2), summary(0, 1, 0, 0)) == (difference, (low, high))
    same, (low, high) = paired_difference(summary(1, 0, 1), summary(1, 0, 1))
    assert same == 0 and low == -high < 0  # three problems do not show that the models are equal


def test_the_interval_of_a_difference_covers_it_in_95_of_100_trials():
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(2000, 60, generator=generator)  # both models find the same problems hard
    one, other = (torch.rand(hard.shape, generator=generator) < p * (1 - hard) for p in (1.0, 0.7))
    truth, covered = 0.3 * 0.5, 0
    for a, b in zip(one.int().tolist(), other.int().tolist(), strict=True):
        low, high = paired_difference({"correct": a, "samples": 1}, {"correct": b, "samples": 1})[1]
        covered += low <= truth <= high
    assert 0.94 < covered / len(hard) < 0.97


def test_accuracy_is_the_share_itself_as_the_json_shows_it():
    correct = torch.arange(200)[:, None] < 33
    summary = Evaluation([group_of(["5"])] * 200, correct, {CORRECTNESS: 0.165}, 0.165, 2.0, 0.0, 0.0).summary()
    assert summary["accuracy"] == 0.165


def test_pass_at_k_covers_powers_of_two_and_the_number_of_samples():
    correct = torch.ones(1, 40, dtype=torch.bool)
    result = Evaluation([group_of(["5"] * 40)], correct, {"format": 1.0}, 1.5, 2.0, 0.0, 0.0)
    assert list(result.summary()["pass_at_k"]) == ["1", "2", "4", "8", "16", "32", "40"]
    assert not any(math.isnan(value) for value in result.summary()["interval"])


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    save_tiny_model(folder / "model", context=2048)
    write_gsm8k_files(folder / "data")
    return folder


def evaluate_on_command(folder, *more):
    output = folder / "result.json"
    arguments = ["--model", f"{folder}/model", "--task", "gsm8k", "--data.path", f"{folder}/data"]
    arguments += ["--max-new-tokens", "6", "--limit", "3", "--output", str(output), *more]
    return eval_command.main(arguments), output


def test_eval_writes_table_json_and_chart_by_model_and_shots(model_and_data, capsys):
    again = ["--model", str(model_and_data / "model") + "/"]
    status, output = evaluate_on_command(model_and_data, "--shots", "0", "1", *again)
    assert status == 0 and output.with_suffix(".png").stat().st_size > 1000
    models = json.loads(output.read_text())["models"]
    first, second = models.values()
    assert list(first) == ["0", "1"] and first == second  # the same model twice: the same numbers
    assert first["0"]["problems"] == 3 and first["0"]["samples"] == 1
    shown = capsys.readouterr().out
    assert shown.count(", 1 shot ") == 2 and shown.count(", 0 shots ") == 2
    assert "1 shot: " in shown and "+0.0 points of accuracy on the same 3 problems" in shown


def test_every_further_model_is_compared_with_the_first_at_the_same_shots(model_and_data, monkeypatch, capsys):
    summary = lambda *correct: Evaluation(
        [group_of(["5"])] * 2, torch.tensor(correct, dtype=torch.bool)[:, None], {}, 1.5, 2.0, 0.0, 0.0
    ).summary()
    results = {"first": {0: summary(1, 1), 2: summary(0, 0)}, "other": {0: summary(0, 0), 2: summary(0, 1)}}
    by_name = lambda name, *arguments: results.get(name, results["first"])
    monkeypatch.setattr(eval_command, "evaluate_model", by_name)
    monkeypatch.setattr(eval_command, "draw_chart", lambda results, path: None)
    assert evaluate_on_command(model_and_data, "--model", "other")[0] == 0
    said = " ".join(capsys.readouterr().out.split())
    first = model_and_data / "model"
    for shots, points in ((0, "-100.0"), (2, "+50.0")):
        assert f"{shots} shots: other minus {first}: {points} points" in said


def test_what_the_first_model_reached_is_kept_where_the_second_fails(model_and_data, capsys):
    status, output = evaluate_on_command(model_and_data, "--shots", "0", "--model", "./nowhere")
    assert status == 2 and "model path './nowhere' is not a folder" in capsys.readouterr().err
    assert list(json.loads(output.read_text())["models"]) == [str(model_and_data / "model")]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("models", "shots"), [(1, 1), (2, 4), (5, 2)])
def test_the_chart_has_room_for_the_names_of_its_models(models, shots, tmp_path):
    entry = {"accuracy": 1.0, "interval": (0.9, 1.0), "problems": 1319}
    names = [f"/somewhere/far/away/runs/gsm8k_instruct-20261125-051500/checkpoints/step_{i}" for i in range(models)]
    eval_command.draw_chart({name: dict.fromkeys(range(shots), entry) for name in names}, tmp_path / "chart.png")


def test_the_bars_of_the_chart_are_accuracies_with_their_intervals(monkeypatch, tmp_path):
    from matplotlib.axes import Axes

    drawn, bar = [], Axes.bar
    note = lambda self, *places, **how: drawn.append((*places[:2], how["yerr"])) or bar(self, *places, **how)
    monkeypatch.setattr(Axes, "bar", note)
    summary = lambda accuracy, *interval: {"accuracy": accuracy, "interval": interval, "problems": 7}
    eval_command.draw_chart({"model": {0: summary(0.5, 0.2, 0.9), 8: summary(0.75, 0.5, 0.8)}}, tmp_path / "chart.png")
    ((places, heights, (below, above)),) = drawn
    assert (places, heights) == ([0, 1], [0.5, 0.75])
    assert (below, above) == (pytest.approx([0.3, 0.25]), pytest.approx([0.4, 0.05]))


def test_all_shots_are_asked_the_same_problems_each_under_its_number_by_a_sampler_as_asked_for(
    model_and_data, monkeypatch
):
    seen, result = [], Evaluation([group_of(["5"])], torch.ones(1, 1, dtype=torch.bool), {}, 1.5, 2.0, 0.0, 0.0)
    note = lambda sampler, questions, score, world: seen.append((sampler, questions, score)) or result
    fitting = lambda self, problems, *, drop, say: [p for p in problems if drop and p.index != self.prompt.shots]
    monkeypatch.setattr(eval_command, "evaluate", note)
    monkeypatch.setattr(eval_command.Prompter, "fitting", fitting)  # as if that one were too long
    options = ["--shots", "0", "2", "--samples=3", "--seed=9", "--impl=torch", "--split=train", "--limit=4"]
    for settings, indices in (((), [0, 1, 2, 3]), (("--data.drop-overlong",), [1, 3])):
        seen.clear()
        status, output = evaluate_on_command(model_and_data, *options, *settings)
        assert status == 0
        for (sampler, questions, score), shots in zip(seen, (0, 2), strict=True):
            assert [question.index for question in questions] == indices
            assert all(question.id.startswith("train/") for question in questions)
            assert all(question.prompt.count("Question:") == shots + 1 for question in questions)
            assert (sampler.seed, sampler.stream, sampler.impl) == (9, EVALUATION, "torch")
            assert sampler.rollout.group_size == 3 and "\n\nQuestion:" in sampler.ending.stop
            assert score.keywords["require_finish"] is True
    record = json.loads(output.read_text())
    assert {name: record[name] for name in ("task", "split", "max_new_tokens", "temperature", "top_k")} == {
        **{"task": "gsm8k", "split": "train", "max_new_tokens": 6},
        **{"temperature": 1.0, "top_k": 0},
    }


def test_eval_takes_the_first_problems_of_an_endless_split(model_and_data):
    endless = ["--task", "word_problems", "--split", "train", "--shots", "0"]
    status, output = evaluate_on_command(model_and_data, *endless)
    (result,) = json.loads(output.read_text())["models"].values()
    assert status == 0 and result["0"]["problems"] == 3


def test_eval_with_samples_repeats_itself_and_depends_on_the_seed(model_and_data):
    results = []
    for seed in ("1", "1", "2"):
        status, output = evaluate_on_command(model_and_data, "--shots", "0", "--samples", "4", "--seed", seed)
        assert status == 0
        results.append(json.loads(output.read_text())["models"][f"{model_and_data}/model"]["0"])
    assert results[0] == results[1]
    assert set(results[0]["pass_at_k"]) == {"1", "2", "4"}


def test_eval_truncates_as_asked(model_and_data):
    lengths = []
    for options in ((), ("--samples", "4", "--min-p", "1"), ("--samples", "4", "--top-k", "1"), ("--samples", "4")):
        status, output = evaluate_on_command(model_and_data, "--shots", "0", *options)
        assert status == 0
        record = json.loads(output.read_text())
        assert record["min_p"] == float("--min-p" in options)
        lengths.append(record["models"][f"{model_and_data}/model"]["0"]["completion_length"])
    assert lengths[0] == lengths[1] == lengths[2] != lengths[3]  # all but the most likely token cut off: greedy


def test_eval_scores_a_file_of_completions_and_loads_nothing(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    lines = [
        {"completion": "2+3=5\n#### The final answer is 5", "answer": "5", "id": 7},
        {"completion": "5", "answer": "5"},
        {"completion": "#### The final answer is 5", "answer": "5", "finish_reason": "length"},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out.jsonl"
    assert eval_command.main(["--completions", str(source), "--task", "gsm8k", "--output", str(output)]) == 0
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["reward"] for line in scored] == [1.5, 0.0, 0.0]
    assert scored[0]["rewards"] == {"format": 1.0, "correctness": 1.0} and scored[0]["id"] == 7
    assert "1: format 1.0  correctness 1.0  reward 1.5  ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either --model"),
        (["--model", "m", "--samples", "4", "--temperature", "0"], "all would be equal"),
        (["--model", "./nowhere", "--task", "gsm8k", "--top-p", "1.5"], "rollout.top_p=1.5 is outside (0, 1]"),
        (["--model", "./nowhere", "--task", "gsm9k"], "unknown task 'gsm9k'"),
        (["--model", "./nowhere"], "--task is missing"),
        (["--model", "runs/nope"], "would name it (there is no folder runs/nope); pass --task gsm8k"),
        (
            ["--model", "runs/nope", "--task", "word_problems"],
            "error: model 'runs/nope': there is no such folder here",
        ),
        (
            ["--model", "m", "--shotz", "4"],
            "error: unrecognized arguments: --shotz 4; eval.py --help shows all options",
        ),
        (["--completions", "f.jsonl", "--task", "gsm8k"], "--completions needs --task and --output"),
        (["--model", "m", "--shots", "4", "-1"], "--shots -1 must be 0 or more"),
        (["--model", "./nowhere", "--task", "word_problems", "--split", "train"], "is endless; say how much of it"),
        (["--model", "m", "--task", "jsonl", "--prompt.template-options", "a=1"], "prompt.style=plain: use chat"),
        (["--model", "./nowhere", "--task", "word_problems", "--output", "."], "--output . is a folder"),
        (["--model", "./nowhere", "--task", "word_problems", "--output", "a.png"], "or the chart's own name"),
        (["--model", "./nowhere", "--task", "word_problems", "--output", "a" * 300], "File name too long: 'aaa"),
        pytest.param(
            ["--model", "./nowhere", "--task", "word_problems", "--output", "/proc/a.json"],
            "directory: '/proc/a.json'",
            marks=pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no /proc, where nobody may write"),
        ),
    ],
)
def test_eval_says_what_is_wrong(arguments, message, capsys):
    try:
        status = eval_command.main(arguments)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1


def test_the_help_names_every_task_and_whose_config_holds(capsys):
    with pytest.raises(SystemExit):
        eval_command.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"--task TASK {', '.join(TASKS)} or file.py:ClassName;" in shown
    assert "All models use the config (style, shots, length) of the first run folder" in shown


def test_a_run_folder_stands_for_its_best_checkpoint_and_brings_its_task(tmp_path):
    run = tmp_path / "run"
    for step in (2, 4):
        checkpoint.save(run, step, lambda folder, state: None, {}, keep_last=2, best=None)
    (run / "config.yaml").write_text("task: word_problems\nprompt: {shots: 0}\n")
    assert eval_command.resolve_model(str(run))[0] == str(run / "checkpoints" / "step_4")
    (run / "checkpoints" / "best.json").write_text('{"step": 2, "accuracy": 0.5}')
    path, config = eval_command.resolve_model(str(run))
    assert path == str(run / "checkpoints" / "step_2") and config.task == "word_problems"
    assert eval_command.resolve_model(str(Path(path)))[1].prompt.shots == 0  # a checkpoint folder knows its run, too


def test_another_task_than_the_runs_has_rewards_of_its_own(tmp_path):
    checkpoint.save(tmp_path, 2, lambda folder, state: None, {}, keep_last=1, best=None)
    rewards = {"weights": ["parses=0.3"], "format_weight": 0, "correctness_weight": 0, "timeout_s": 9.0}
    (tmp_path / "config.yaml").write_text(json.dumps({"task": "code", "rewards": rewards}))
    settings = lambda *more: eval_command.settings_of(eval_command.parse(["--model", str(tmp_path), *more]))[1]
    assert settings().rewards.weights == ("parses=0.3",)
    assert settings("--task", "gsm8k").rewards == RewardsConfig(timeout_s=9.0)


def test_every_option_has_its_place_in_the_config_and_leaves_all_else_to_the_run(tmp_path):
    checkpoint.save(tmp_path, 2, lambda folder, state: None, {}, keep_last=1, best=None)
    of_run = {"model": {"precision": "bf16"}, "prompt": {"style": "chat", "template_options": ["a=1"], "shots": 2}}
    of_run |= {"rollout": {"max_new_tokens": 9, "temperature": 0.7}, "rewards": {"require_finish": False}}
    (tmp_path / "config.yaml").write_text(json.dumps({"task": "gsm8k", **of_run}))
    parsed = lambda *more: eval_command.settings_of(eval_command.parse(["--model", str(tmp_path), *more]))[1]
    run = from_dict({"task": "gsm8k", **of_run})
    greedy = replace(run.rollout, group_size=1, temperature=0.0)
    assert parsed() == replace(run, rollout=greedy)
    many = parsed("--samples", "600").rollout
    assert many == replace(greedy, group_size=600, max_sequences=600, temperature=1.0)
    options = "--samples 3 --temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 --max-new-tokens 7 --max-sequences 8"
    options += " --precision fp32 --prompt.style chat --prompt.template-options b=2 --data.path there"
    drawn = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1}
    assert parsed(*options.split(), "--data.drop-overlong", "--data.answer-column", "reply") == replace(
        run,
        rollout=RolloutConfig(group_size=3, max_new_tokens=7, max_sequences=8, **drawn),
        model=replace(run.model, precision="fp32"),
        prompt=replace(run.prompt, template_options=("b=2",)),
        data=DataConfig(path="there", drop_overlong=True, answer_column="reply"),
    )


def test_the_problems_are_those_of_the_run_but_for_what_the_command_line_says(tmp_path):
    checkpoint.save(tmp_path, 2, lambda folder, state: None, {}, keep_last=1, best=None)
    data = {"path": "owner/name", "subset": "main", "prompt_column": "question"}
    (tmp_path / "config.yaml").write_text(json.dumps({"task": "jsonl", "data": data}))
    settings = lambda *more: eval_command.settings_of(eval_command.parse(["--model", str(tmp_path), *more]))[1].data
    assert settings() == DataConfig(**data)
    told = settings("--data.subset", "hard", "--data.prompt-column", "query")
    assert (told.path, told.subset, told.prompt_column) == ("owner/name", "hard", "query")
