"""The gradient of one optimizer step: against a loop over single sequences, and the same for any split of the work."""

from __future__ import annotations

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch

from grpo import update
from grpo.advantages import normalise
from grpo.batch import LAYOUTS, kl_per_completion, pack, padded_rows, weigh
from grpo.config import OptimConfig
from grpo.distributed import World
from grpo.logprobs import LogprobModel, PolicyModule, frozen_logprobs
from grpo.objectives import resolve, token_loss
from grpo.policy import Policy
from grpo.records import Batch, Completion, Group, Problem, Scores, TokenColumns, merge_scores
from grpo.sharding import distribute, whole_of
from grpo.update import (
    NonFiniteLoss,
    Updater,
    first_bad_sequence,
    learning_rate,
    make_optimizer,
    summarise,
    token_statistics,
    update_policy,
)
from tests.ranks import run_ranks
from tests.test_update_faults import Trainee
from tests.tiny import made_up_groups, tiny_qwen2, use_fp64_rms_norm, word_tokenizer

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
NUM_GROUPS, GROUP_SIZE, MAX_NEW_TOKENS = 8, 4, 12
OBJECTIVES = {
    "grpo": resolve("grpo", beta=0.3),
    "dr_grpo": resolve("dr_grpo"),
    "token_mean": resolve("grpo", aggregation="token_mean", clip_high=0.28),
    "gspo": resolve("gspo"),
    "entropy_bonus": resolve("grpo", beta=0.3, entropy_bonus=0.5),
    "gspo, entropy_bonus": resolve("gspo", entropy_bonus=0.5),
}
ON_RANKS = OBJECTIVES | {
    "kl_in_reward": resolve("grpo", beta=0.3, kl_estimator="k1", kl_where="reward"),
    "per_reward": resolve("dr_grpo", advantages="per_reward"),
}


def advantages_and_scored():
    """[P, G] of both signs; one group without spread, one completion unscored."""
    advantages = torch.randn(NUM_GROUPS, GROUP_SIZE, generator=torch.Generator().manual_seed(3))
    scored = torch.ones(NUM_GROUPS, GROUP_SIZE, dtype=torch.bool)
    advantages[2] = 0.0
    advantages[5, 1], scored[5, 1] = 0.0, False
    return advantages, scored


def gathered(world, objective, batch, rewards, scored):
    """Advantages that need what other ranks know; where they do not, `rewards` stand for them."""
    if objective.kl_in_reward:
        kl = kl_per_completion(batch)
        kl = torch.stack(world.gather_interleaved(list(kl)))
        return normalise(objective.advantages, rewards - objective.beta * kl, scored)
    if objective.advantages == "per_reward":
        components = torch.stack([rewards, rewards.flip(0)], -1)
        shares = {"components": components, "total": rewards, "scored": scored, "lengths": rewards, "truncated": scored}
        shares = {name: world.local_share(column) for name, column in shares.items()}
        status = [[["ok"] * 2] * GROUP_SIZE] * len(shares["total"])
        scores = merge_scores(world.gather(Scores(("a", "b"), (1.0, 2.0), status=status, **shares)))
        options = {"components": scores.components, "weights": scores.weights}
        return normalise("per_reward", scores.total, scores.scored, **options)
    return rewards


