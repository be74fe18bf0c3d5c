"""One training step by hand: what is drawn, what becomes of the rewards, which tokens weigh how much; and the loop."""

from __future__ import annotations

from contextlib import closing, nullcontext
from types import SimpleNamespace

import pytest
import torch

import train
from grpo.config import from_dict
from grpo.distributed import World
from grpo.evaluation import CORRECTNESS
from grpo.live import Progress
from grpo.metrics import PhaseTimer
from grpo.objectives import resolve
from grpo.records import Completion, Group, Problem, Scores
from grpo.rewards import Reward, score_groups
from grpo.tasks.stream import ProblemStream
from tests.ranks import Ranks

SETTINGS = {
    "seed": 5,
    "num_steps": 8,
    "rollout": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 10},
    "batch": {"layout": "padded"},
    "optim": {"lr": 1.0, "warmup": 0.5},
}


class Rank(World):
    """One of `ranks`, which are threads."""

    ranks = Ranks(1)

    def gather(self, item):
        return self.ranks.gather(self.rank, item)

    def _reduce(self, values, op):
        of_all_ranks = torch.stack(self.gather(values.double()))
        return of_all_ranks.sum(0) if op == torch.distributed.ReduceOp.SUM else of_all_ranks.amax(0)

    def barrier(self, share=1.0):
        self.gather(None)


def run_of(objective, world=None, **settings) -> SimpleNamespace:
    """What train.py asks of a run, without a model."""
    config = from_dict(SETTINGS | settings)
    follow = lambda policy, mix: run.said.append(mix)
    run = SimpleNamespace(
        config=config,
        world=world or Rank(0, 1, torch.device("cpu")),
        said=[],
        first_step=1,
        module=None,
        reference=None,
        layout="padded",
        policy=SimpleNamespace(weights_loaded=nullcontext),
        moving_reference=SimpleNamespace(follow=follow) if objective.ref_refresh_every else None,
        updater=SimpleNamespace(objective=objective, token_budget=1000),
    )
    run.log = SimpleNamespace(say=run.said.append, progress=None, timer=PhaseTimer(Progress(False)))
    return run


def group_of(index: int, rewards, lengths=(2, 2), finish=("eos", "eos")) -> Group:
    """Completions that say what they are worth."""
    completions = [
        Completion([3] * length, [-1.0] * length, str(reward), end, sample)
        for sample, (reward, length, end) in enumerate(zip(rewards, lengths, finish, strict=True))
    ]
    return Group(Problem(str(index), "", "", index=index, prompt_ids=(2,)), completions, 1)


def worth(completions, **columns):
    return [float(text) for text in completions]


def score(groups) -> Scores:
    return score_groups(groups, {CORRECTNESS: Reward(worth, 1.0)}, require_finish=False)


# What is drawn --------------------------------------------------------------------------------------------------------

REWARDS = [(1, 0), (1, 1), (0, 0), (0, 1), (1, 0), (0, 0)]  # by place in the stream; those of 0, 3 and 4 have spread


@pytest.mark.parametrize(
    ("preset", "max_draws", "drawn", "used"),
    [("dapo", 3, 4, [0, 3]), ("dapo", 2, 4, [0, 3]), ("dapo", 1, 2, [0, 1]), ("dr_grpo", 3, 2, [0, 1])],
)
def test_a_step_draws_until_it_is_full_of_groups_that_teach_and_goes_on_with_those(
    preset, max_draws, drawn, used, monkeypatch
):
    run = run_of(resolve(preset, max_draws=max_draws, overlong_share=0.0))
    run.stream = ProblemStream([Problem(str(i), str(i), "") for i in range(6)], seed=0)
    run.prompter = SimpleNamespace(ask=list)
    run.sampler = SimpleNamespace(
        generate=lambda problems, step: [group_of(p.index, REWARDS[p.index]) for p in problems]
    )
    run.score, learnt = score, []
    monkeypatch.setattr(train, "learn", lambda run, step, *of_groups: learnt.append(of_groups) or (None, {"loss": 0.5}))
    monkeypatch.setattr(train, "log_completions", lambda *arguments: None)
    row = train.train_step(run, 1)
    ((groups, scores),) = learnt
    assert [group.index for group in groups] == used
    assert scores.total.tolist() == [list(REWARDS[i]) for i in used]
    means = [sum(REWARDS[i]) / 2 for i in range(drawn)]
    assert (row["reward"], row["tokens"], row["loss"]) == (sum(means) / drawn, 4 * drawn, 0.5)
    assert (row["zero_spread_groups"], row["groups_dropped"]) == (0.5, 1 - 2 / drawn)
    assert run.log.timer.recent.keys() == {"rollout", "score", "update"}
    seen = run.stream.rates[~run.stream.rates.isnan()]
    assert sorted(seen.tolist()) == sorted(means)


