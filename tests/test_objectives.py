"""Surrogates and KL estimators against hand-worked numbers, identities, loops and exact values on a tiny vocabulary."""

import math

import pytest
import torch

from grpo import objectives
from grpo.objectives import clipped_surrogate, kl_k2, kl_k3, resolve, token_loss


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
    low, high = objectives.clipped_low_and_high(objective, logprobs, vector(0, 0), vector(1, -1))
    assert low.tolist() == [False, True] and high.tolist() == [True, False]


def test_token_loss_equals_a_loop_written_from_the_paper():
    generator = torch.Generator().manual_seed(0)
    logprobs, old, ref, advantages = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(4))
    loss = token_loss(resolve("grpo", beta=0.3), logprobs, old=old, ref=ref, advantages=advantages)
    for t in range(50):
        ratio = math.exp(logprobs[t] - old[t])
        surrogate = min(ratio * advantages[t], min(max(ratio, 0.8), 1.2) * advantages[t])
        kl = math.exp(ref[t] - logprobs[t]) - (ref[t] - logprobs[t]) - 1
        assert loss[t].item() == pytest.approx(float(-surrogate + 0.3 * kl), rel=1e-12)


@pytest.mark.parametrize("name", list(objectives.SURROGATES))
def test_surrogates_pass_gradcheck(name):
    generator = torch.Generator().manual_seed(1)
    logprobs = torch.randn(20, generator=generator, dtype=torch.float64).requires_grad_()
    old, advantages = (torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x: objectives.SURROGATES[name](x, old, advantages, clip_low=0.2, clip_high=0.3), logprobs
    )


def exact_kl_and_gradients(logits, reference_logits):
    """KL(policy || ref), its gradient, and the gradient of KL(ref || policy), all by the policy's logits."""
    logits = logits.clone().requires_grad_()
    policy, reference = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    forward = (policy.exp() * (policy - reference)).sum()
    reverse = (reference.exp() * (reference - policy)).sum()
    (forward_gradient,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (reverse_gradient,) = torch.autograd.grad(reverse, logits)
    return forward.detach(), forward_gradient, reverse_gradient


def expected_value_and_gradient(estimator, logits, reference_logits):
    """Mean over the policy's tokens of the estimator and of its gradient (sampling not differentiated), enumerated."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    values = estimator(logprobs, reference_logits.log_softmax(-1))
    expectation = (logprobs.detach().exp() * values).sum()
    return expectation.detach(), torch.autograd.grad(expectation, logits)[0]


def test_kl_estimators_against_the_exact_kl_on_five_tokens():
    generator = torch.Generator().manual_seed(2)
    logits, reference_logits = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    kl, forward_gradient, reverse_gradient = exact_kl_and_gradients(logits, reference_logits)
    value, gradient = expected_value_and_gradient(kl_k3, logits, reference_logits)
    torch.testing.assert_close(value, kl)  # k3: unbiased value ...
    torch.testing.assert_close(gradient, reverse_gradient)  # ... gradient of the reverse KL
    value, gradient = expected_value_and_gradient(kl_k2, logits, reference_logits)
    torch.testing.assert_close(gradient, forward_gradient)  # k2: gradient of the forward KL ...
    assert abs(value - kl) > 1e-3  # ... but a biased value


def test_overrides_go_over_the_preset_and_none_keeps_it():
    objective = resolve("grpo", clip_high=0.28, beta=None)
    assert (objective.clip_low, objective.clip_high, objective.beta) == (0.2, 0.28, objectives.PRESETS["grpo"].beta)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "grp"}, "unknown preset 'grp'; nearest is 'grpo'"),
        ({"preset": "grpo", "surrogate": "clop"}, "unknown surrogate 'clop'; nearest is 'clip'"),
        ({"preset": "grpo", "kl_estimator": "k1"}, "unknown kl_estimator 'k1'"),
        ({"preset": "grpo", "beta": -0.1}, "objective.beta=-0.1 is negative"),
    ],
)
def test_a_bad_choice_is_refused_with_its_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve(**arguments)