def one_update(
    world,
    dtype,
    objective_name,
    budget,
    minibatches=1,
    passes=1,
    layout="packed",
    adapt=lambda model: model,
    strategy="ddp",
    observe=None,
    lr=1e-3,
):
    """Gradients of the last optimizer step, weights after the update, and its metrics, on this rank."""
    if dtype == torch.float64:
        use_fp64_rms_norm()
    objective = ON_RANKS[objective_name]
    is_bf16 = dtype == torch.bfloat16  # of the working copy
    policy = Policy(
        adapt(tiny_qwen2()).to(torch.float32 if is_bf16 else dtype), word_tokenizer(), "bf16" if is_bf16 else "fp32"
    )
    if strategy == "fsdp" and world.size > 1:
        policy.sample_from_copy()
    options = {"temperature": 0.9, "impl": "torch"}
    module = PolicyModule(policy, **options, entropy_gradient=objective.entropy_bonus > 0)
    wrapped = distribute(module, [policy], world, strategy)
    reference = LogprobModel(tiny_qwen2(seed=1).to(dtype), **options) if objective.beta else None
    advantages, scored = advantages_and_scored()
    skipped = None if objective.needs_zero_advantage_groups else world.local_share((advantages == 0).all(1)).tolist()
    batch = pack(
        world.local_share(made_up_groups(NUM_GROUPS, GROUP_SIZE)),
        minibatches=minibatches,
        passes=passes,
        tokens_per_micro_batch=budget,
        max_over_ranks=world.max,
        device=world.device,
        layout=layout,
        skipped=skipped,
    )
    frozen_logprobs(batch, module, reference, always_policy=objective.needs_frozen_pass)
    advantages = gathered(world, objective, batch, advantages, scored)
    weigh(
        batch,
        advantages[world.rank :: world.size],
        scored[world.rank :: world.size],
        aggregation=objective.aggregation,
        max_new_tokens=MAX_NEW_TOKENS,
        sum_over_ranks=world.sum,
    )
    kept = list(policy.local_parameters.values())
    optimizer = make_optimizer(policy.trained, OptimConfig(lr=0.0), local_parameters=kept)
    updater = Updater(wrapped, optimizer, objective, world, max_grad_norm=math.inf, refresh=policy.refresh)
    metrics = update_policy(updater, batch, step=7, lr=lr if minibatches * passes > 1 else 0.0)
    whole_gradients = (whole_of(parameter.grad).clone() for parameter in policy.trained)
    gradients = dict(zip(policy.local_parameters, whole_gradients, strict=True))
    weights = {name: whole_of(local.detach()).clone() for name, local in policy.local_parameters.items()}
    if observe is not None:
        observe(policy, optimizer)
    return gradients, weights, metrics


def distance(a, b):
    """||a - b|| / ||b|| over all parameters."""
    flat = lambda tensors: torch.cat([tensor.flatten().double() for tensor in tensors.values()])
    return ((flat(a) - flat(b)).norm() / flat(b).norm()).item()


@functools.cache
def loop_gradient(objective_name):
    """The same gradient from one plain forward per sequence and scalar arithmetic, in fp64."""
    use_fp64_rms_norm()
    objective = OBJECTIVES[objective_name]
    model, reference = tiny_qwen2().double(), tiny_qwen2(seed=1).double()
    advantages, scored = advantages_and_scored()
    groups = made_up_groups(NUM_GROUPS, GROUP_SIZE)
    num_sequences = int(scored.sum())
    num_tokens = sum(
        len(c.ids) for g, group in enumerate(groups) for s, c in enumerate(group.completions) if scored[g, s]
    )
    total = torch.zeros((), dtype=torch.float64)
    for g, group in enumerate(groups):
        for s, completion in enumerate(group.completions):
            if not scored[g, s]:
                continue
            length = len(completion.ids)
            ids = torch.tensor([[*group.prompt_ids, *completion.ids]])
            weight = {
                "sequence_mean": 1 / (num_sequences * length),
                "token_mean": 1 / num_tokens,
                "constant": 1 / (num_sequences * MAX_NEW_TOKENS),
            }[objective.aggregation]
            log_softmax = (model(ids).logits / 0.9).log_softmax(-1)[0]
            entropy = -(log_softmax.exp() * log_softmax).sum(-1)
            with torch.no_grad():
                reference_log_softmax = (reference(ids).logits / 0.9).log_softmax(-1)[0]
            for t, token in enumerate(completion.ids):
                row = len(group.prompt_ids) - 1 + t
                lp, ref = log_softmax[row, token], reference_log_softmax[row, token]
                kl = torch.exp(ref - lp) - (ref - lp) - 1
                surrogate = torch.exp(lp - lp.detach()) * float(advantages[g, s])
                total = total + weight * (-surrogate + objective.beta * kl - objective.entropy_bonus * entropy[row])
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, total.item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 40, 10_000], ids=lambda budget: f"budget{budget}")
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_gradient_and_loss_equal_the_loop_for_any_micro_batch(objective, budget, layout):
    expected, loss = loop_gradient(objective)
    gradients, _, metrics = one_update(ALONE, torch.float64, objective, budget, layout=layout)
    assert distance(gradients, expected) < 1e-6  # weights and advantages are fp32 in the batch, fp64 in the loop
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-7)
    assert distance(gradients, one_update(ALONE, torch.float64, objective, 10_000)[0]) < 1e-10


