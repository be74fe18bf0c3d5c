"""Surrogates and KL estimators against hand-worked numbers, identities, loops and exact values on a tiny vocabulary."""

import math
from pathlib import Path

import pytest
import torch

from grpo import advantages as advantages_room
from grpo import batch as batch_room
from grpo import objectives
from grpo.objectives import check_steps, clipped_surrogate, find_surrogate, resolve, token_loss


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_clip_keeps_the_smaller_of_the_two_terms():
    # A 1: ratio 1.5 gives min(1.5, 1.2), ratio 0.5 min(0.5, 0.8);  A -1: min(-1.5, -1.2) and min(-0.5, -0.8)
    logprobs = vector(1.5, 0.5, 1.5, 0.5).log()
    surrogate = clipped_surrogate(logprobs, vector(0, 0, 0, 0), vector(1, 1, -1, -1), clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(surrogate, vector(1.2, 0.5, -1.5, -0.8))


def test_clip_higher_moves_only_the_upper_bound():
    logprobs = vector(1.5, 0.5).log()
    surrogate = clipped_surrogate(logprobs, vector(0, 0), vector(1, -1), clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(surrogate, vector(1.28, -0.8))


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
    logprobs = vector(-0.3, -1.0, -2.0).requires_grad_()
    advantages = vector(1.0, -2.0, 0.5)
    token_loss(resolve("dr_grpo"), logprobs, old=None, ref=None, advantages=advantages).sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_a_clipped_token_has_no_gradient():
    logprobs = vector(math.log(1.3), math.log(0.7)).requires_grad_()
    objective = resolve("dr_grpo")
    token_loss(objective, logprobs, old=vector(0, 0), ref=None, advantages=vector(1, -1)).sum().backward()
    assert torch.equal(logprobs.grad, vector(0, 0))
    low, high = objectives.clipped_low_and_high(objective, logprobs, vector(0, 0), vector(1, -1), torch.tensor([0, 1]))
    assert low.tolist() == [False, True] and high.tolist() == [True, False]


def test_dual_clip_stops_a_bad_token_that_became_ever_likelier():
    # A -1: ratio 5 is cut at the cap 3, ratio 2 is not;  A 1: ratio 5 is clipped at 1.2 as ever
    settings = {"clip_low": 0.2, "clip_high": 0.2, "ratio_cap": 3.0}
    logprobs = vector(5, 2, 5).log().requires_grad_()
    surrogate = objectives.dual_clipped_surrogate(logprobs, vector(0, 0, 0), vector(-1, -1, 1), **settings)
    torch.testing.assert_close(surrogate, vector(-3, -2, 1.2))
    surrogate.sum().backward()
    torch.testing.assert_close(logprobs.grad, vector(0, -2, 0))


def test_a_sequence_has_one_ratio_and_is_clipped_as_a_whole():
    # sequence 0: log-ratios 0.1 and 0.3, mean 0.2, ratio e^0.2 = 1.2214; A 2, clipped at 1.1: 2.2, no gradient
    # sequence 1: log-ratio -0.3, ratio 0.740818; A 1, not clipped: 0.740818, gradient 0.740818
    logprobs = vector(0.1, 0.3, -0.3).requires_grad_()
    settings = {"clip_low": 0.1, "clip_high": 0.1, "sequence": torch.tensor([0, 0, 1])}
    for surrogate in (objectives.sequence_surrogate, objectives.sequence_token_surrogate):
        values = surrogate(logprobs, vector(0, 0, 0), vector(2, 2, 1), **settings)
        torch.testing.assert_close(values, vector(2.2, 2.2, math.exp(-0.3)))
        torch.testing.assert_close(torch.autograd.grad(values.sum(), logprobs)[0], vector(0, 0, math.exp(-0.3)))


def test_sequence_and_sequence_token_have_one_gradient_under_sequence_mean():
    logprobs, old, _, _ = four_columns(seed=5, scale=0.1)
    logprobs.requires_grad_()
    advantages = vector(0.7, -1.3, 0.4, 2.0)[SEQUENCE]
    weights = 1 / SEQUENCE.bincount()[SEQUENCE]
    settings = {"clip_low": 0.05, "clip_high": 0.05, "sequence": SEQUENCE}
    gradients = [
        torch.autograd.grad((weights * surrogate(logprobs, old, advantages, **settings)).sum(), logprobs)[0]
        for surrogate in (objectives.sequence_surrogate, objectives.sequence_token_surrogate)
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0].count_nonzero() not in (0, len(logprobs))  # some sequences are clipped, some are not


def test_cispo_caps_the_weight_and_keeps_every_gradient():
    # cap 5: ratios 8, 2 and 0.5 weigh 5, 2 and 0.5; A 1, -1, 3
    logprobs = vector(8, 2, 0.5).log().requires_grad_()
    values = objectives.cispo_surrogate(logprobs, vector(0, 0, 0), vector(1, -1, 3), clip_high=4.0)
    values.sum().backward()
    torch.testing.assert_close(logprobs.grad, vector(5, -2, 1.5))


def test_sapo_at_ratio_one_is_two_over_tau_with_the_gradient_of_the_advantage():
    # sigmoid(0) = 1/2, so (4/tau)/2 = 2/tau: A 1 with tau 1 gives 2; A -1 with tau 2 gives -1; slope (4/tau) tau/4 = 1
    logprobs = vector(0, 0).requires_grad_()
    settings = {"tau_positive": 1.0, "tau_negative": 2.0}
    values = objectives.sapo_surrogate(logprobs, vector(0, 0), vector(1, -1), **settings)
    torch.testing.assert_close(values.detach(), vector(2, -1))
    values.sum().backward()
    torch.testing.assert_close(logprobs.grad, vector(1, -1))


def oracle(name, now, stopped, old, advantage, settings, mean_ratio):
    """The surrogate of one token in plain numbers, from its paper; `stopped` is where the gradient stops.

    mean_ratio: of its sequence, as a function of which log-probs (now or stopped) are averaged.
    """
    low, high = 1 - settings["clip_low"], 1 + settings["clip_high"]
    ratio = {"sequence": mean_ratio("now"), "sequence_token": mean_ratio("stopped") * math.exp(now - stopped)}.get(
        name, math.exp(now - old)
    )
    clipped = min(ratio * advantage, min(max(ratio, low), high) * advantage)
    tau = settings["tau_positive"] if advantage > 0 else settings["tau_negative"]
    return {
        "dual_clip": max(clipped, settings["ratio_cap"] * advantage) if advantage < 0 else clipped,
        "cispo": min(math.exp(stopped - old), high) * advantage * now,
        "sapo": 4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage,
        "reinforce": advantage * now,
    }.get(name, clipped)


def oracle_sum(name, now, stopped, old, advantages, settings):
    total = []
    for t, s in enumerate(SEQUENCE.tolist()):
        members = [u for u, other in enumerate(SEQUENCE.tolist()) if other == s]
        columns = {"now": now, "stopped": stopped}
        mean_ratio = lambda which: math.exp(sum(columns[which][u] - old[u] for u in members) / len(members))  # noqa: B023
        total.append(oracle(name, now[t], stopped[t], old[t], advantages[t], settings, mean_ratio))
    return total


SEQUENCE = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])
SETTINGS = {"clip_low": 0.2, "clip_high": 0.3, "ratio_cap": 1.6, "tau_positive": 1.0, "tau_negative": 1.4}