def test_a_step_of_which_too_much_goes_unscored_ends_the_run():
    run = run_of(resolve("dr_grpo"), rewards={"max_unscored": 0.4})
    run.stream = ProblemStream([Problem("0", "", "")], seed=0)
    run.prompter, run.score = SimpleNamespace(ask=list), score
    run.sampler = SimpleNamespace(generate=lambda problems, step: [group_of(p.index, (1, "none")) for p in problems])
    with pytest.raises(ValueError, match="more than rewards.max_unscored=0.4"):
        train.draw(run, 1)


# What is learnt from it -----------------------------------------------------------------------------------------------


def learn(monkeypatch, objective, groups, fill=None, *, ranks=1, step=2, **settings):
    """By rank what `learn` gives and says; and of every token that it learns from its advantage and weight."""
    of_all_ranks, seen, how = score(groups), {}, []

    def update(updater, batch, **options):
        how.append(options | {"batch": batch})
        mine = groups[updater.rank :: ranks]
        for micro_batch in batch.micro_batches:
            tokens = micro_batch.tokens
            for row, (g, s) in enumerate(micro_batch.sequences):
                of_row = tokens.sequence == row
                values = (tokens.advantage[of_row].tolist(), tokens.weight[of_row].tolist())
                seen[mine[g].index, s] = tuple(map(pytest.approx, values))
        return {"loss": 0.5}

    def fill_frozen(updater, batch, policy, reference):
        for micro_batch in batch.micro_batches if fill else ():
            fill(micro_batch.tokens)

    monkeypatch.setattr(train, "update_policy", update)
    monkeypatch.setattr(train, "fill_frozen", fill_frozen)
    monkeypatch.setattr(train, "check_first_batch", lambda *arguments: "checked")
    monkeypatch.setattr(Rank, "ranks", Ranks(ranks))

    def work(rank):
        run = run_of(objective, Rank(rank, ranks, torch.device("cpu")), **settings)
        run.updater.rank = rank
        advantages, metrics = train.learn(run, step, groups[rank::ranks], of_all_ranks)
        return SimpleNamespace(run=run, advantages=advantages, metrics=metrics)

    return Rank.ranks.run(work), seen, how


def kl_of_a_nat_a_token(tokens):
    tokens.old, tokens.ref = torch.zeros(len(tokens.target)), -torch.ones(len(tokens.target))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("options", "fill", "rewards"),
    [
        ({}, None, [0.0, 1.0]),
        ({"overlong_share": 0.2}, None, [-1.0, 0.5]),  # 10 of 10 tokens: -1; 9 of 10: -0.5
        ({"beta": 0.25, "kl_estimator": "k1", "kl_where": "reward"}, kl_of_a_nat_a_token, [-2.5, 1 - 2.25]),
        (
            {"beta": 0.25, "kl_estimator": "k1", "kl_where": "reward", "overlong_share": 0.2},
            kl_of_a_nat_a_token,
            [-3.5, 0.5 - 2.25],
        ),
    ],
)
def test_advantages_are_of_rewards_less_the_penalty_and_the_kl(options, fill, rewards, ranks, monkeypatch):
    groups = [group_of(0, (0, 1), (10, 9)), group_of(1, (1, 0), (9, 10))]
    by_rank, seen, _ = learn(monkeypatch, resolve("dr_grpo", **options), groups, fill, ranks=ranks)
    half = (rewards[1] - rewards[0]) / 2
    assert all(found.advantages.flatten().tolist() == pytest.approx([-half, half, half, -half]) for found in by_rank)
    weight = 1 / (4 * 10)  # constant: four completions of at most ten tokens
    for place, length, advantage in (((0, 0), 10, -half), ((0, 1), 9, half), ((1, 0), 9, half), ((1, 1), 10, -half)):
        assert seen[place] == ([advantage] * length, [weight] * length)
    found = by_rank[0].metrics
    assert found.get("overlong_penalty") == (-0.75 if "overlong_share" in options else None)