def ranks_worker(world, *arguments):
    gradients, weights, metrics = one_update(world, *arguments)
    return [{name: tensor.numpy() for name, tensor in tensors.items()} for tensors in (gradients, weights)], metrics


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_are_the_same_on_one_rank_and_on_several(world_size):
    """Also with many micro-batches (unequally many before dummies) and with several optimizer steps per rollout."""
    cases = [
        (torch.float64, "grpo", 10_000, 1, 1, "packed", 1e-10),
        (torch.float64, "token_mean", 30, 1, 1, "packed", 1e-10),
        (torch.float64, "token_mean", 30, 1, 1, "padded", 1e-10),
        (torch.float32, "dr_grpo", 30, 1, 1, "packed", 5e-6),
        (torch.float32, "grpo", 60, 1, 1, "padded", 5e-6),
        (torch.float64, "grpo", 60, 2, 2, "packed", 1e-10),
        (torch.float64, "grpo", 60, 2, 2, "padded", 1e-10),
        (torch.float64, "gspo", 60, 2, 2, "packed", 1e-10),
        (torch.float64, "entropy_bonus", 30, 1, 1, "packed", 1e-10),
        (torch.float64, "gspo, entropy_bonus", 60, 2, 2, "packed", 1e-10),
        (torch.float64, "kl_in_reward", 30, 1, 1, "packed", 1e-10),
        (torch.float64, "per_reward", 30, 1, 1, "packed", 1e-10),
    ]
    results = run_ranks(world_size, all_cases, [case[:-1] for case in cases])
    for case, *by_rank in zip(cases, *results, strict=True):
        *arguments, _, limit = case
        gradients, weights, metrics = one_update(ALONE, *arguments, layout="padded")  # whichever the ranks had
        for (rank_gradients, rank_weights), rank_metrics in by_rank:
            as_tensors = lambda arrays: {name: torch.from_numpy(array) for name, array in arrays.items()}
            assert distance(as_tensors(rank_gradients), gradients) < limit
            assert distance(as_tensors(rank_weights), weights) < limit
            assert rank_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)


def all_cases(world, cases):
    # fp32 first: the patch that keeps RMSNorm in fp64 does not change fp32 results
    return [ranks_worker(world, *case) for case in cases]


def test_two_passes_move_the_weights_further_and_clip_against_the_first():
    _, once, _ = one_update(ALONE, torch.float32, "grpo", 10_000, minibatches=2, passes=1)
    _, twice, metrics = one_update(ALONE, torch.float32, "grpo", 10_000, minibatches=2, passes=2)
    assert distance(twice, once) > 1e-4
    assert metrics["ratio_max"] > 1.0


@pytest.mark.parametrize(("allowed", "found"), [(math.inf, None), (0.01, 0.01)])
def test_a_longer_gradient_than_is_allowed_is_shortened_and_the_length_that_it_had_is_reported(allowed, found):
    trainee, norms = Trainee(), []
    trainee.updater.max_grad_norm = allowed
    norm_of = lambda: torch.stack([parameter.grad.norm() for parameter in trainee.policy.trained]).norm().item()
    trainee.updater.optimizer.register_step_pre_hook(lambda *_: norms.append(norm_of()))
    metrics = trainee.update()
    assert len(norms) == 4 and metrics["grad_norm"] > 0.1
    assert sum(norms) / 4 == pytest.approx(found or metrics["grad_norm"], rel=1e-3)