def four_columns(seed=0, scale=0.5, size=10):
    generator = torch.Generator().manual_seed(seed)
    old, change, ref, advantages = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(4))
    return old + scale * change, old, ref, advantages


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", list(objectives.SURROGATES))
def test_value_and_gradient_equal_a_loop_written_from_the_paper(name, seed):
    logprobs, old, _, advantages = four_columns(seed)
    logprobs.requires_grad_()
    row = objectives.find_surrogate(name)
    settings = {key: value for key, value in {**SETTINGS, "sequence": SEQUENCE}.items() if key in row.settings}
    values = row.function(logprobs, old, advantages, **settings)
    stopped, *columns = (column.tolist() for column in (logprobs, old, advantages))
    expected = oracle_sum(name, stopped, stopped, *columns, SETTINGS)
    torch.testing.assert_close(values.detach(), vector(*expected))
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    for t in range(len(stopped)):
        above, below = list(stopped), list(stopped)
        above[t], below[t] = stopped[t] + 1e-6, stopped[t] - 1e-6
        rise = sum(oracle_sum(name, above, stopped, *columns, SETTINGS))
        fall = sum(oracle_sum(name, below, stopped, *columns, SETTINGS))
        assert gradient[t].item() == pytest.approx((rise - fall) / 2e-6, rel=1e-5, abs=1e-7)