def fill_by_hand(tokens):
    tokens.old = tokens.sampler + torch.tensor([0.5, 3.0, 1.0, 1.0, 1.0, 1.0]).log()
    tokens.entropy = torch.tensor([4.0, 3.0, 2.0, 1.0, 9.0, 9.0])


EVEN = [1 / 4, 1 / 4]


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({}, EVEN, EVEN),
        ({"aggregation": "constant"}, [1 / 20, 1 / 20], [1 / 20, 1 / 20]),  # two completions of at most 10 tokens
        ({"mask_truncated": True}, [1 / 2, 1 / 2], [0, 0]),
        ({"entropy_share": 0.5}, EVEN, [0, 0]),
        ({"mismatch": "token_truncate", "mismatch_cap": 2.0}, [0.5 / 4, 2 / 4], EVEN),
        ({"mismatch": "sequence_truncate", "mismatch_level": "sum", "mismatch_cap": 1.25}, [1.25 / 4] * 2, EVEN),
        ({"mismatch": "sequence_truncate", "mismatch_level": "mean", "mismatch_cap": 1.25}, [1.5**0.5 / 4] * 2, EVEN),
    ],
)
def test_every_choice_of_weights_reaches_the_tokens(options, first, second, monkeypatch):
    """Of two completions, of which the second was cut off; a third could not be scored."""
    objective = resolve("dr_grpo", **{"aggregation": "token_mean", **options})
    group = group_of(0, (1, 0, "none"), (2, 2, 2), ("eos", "length", "eos"))
    _, seen, _ = learn(monkeypatch, objective, [group], fill_by_hand)
    assert [seen[0, s][1] for s in range(3)] == [first, second, [0, 0]]


@pytest.mark.parametrize(("preset", "kept"), [("dr_grpo", {0, 3}), ("grpo", {0, 1, 2, 3})])
def test_groups_without_spread_are_left_out_where_nothing_else_acts_on_them(preset, kept, monkeypatch):
    groups = [group_of(i, REWARDS[i]) for i in range(4)]
    _, seen, _ = learn(monkeypatch, resolve(preset), groups, ranks=2)
    assert {index for index, _ in seen} == kept


def test_a_step_has_the_rate_the_passes_and_the_budget_that_are_due_and_dropout_of_its_own(monkeypatch):
    groups, seeds = [group_of(0, (1, 0)), group_of(1, (0, 1))], []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    batch = SETTINGS["batch"] | {"passes": 3, "tokens_per_micro_batch": 1}  # the updater knows better
    for step, rate in ((2, 0.5), (4, 1.0)):
        by_rank, _, how = learn(monkeypatch, resolve("dr_grpo"), groups, ranks=2, step=step, batch=batch)
        assert [(options["step"], options["lr"], options["batch"].passes) for options in how] == 2 * [(step, rate, 3)]
        assert [len(options["batch"].micro_batches) for options in how] == [1, 1]
        assert all(found.metrics == {"loss": 0.5, "lr": rate} for found in by_rank)
    assert len(set(seeds)) == len(seeds) == 4