def test_the_metrics_of_an_update_are_sums_and_maxima_over_its_steps(monkeypatch):
    made = iter([{"loss": 1.0, "ratio_max": 4.0}, {"loss": 2.0, "ratio_max": 3.0}] * 2)
    monkeypatch.setattr(update, "optimizer_step", lambda updater, batch, position, *, step: next(made))
    monkeypatch.setattr(update, "summarise", dict)
    updater = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{}]), module=None, world=ALONE)
    batch, done = Batch([["a", "b"], ["c"]], 2, [], None), []
    found = update_policy(updater, batch, step=1, lr=0.5, progress=lambda *how_far: done.append(how_far))
    assert found == {"loss": 6.0, "ratio_max": 4.0} and updater.optimizer.param_groups == [{"lr": 0.5}]
    assert done == [(2, 6), (3, 6), (5, 6), (6, 6)]


@pytest.mark.parametrize(
    "objective, is_counted", [(resolve("dr_grpo"), True), (resolve("dr_grpo", entropy_bonus=0.1), False)]
)
def test_a_step_that_cannot_teach_leaves_weights_and_momentum_alone(objective, is_counted):
    policy = Policy(tiny_qwen2(), word_tokenizer(), "fp32")
    gradient = {"entropy_gradient": objective.entropy_bonus > 0}
    module = PolicyModule(policy, temperature=1.0, impl="torch", **gradient)
    before = copy.deepcopy(policy.masters.state_dict())
    batch = pack(
        made_up_groups(2),
        minibatches=1,
        passes=1,
        tokens_per_micro_batch=10_000,
        max_over_ranks=ALONE.max,
        device=ALONE.device,
    )
    weigh(
        batch,
        torch.zeros(2, 4),
        torch.full((2, 4), is_counted),
        aggregation="constant",
        max_new_tokens=12,
        sum_over_ranks=ALONE.sum,
    )
    optimizer = make_optimizer(list(module.parameters()), OptimConfig(lr=1.0, weight_decay=0.1))
    update_policy(Updater(module, optimizer, objective, ALONE, 1.0, policy.refresh), batch, step=0, lr=1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.masters.state_dict().items())
    assert not optimizer.state


def test_statistics_of_tokens_are_sums_over_the_counted_by_hand():
    # By token: ratio 2, ratio 1/4, and one that does not count. The sampler's log-probs are 0.5 below the old ones.
    old, logprobs = torch.tensor([-3.0, -1.0, -9.0]), torch.tensor([-3 + math.log(2), -1 - math.log(4), -1.0])
    columns = {"old": old, "ref": old - 1, "sampler": old - 0.5, "advantage": torch.tensor([1.0, -1.0, 1.0])}
    counted, ids = torch.tensor([True, True, False]), torch.tensor([0, 1, 2])
    tokens = TokenColumns(target=ids, sequence=ids, counted=counted, active=counted, **columns)
    objective = resolve("grpo", beta=0.3)
    found = token_statistics(
        objective, SimpleNamespace(tokens=tokens), loss=torch.tensor(0.25), logprobs=logprobs, entropy=torch.ones(3)
    )
    towards_ref = [-1 - math.log(2), -1 + math.log(4)]
    assert {name: pytest.approx(value.item(), abs=1e-6) for name, value in found.items()} == {
        "loss": 0.25,
        "tokens": 2,
        "kl": sum(math.exp(d) - d - 1 for d in towards_ref),
        "entropy": 2,
        "clip_fraction_low": 1,
        "clip_fraction_high": 1,
        "approx_kl": (2 - 1 - math.log(2)) + (1 / 4 - 1 + math.log(4)),  # r - 1 - log r: drawn by the old policy
        "active": 2,
        "mismatch": 1,
        "mismatch_kl": 2 * (math.exp(0.5) - 1 - 0.5),
        "mismatch_outside": 2,
        "nonzero_advantage_tokens": 2,
        "ratio_max": 2,
        "mismatch_max": 0.5,
    }