BOUNDS = {  # which of the two a surrogate has
    **dict.fromkeys(("clip", "dual_clip", "sequence", "sequence_token"), (True, True)),
    "cispo": (False, True),
    **dict.fromkeys(("sapo", "reinforce"), (False, False)),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", list(objectives.SURROGATES))
def test_clipped_tokens_are_those_of_a_loop(name, seed):
    logprobs, old, _, advantages = four_columns(seed)
    objective = resolve("grpo", surrogate=name, clip_low=0.2, clip_high=0.3, ratio_cap=1.6)
    difference, whole = (logprobs - old).tolist(), name.startswith("sequence")
    low, high = [], []
    for t, advantage in enumerate(advantages.tolist()):
        seen = [u for u in range(len(SEQUENCE)) if (SEQUENCE[u] == SEQUENCE[t] if whole else u == t)]
        ratio = math.exp(sum(difference[u] for u in seen) / len(seen))
        low.append(BOUNDS[name][0] and ratio < 0.8 and advantage < 0)
        high.append(BOUNDS[name][1] and ratio > 1.3 and advantage > 0)
    found = objectives.clipped_low_and_high(objective, logprobs, old, advantages, SEQUENCE)
    assert [mask.tolist() for mask in found] == [low, high]


def test_the_seeds_of_that_loop_meet_both_bounds():
    clip = resolve("grpo", clip_low=0.2, clip_high=0.3)
    columns = [four_columns(seed) for seed in (0, 1, 2)]
    masks = [objectives.clipped_low_and_high(clip, now, old, a, SEQUENCE) for now, old, _, a in columns]
    assert all(sum(mask.sum().item() for mask in side) >= 2 for side in zip(*masks, strict=True))


SMOOTH = [name for name in objectives.SURROGATES if name not in ("cispo", "sequence_token")]  # these two stop gradients


@pytest.mark.parametrize("name", SMOOTH)
def test_surrogates_pass_gradcheck(name):
    logprobs, old, _, advantages = four_columns(seed=1)
    row = objectives.find_surrogate(name)
    settings = {key: value for key, value in {**SETTINGS, "sequence": SEQUENCE}.items() if key in row.settings}
    assert torch.autograd.gradcheck(lambda x: row.function(x, old, advantages, **settings), logprobs.requires_grad_())


@pytest.mark.parametrize("preset", list(objectives.PRESETS))
def test_on_policy_every_preset_starts_with_the_gradient_of_reinforce(preset):
    logprobs, _, _, advantages = four_columns(seed=3)
    advantages = vector(0.7, -1.3, 0.4, 2.0)[SEQUENCE]
    logprobs.requires_grad_()
    objective = resolve(preset, beta=0.0)
    loss = token_loss(objective, logprobs, old=None, ref=None, advantages=advantages, sequence=SEQUENCE)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_token_loss_equals_a_loop_written_from_the_paper():
    logprobs, old, ref, advantages = four_columns(size=50)
    entropy = advantages.abs()
    objective = resolve("grpo", beta=0.3, entropy_bonus=0.1)
    loss = token_loss(objective, logprobs, old=old, ref=ref, advantages=advantages, entropy=entropy)
    for t in range(50):
        ratio = math.exp(logprobs[t] - old[t])
        surrogate = min(ratio * advantages[t], min(max(ratio, 0.8), 1.2) * advantages[t])
        kl = math.exp(ref[t] - logprobs[t]) - (ref[t] - logprobs[t]) - 1
        assert loss[t].item() == pytest.approx(float(-surrogate + 0.3 * kl - 0.1 * entropy[t]), rel=1e-12)


def test_an_entropy_bonus_without_gradient_is_an_error_and_not_silence():
    logprobs, old, _, advantages = four_columns()
    objective = resolve("dr_grpo", entropy_bonus=0.1)
    with pytest.raises(AssertionError, match="not asked for the entropy's gradient"):
        token_loss(objective, logprobs.requires_grad_(), old=old, ref=None, advantages=advantages, entropy=-old)


def test_kl_in_the_reward_leaves_the_loss_alone():
    logprobs, old, ref, advantages = four_columns()
    objective = resolve("grpo", beta=0.3, kl_estimator="k1", kl_where="reward")
    with_kl, without = (
        token_loss(objective_, logprobs, old=old, ref=ref, advantages=advantages)
        for objective_ in (objective, resolve("grpo", beta=0.0))
    )
    assert torch.equal(with_kl, without) and objective.needs_frozen_pass and not objective.acts_without_advantage


def exact_kl_and_gradients(logits, reference_logits):
    """KL(policy || ref), its gradient, and the gradient of KL(ref || policy), all by the policy's logits."""
    logits = logits.clone().requires_grad_()
    policy, reference = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    forward = (policy.exp() * (policy - reference)).sum()
    reverse = (reference.exp() * (reference - policy)).sum()
    (forward_gradient,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (reverse_gradient,) = torch.autograd.grad(reverse, logits)
    return forward.detach(), forward_gradient, reverse_gradient


def expected_value_and_gradient(estimate, logits, sampled_from):
    """Mean of an estimate and of its gradient by the logits over tokens from `sampled_from`, enumerated."""
    logits = logits.clone().requires_grad_()
    expectation = (sampled_from.log_softmax(-1).exp() * estimate(logits.log_softmax(-1))).sum()
    return expectation.detach(), torch.autograd.grad(expectation, logits, allow_unused=True)[0]


# estimator, corrected: value unbiased and whose gradient it has, on-policy and off-policy. docs/objectives.md shows it.
KL_TABLE = {
    ("k1", False): ("KL(policy, ref)", "0", "-", "-"),
    ("k2", False): ("-", "KL(policy, ref)", "-", "-"),
    ("k3", False): ("KL(policy, ref)", "KL(ref, policy)", "-", "-"),
    ("k1", True): ("KL(policy, ref)", "KL(policy, ref)", "KL(policy, ref)", "KL(policy, ref)"),
    ("k2", True): ("-", "KL(policy, ref)", "-", "KL(policy, ref)"),
    ("k3", True): ("KL(policy, ref)", "KL(policy, ref)", "KL(policy, ref)", "KL(policy, ref)"),
}


@pytest.mark.parametrize(("estimator", "corrected"), list(KL_TABLE))
def test_kl_estimators_against_the_exact_kl_on_five_tokens(estimator, corrected):
    generator = torch.Generator().manual_seed(2)
    logits, reference_logits, older_logits = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    ref = reference_logits.log_softmax(-1)
    kl, forward_gradient, reverse_gradient = exact_kl_and_gradients(logits, reference_logits)
    named = {
        "KL(policy, ref)": (kl, forward_gradient),
        "KL(ref, policy)": (None, reverse_gradient),
        "0": (None, torch.zeros(5, dtype=torch.float64)),
    }
    found = []
    for sampled_from in (logits, older_logits):
        old = sampled_from.log_softmax(-1)
        if corrected:
            estimate = lambda logprobs: objectives.corrected_kl(estimator, logprobs, old, ref)  # noqa: B023
        else:
            estimate = lambda logprobs: objectives.KL_ESTIMATORS[estimator](logprobs, ref)
        value, gradient = expected_value_and_gradient(estimate, logits, sampled_from)
        found.append("KL(policy, ref)" if torch.isclose(value, kl, rtol=1e-9) else "-")
        equal = [name for name, (_, exact) in named.items() if torch.allclose(gradient, exact, rtol=1e-9, atol=1e-12)]
        found.append(equal[0] if equal else "-")
    assert tuple(found) == KL_TABLE[estimator, corrected]


def test_the_table_in_the_docs_is_the_one_that_is_tested():
    page = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
    for (estimator, corrected), entries in KL_TABLE.items():
        name = f"{estimator}, corrected" if corrected else estimator
        assert f"| {name} | {' | '.join(entries)} |" in page


def test_the_corrected_k3_has_the_gradient_r_times_the_log_ratio():
    # d/dlp [r (e^d - d - 1)] = r (e^d - d - 1) + r (1 - e^d) = -r d
    logprobs, old, ref, _ = four_columns()
    logprobs.requires_grad_()
    objectives.corrected_kl("k3", logprobs, old, ref).sum().backward()
    torch.testing.assert_close(logprobs.grad, ((logprobs - old).exp() * (logprobs - ref)).detach())


def test_overrides_go_over_the_preset_and_none_keeps_it():
    objective = resolve("grpo", clip_high=0.28, beta=None)
    assert (objective.clip_low, objective.clip_high, objective.beta) == (0.2, 0.28, objectives.PRESETS["grpo"].beta)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "grp"}, "unknown preset 'grp'; the nearest is grpo;"),
        ({"preset": "foo"}, "unknown preset 'foo'; there are grpo, dr_grpo"),
        ({"preset": "grpo", "surrogate": "clop"}, "unknown surrogate 'clop'; the nearest is clip;"),
        ({"preset": "grpo", "kl_estimator": "k4"}, "unknown kl_estimator 'k4'; there are k1, k2, k3"),
        ({"preset": "grpo", "aggregation": "token_sum"}, "unknown aggregation 'token_sum'; the nearest is token_mean;"),
        ({"preset": "grpo", "advantages": "rlo"}, "unknown advantages 'rlo'; the nearest is rloo;"),
        ({"preset": "grpo", "mismatch": "mask"}, "unknown mismatch 'mask'; the nearest is sequence_mask;"),
        ({"preset": "grpo", "beta": -0.1}, "objective.beta=-0.1 is negative"),
    ],
)
def test_a_bad_choice_is_refused_with_its_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve(**arguments)


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("grpo", {"kl_estimator": "k1"}, "k1 in the loss has zero expected gradient"),
        ("grpo", {"kl_where": "reward"}, "k3 with kl_where=reward: only k1 gives the gradient of a KL; use k1"),
        ("grpo", {"kl_where": "reward", "kl_estimator": "k1", "kl_corrected": True}, "corrects it already"),
        ("grpo", {"kl_where": "reward", "kl_estimator": "k1", "advantages": "per_reward"}, "would undo beta"),
        (
            "grpo",
            {"surrogate": "cispo"},
            "clip_high=0.2 of preset 'grpo' has another meaning for surrogate 'cispo'.* 4.0",
        ),
        ("grpo", {"surrogate": "sequence"}, "where clip_high bounds the mean ratio of a sequence; set it explicitly"),
        ("gspo", {"surrogate": "clip"}, "clip_high=0.0004 of preset 'gspo' has another meaning for surrogate 'clip'"),
        ("grpo", {"surrogate": "dual_clip", "ratio_cap": 1.1}, r"ratio_cap=1.1 must be above 1 \+ clip_high=1.2"),
        ("gspo", {"entropy_share": 0.2}, "use sequence_token"),
        ("dapo", {"advantages": "per_reward"}, "per_reward ignores the penalty; set it to 0"),
        ("gspo", {"mismatch": "token_truncate"}, "use sequence_truncate"),
        ("dapo", {"ref_refresh_every": 5}, "ref_refresh_every=5 with beta=0: there is no reference to refresh"),
    ],
)
def test_a_combination_that_cannot_be_meant_is_refused_with_the_reason(preset, overrides, message):
    with pytest.raises(ValueError, match=message):
        resolve(preset, **overrides)


