"""What a run is made of has the settings that were asked for; what it remembers as best; what it says at its end."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from grpo import results
from grpo import run as run_room
from grpo.config import from_dict
from grpo.distributed import World
from grpo.evaluation import CORRECTNESS, Evaluation
from grpo.metrics import RunLogger
from grpo.records import Completion, Group, Problem
from grpo.rollout import EVALUATION, TRAINING
from grpo.run import Run, make_sampler, resolve_config, validate
from tests.tiny import save_tiny_model, write_gsm8k_files

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
ODD = {  # nothing as it is by default
    "task": "gsm8k",
    "seed": 7,
    "keep_last": 5,
    "impl": "torch",
    "track": [],
    "data": {"curriculum": "target_rate", "target_rate": 0.25},
    "prompt": {"shots": 0},
    "rewards": {"require_finish": False, "workers": 3, "timeout_s": 2.0, "step_timeout_s": 50.0},
    "rollout": {"temperature": 0.5, "group_size": 2, "max_new_tokens": 9, "prompts_per_step": 2},
    "batch": {"layout": "padded", "tokens_per_micro_batch": 77},
    "optim": {"lr": 0.25, "betas": [0.5, 0.75], "eps": 0.5, "weight_decay": 0.125},
    "objective": {"beta": 0.5, "entropy_bonus": 0.25, "ref_refresh_every": 3},
}
ODD["optim"] |= {"max_grad_norm": 0.75, "max_skipped_steps": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    save_tiny_model(place / "model", context=512)
    write_gsm8k_files(place / "data")
    return place


def built(folder, name, **changes) -> Run:
    """A run with odd settings but for `changes`."""
    where = {"model": {"path": f"{folder}/model"}, "data": ODD["data"] | {"path": f"{folder}/data"}}
    (folder / name).mkdir()
    return Run(*resolve_config(from_dict(ODD | where | changes), ALONE), ALONE, folder / name)


def test_every_part_of_a_run_has_the_settings_that_were_asked_for(folder):
    run = built(folder, "odd")
    updater, (adam,) = run.updater, run.updater.optimizer.param_groups
    assert (updater.max_grad_norm, updater.max_skipped_steps, updater.token_budget) == (0.75, 6, 77)
    assert (adam["betas"], adam["eps"], adam["weight_decay"]) == ((0.5, 0.75), 0.5, 0.125)
    assert run_room.stateful_parts(run).keys() == {"policy", "optimizer", "updater", "stream", "log", "reference"}
    assert run.layout == "padded" and updater.objective.beta == 0.5
    policy, reference = run.module.compute, run.reference
    assert [(model.temperature, model.impl) for model in (policy, reference)] == 2 * [(0.5, "torch")]
    assert policy.entropy_gradient and not reference.entropy_gradient
    assert reference.model is run.moving_reference.model is not policy.model
    assert (run.stream.seed, run.stream.target_rate, run.stream.curriculum.__name__) == (7, 0.25, "target_rate")
    assert (run.writer.keep_last, run.score.keywords["require_finish"]) == (5, False)
    assert (run.pool.size, run.pool.timeout_s, run.pool.step_timeout_s) == (3, 2.0, 50.0)
    stop = run.prompter.stop_strings
    greedy = make_sampler(run.config, policy.model, run.prompter, run.log, greedy=True)
    for sampler, stream in ((run.sampler, TRAINING), (greedy, EVALUATION)):
        assert (sampler.seed, sampler.stream, sampler.impl, sampler.ending.stop) == (7, stream, "torch", stop)
    assert stop and run.sampler.rollout == run.config.rollout
    assert greedy.rollout == replace(run.config.rollout, group_size=1, temperature=0.0)


def test_what_no_setting_asks_for_is_not_there(folder):
    run = built(folder, "plain", objective={"preset": "dr_grpo"}, distributed={"strategy": "fsdp"})
    assert not run.policy.is_sampler_only  # one rank has nobody to share with
    assert "reference" not in run_room.stateful_parts(run)
    assert run.reference is run.moving_reference is None and not run.module.compute.entropy_gradient


def test_what_saves_memory_is_done_and_the_reference_recomputes_nothing(folder):
    model = {"path": f"{folder}/model", "gradient_checkpointing": True, "reference_offload": True}
    run = built(folder, "saving", model=model, objective={"beta": 0.5})
    recomputes = lambda model: model.training and model.model.layers[0].gradient_checkpointing
    assert recomputes(run.policy.masters) and not recomputes(run.reference.model)
    assert run.reference._cpu_weights.keys() == set(run.reference.parameters())


def test_adapters_begin_as_the_seed_has_it(folder):
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = built(folder, name, seed=seed, lora={"rank": 2}, objective={"preset": "dr_grpo"})
        assert run.policy.masters.training, "else no layer is computed again where that is asked for"
        drawn.append(next(local for name, local in run.policy.local_parameters.items() if "lora_A" in name))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_split_is_evaluated_greedily_by_the_policy_or_another_model_each_problem_under_its_number(
    folder, monkeypatch
):
    run, seen = built(folder, "greedy"), []
    note = lambda sampler, problems, score, *, world, step: seen.append((sampler, problems, score, step))
    monkeypatch.setattr(run_room, "evaluate", note)
    run_room.evaluate_greedily(run, "test", 3, step=4)
    run_room.evaluate_greedily(run, "test", 3, model=run.reference.model)
    for (sampler, problems, score, step), model in zip(seen, (run.policy.model, run.reference.model), strict=True):
        assert sampler.model is model and sampler.rollout.temperature == 0 and score is run.score
        assert [problem.index for problem in problems] == [0, 1, 2] and problems[0].prompt_ids
        assert problems[0].question == run.task.split("test")[0].question and step == (
            4 if sampler is seen[0][0] else 0
        )


def test_the_embedded_base_is_of_the_runs_seed_and_kept_in_the_cache(monkeypatch, tmp_path):
    asked = []
    make = lambda base, task, **options: asked.append((base, task, options)) or tmp_path
    monkeypatch.setattr(run_room.base, "prepare_base", make)
    monkeypatch.setattr(run_room.base, "describe", str)
    log, config = RunLogger(tmp_path, is_writer=True, track=(), config={}), from_dict({"seed": 7})
    assert run_room.prepare_base(config, "task", ALONE, log) == tmp_path
    options = {"seed": 7, "device": "cpu", "cache_dir": run_room.BASE_CACHE, "progress": log.progress}
    assert asked == [(config.base, "task", options)]


@pytest.mark.parametrize(("rank", "size", "found"), [(0, 1, "a"), (1, 2, "b"), (3, 4, "b")])
def test_a_run_goes_on_over_any_number_of_ranks_each_with_what_one_had(rank, size, found, tmp_path, monkeypatch):
    by_rank = [{"sampler": f"sampler {name}", "random": f"random {name}"} for name in "ab"]
    state = {"step": 4, "best": (0.5, 2), "before": "before", "by_rank": by_rank}
    loaded, said, checkpoint = [], [], run_room.checkpoint
    monkeypatch.setattr(run_room, "stateful_parts", lambda run: {})
    monkeypatch.setattr(checkpoint, "load_state", lambda folder: state)
    monkeypatch.setattr(checkpoint, "set_random_state", loaded.append)
    monkeypatch.setattr(checkpoint, "restore_best", lambda run_dir, best, say: best)
    world = SimpleNamespace(rank=rank, size=size, run_on_writer=lambda name, work: work())
    run = SimpleNamespace(config=from_dict({"num_steps": 4}), world=world)
    run.log = SimpleNamespace(run_dir=tmp_path, say=said.append)
    run.sampler = SimpleNamespace(load_state_dict=loaded.append)
    run.updater = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{}]))
    run_room.load_checkpoint(run, tmp_path)
    assert loaded == [f"sampler {found}", f"random {found}"]
    assert (run.first_step, run.best, run.before) == (5, (0.5, 2), "before")
    assert any(" ranks instead of 2" in text for text in said) == (size != 2)


def evaluation(*correct: int, unscored: float = 0.0) -> Evaluation:
    """Of a problem each, 1 where it is solved."""
    groups = [
        Group(Problem(str(i), f"{i}?", str(i), index=i), [Completion([3], [-1.0], f" so {i} ", "eos", 0)], 0)
        for i in range(len(correct))
    ]
    right = torch.tensor(correct, dtype=torch.bool)[:, None]
    return Evaluation(groups, right, {CORRECTNESS: right.float().mean().item()}, 0.5, 1.0, 0.0, unscored)


def test_the_best_step_is_the_last_of_those_that_validate_best_and_never_the_untrained_model(monkeypatch):
    found = {0: (1, 1), 2: (0, 0), 4: (1, 0), 6: (0, 1), 8: (0, 0)}
    asked = []

    def evaluate(run, split, limit, *, step):
        asked.append((split, limit))
        return evaluation(*found[step], unscored=0.25 if step == 8 else 0.0)

    monkeypatch.setattr(run_room, "evaluate_greedily", evaluate)
    run, best, rows = SimpleNamespace(config=from_dict({"eval": {"validation_problems": 2}}), best=None), [], []
    for step in found:
        rows.append(validate(run, step))
        best.append(run.best)
    assert best == [None, (0.0, 2), (0.5, 4), (0.5, 6), (0.5, 6)] and asked == 5 * [("validation", 2)]
    assert [row["validation/accuracy"] for row in rows] == [1.0, 0.0, 0.5, 0.5, 0.0]
    assert [row.get("validation/unscored") for row in rows] == [None] * 4 + [0.25]


@pytest.mark.parametrize("habit_steps", [0, 3])
@pytest.mark.parametrize("best", [None, (0.5, 2)])
def test_the_result_is_of_the_best_checkpoint_beside_what_supervised_training_makes(
    best, habit_steps, tmp_path, monkeypatch, capsys
):
    """The untrained model solves the first of two problems, the last the second, the best both, the rival none."""
    settings = {
        "eval": {"test_problems": 2, "every": 5},
        "base": {"habit_steps": habit_steps},
        "num_steps": 9,
        "seed": 3,
    }
    weights, loaded, spent, drawn = ["before"], [], [], []

    def evaluate(run, split, limit, *, model=None):
        assert (split, limit) == ("test", 2)
        return evaluation(*{"before": (1, 0), "last": (0, 1), "best": (1, 1), "rival": (0, 0)}[model or weights[-1]])

    def load(path, **options):
        loaded.append(path)
        return SimpleNamespace(model="rival")

    def go_on(folder, base, task, *, seconds, seed, **options):
        spent.append((folder, task, seconds, seed))
        return "rival", [(0.0, 0.25)]

    monkeypatch.setattr(results, "evaluate_greedily", evaluate)
    monkeypatch.setattr(results, "validate", lambda run, step: {"validation/accuracy": 0.75 + step})
    monkeypatch.setattr(results.checkpoint, "best", lambda run_dir: run_dir / "best")
    monkeypatch.setattr(results.checkpoint, "load_state", lambda folder: {"policy": folder.name})
    monkeypatch.setattr(results, "load_policy", load)
    monkeypatch.setattr(results.base, "continue_supervised", go_on)
    run = SimpleNamespace(
        config=from_dict(settings), world=ALONE, best=best, base_folder=tmp_path / "base", task="task"
    )
    run.log = RunLogger(tmp_path, is_writer=True, track=(), config={})
    run.log.draw_curves = lambda **more: drawn.append(more)
    run.policy = SimpleNamespace(load_state_dict=weights.append)
    results.before_training(run)
    assert run.before["validation"] == 0.75 and not run.log.timer.recent  # its seconds are of no training step
    weights.append("last")
    run.log.timer.totals |= {"rollout": 1.0, "score": 2.0, "update": 4.0, "evaluation": 90.0}
    results.finish(run)
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = {key: summary[key] for key in summary if key.startswith("accuracy") or key == "best_step"}
    after, step = (1.0, 2) if best else (0.5, 9)
    assert found == {"accuracy_before": 0.5, "accuracy_after": after, "accuracy_supervised": 0.0, "best_step": step}
    assert loaded == ([str(tmp_path / "base" / "before_habit")] if habit_steps else [])
    assert spent == ([] if habit_steps else [(tmp_path / "base", "task", 7.0, 3)])
    curve = [] if habit_steps else [(0.0, 0.25)]
    assert drawn == [{"start_accuracy": 0.75, "supervised": curve}]
    assert summary["supervised_curve"] == [*map(list, curve)]
    assert summary["samples"]["after"][1] == {"question": "1?", "answer": "1", "completion": " so 1 "}
    assert summary["seconds"]["evaluation"] > 90 and ("supervised" in summary["seconds"]) == (not habit_steps)
    said = capsys.readouterr().out
    assert f"{after - 0.5:+.1%}".rstrip("%") in said and "on the same 2 problems" in said
    rows = ("before", "after", "before the habit" if habit_steps else "supervised instead")
    assert all(f"\n{row}  " in said for row in rows)