def test_the_first_batch_of_a_process_is_checked_and_the_reference_moves_when_it_is_due(monkeypatch):
    objective = resolve("grpo", ref_refresh_every=3, ref_mix=0.25)
    groups = [group_of(0, (1, 0))]
    said = [learn(monkeypatch, objective, groups, step=step)[0][0].run.said for step in range(1, 5)]
    assert said == [["checked"], [], [0.25], []]


# The loop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stopped_at", "validated", "saved"),
    [(None, [2, 4, 5], [2, 3, 5]), (4, [2, 4], [2, 3, 4])],
)
def test_steps_are_validated_and_saved_when_it_is_due_best_last_or_time_to_stop(
    stopped_at, validated, saved, monkeypatch
):
    """Validation every 2 of 5 steps, of which the first is the best; a checkpoint every 3."""
    run = run_of(resolve("grpo"), eval={"every": 2}, num_steps=5, save_every=3)
    run.best, run.writer, rows, found = None, SimpleNamespace(wait=lambda: None), [], {"validated": [], "saved": []}
    run.log.log, run.log.run_dir = rows.append, "here"
    run.world = SimpleNamespace(run_on_writer=lambda name, work: work())

    def validate(run, step):
        found["validated"].append(step)
        run.best = run.best or (0.5, step)
        return {"validation/accuracy": 0.5}

    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(train, "save_checkpoint", lambda run, step: found["saved"].append(step))
    monkeypatch.setattr(train, "train_step", lambda run, step: {"reward": float(step)})
    stop = SimpleNamespace(status=lambda: 143 if len(rows) == stopped_at else 0)
    assert train.train(run, stop) == (143 if stopped_at else 0)
    assert found == {"validated": validated, "saved": saved}
    assert [row["step"] for row in rows] == [*range(1, (stopped_at or 5) + 1)]
    assert ["validation/accuracy" in row for row in rows] == [row["step"] in validated for row in rows]
    assert ["seconds/evaluation" in row for row in rows] == [row["step"] in validated for row in rows]
    assert "checkpoint" in run.log.timer.totals
    assert run.said == (["\nstopped after step 4; resume with: python train.py --resume here"] if stopped_at else [])


@pytest.mark.parametrize("status", [0, 143])
@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_run_begins_with_a_test_or_its_checkpoint_and_ends_with_its_result_unless_it_was_stopped(
    is_resumed, status, monkeypatch
):
    calls = []

    def note(name, result=None):
        monkeypatch.setattr(train, name, lambda *arguments: calls.append(name) or result)

    ends = lambda name: SimpleNamespace(close=lambda: calls.append(f"end of {name}"))
    run = SimpleNamespace(pool=closing(ends("pool")), log=ends("log"))
    world = SimpleNamespace(is_writer=False, naming_missing_ranks=lambda: closing(ends("naming")))
    for name in ("describe", "load_checkpoint", "before_training", "finish"):
        note(name)
    note("resolve_config", (from_dict(SETTINGS), None))
    note("open_run", ("here", "checkpoint" if is_resumed else None))
    note("Run", run)
    note("train", status)
    command = train.Command(from_dict(SETTINGS), None, "", None, None, False)
    assert train.run_command(command, world) == status
    begins = ["load_checkpoint", "describe"] if is_resumed else ["describe", "before_training"]
    ends = [*([] if status else ["finish"]), "end of naming", "end of log", "end of pool"]
    assert calls == ["resolve_config", "open_run", "Run", *begins, "train", *ends]


def test_stopped_at_once_a_run_leaves_the_other_ranks_and_gives_its_status(monkeypatch, capsys):
    calls = []
    for name in ("make_deterministic", "start", "stop"):
        monkeypatch.setattr(train.distributed, name, lambda *given, name=name: calls.append((name, *given)))

    def interrupted(command, world):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run_command", interrupted)
    assert train.main(["--deterministic", "--distributed.timeout-s=7"]) == 130
    assert calls == [("make_deterministic",), ("start", 7.0), ("stop",)]  # cuBLAS reads its setting once
    assert "stopped immediately; --resume continues from the last checkpoint" in capsys.readouterr().err