def test_what_a_row_needs_from_the_others():
    assert resolve("grpo", surrogate="cispo", clip_high=3.0).clip_high == 3.0
    assert [name for name in objectives.PRESETS if resolve(name).needs_whole_sequences] == ["gspo"]
    assert not resolve("grpo").needs_frozen_pass and resolve("grpo", mismatch="sequence_mask").needs_frozen_pass
    assert resolve("dr_grpo", entropy_bonus=0.01).acts_without_advantage
    assert not resolve("dr_grpo").needs_zero_advantage_groups


def test_a_users_surrogate_gets_groups_without_advantage_and_steps_on_them(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    mine = resolve("dr_grpo", surrogate=f"{file}:squared")
    assert mine.needs_zero_advantage_groups and mine.acts_without_advantage


def test_reinforce_makes_one_step_on_a_rollout_and_says_why():
    check_steps(resolve("rloo"), 1)
    check_steps(resolve("grpo"), 4)
    with pytest.raises(ValueError, match="has no ratio, so it cannot make .*=2 optimizer steps"):
        check_steps(resolve("rloo"), 2)


def test_the_names_are_those_of_the_other_rooms():
    assert tuple(advantages_room.ADVANTAGES) == objectives.ADVANTAGES
    assert tuple(batch_room.AGGREGATIONS) == objectives.AGGREGATIONS


OWN = """
from __future__ import annotations
from dataclasses import dataclass
import torch

@dataclass
class Margin:
    width: float

def squared(logprobs, old, advantages, *, clip_high):
    return -(torch.exp(logprobs - old) - 1 - clip_high * advantages) ** 2

def with_default(logprobs, old, advantages, margin=1.0):
    return advantages

def wrong_setting(logprobs, old, advantages, *, epsilon):
    return advantages

def summed(logprobs, old, advantages):
    return (logprobs * advantages).sum()

def forgotten(logprobs, old, advantages):
    logprobs * advantages

def detached(logprobs, old, advantages):
    return logprobs.detach() * advantages
"""


def test_a_surrogate_in_a_users_file_is_a_row_like_ours(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    objective = resolve("dr_grpo", surrogate=f"{file}:squared", clip_high=0.5)
    logprobs, old, _, advantages = four_columns()
    loss = token_loss(objective, logprobs, old=old, ref=None, advantages=advantages)
    torch.testing.assert_close(loss, ((logprobs - old).exp() - 1 - 0.5 * advantages) ** 2)
    assert not objective.needs_whole_sequences


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("cubed", "defines no function or class 'cubed'"),
        ("with_default", r"takes \(logprobs, old, advantages, margin\); it must take"),
        ("wrong_setting", "with keyword-only names out of clip_low, clip_high"),
    ],
)
def test_a_users_function_that_does_not_fit_is_refused(tmp_path, function, message):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    with pytest.raises(ValueError, match=message):
        find_surrogate(f"{file}:{function}")


def test_a_users_function_must_return_one_value_per_token(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    logprobs, old, _, advantages = four_columns()
    for function, found in (("summed", r"shape \(\)"), ("forgotten", "None")):
        objective = resolve("dr_grpo", surrogate=f"{file}:{function}")
        with pytest.raises(ValueError, match=rf"returned {found} for log-probs of shape \(10,\); return one value"):
            token_loss(objective, logprobs, old=old, ref=None, advantages=advantages)
    objective = resolve("dr_grpo", surrogate=f"{file}:detached")
    with pytest.raises(ValueError, match="returned a tensor without a gradient to the log-probs"):
        token_loss(objective, logprobs.requires_grad_(), old=old, ref=None, advantages=advantages)
    with pytest.raises(ValueError, match="no file"):
        find_surrogate("nowhere.py:f")