def test_a_summary_is_means_over_tokens_but_for_loss_norm_and_maxima():
    totals = {"tokens": 10, "optimizer_steps": 2, "skipped_steps": 1, "entropy": 5.0, "active": 8}
    totals["nonzero_advantage_tokens"] = 4
    totals |= {"loss": 0.5, "grad_norm": 3.0, "ratio_max": 7.0}
    assert summarise(dict(totals)) == {
        "skipped_steps": 1,
        "entropy": 0.5,
        "active": 0.8,
        "loss": 0.25,
        "grad_norm": 1.5,
        "ratio_max": 7.0,
    }
    assert math.isnan(summarise(totals | {"tokens": 0})["entropy"])


def test_nan_stops_the_update_before_the_weights_move_and_names_step_and_sequence():
    policy = Policy(tiny_qwen2(), word_tokenizer(), "fp32")
    module = PolicyModule(policy, temperature=1.0, impl="torch")
    before = copy.deepcopy(policy.masters.state_dict())
    batch = pack(
        made_up_groups(3),
        minibatches=1,
        passes=1,
        tokens_per_micro_batch=30,
        max_over_ranks=ALONE.max,
        device=ALONE.device,
    )
    advantages = torch.zeros(3, 4)
    advantages[1, 2] = float("nan")
    weigh(
        batch,
        advantages,
        torch.ones(3, 4, dtype=torch.bool),
        aggregation="constant",
        max_new_tokens=12,
        sum_over_ranks=ALONE.sum,
    )
    optimizer = make_optimizer(list(module.parameters()), OptimConfig(lr=1.0))
    with pytest.raises(NonFiniteLoss, match=r"training step 42; the advantage of group 1, sample 2"):
        update_policy(
            Updater(module, optimizer, resolve("dr_grpo"), ALONE, 1.0, policy.refresh), batch, step=42, lr=1.0
        )
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.masters.state_dict().items())


def test_a_bad_sequence_is_named_by_the_place_of_its_group_among_those_of_all_ranks():
    pair = Completion([5, 6], [-1.0, -1.0], "", "eos", 0), Completion([7], [-1.0], "", "eos", 1)
    groups = [Group(Problem(str(i), "", "", prompt_ids=(3,)), list(pair), 0) for i in range(2)]
    rows = padded_rows(groups, [(0, 0), (0, 1), (1, 0), (1, 1)], ALONE.device)
    rows.tokens.counted, rows.tokens.advantage = torch.ones(6, dtype=torch.bool), torch.zeros(6)
    logprobs = torch.tensor([0, 0, 0, 0, 0, math.nan])  # the second completion of this rank's second group
    named = first_bad_sequence([(rows, logprobs)], World(rank=2, size=3, device=ALONE.device))
    assert named == "the log-prob of group 5, sample 1 of the step is not finite"


def test_learning_rate_warms_up_linearly_then_stays_or_falls_as_a_cosine():
    rate = lambda step, schedule: learning_rate(step, OptimConfig(lr=2.0, schedule=schedule, warmup=0.1), 40)
    assert [rate(step, "constant") for step in (1, 2, 4, 5, 40)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert rate(4, "cosine") == 2.0
    assert rate(22.5, "cosine") == pytest.approx(1.0)  # half way between the end of the warm-up (4) and 41
    assert 0 < rate(40, "cosine") < 0.01


def test_token_loss_without_old_equals_token_loss_with_old_at_the_current_policy():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0])
    gradients = [
        torch.autograd.grad(
            token_loss(resolve("dr_grpo"), logprobs, old=old, ref=None, advantages=advantages).sum(), logprobs
        )[0]
        for old in (None, logprobs.detach())
    ]
    assert torch.equal(*gradients)
