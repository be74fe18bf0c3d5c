"""The log-prob head against a plain log-softmax over all logits."""

import pytest
import torch

from kernels.linear_logprob.reference import linear_logprob


def naive(hidden, weight, target, *, temperature, bias=None, softcap=None):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    probabilities = torch.exp(logits - logits.max(-1, keepdim=True).values)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    entropy = -(probabilities * probabilities.log()).sum(-1)
    return probabilities[torch.arange(len(target)), target].log(), entropy


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((37, 12), (101, 12), (101,))
    )
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        bias.requires_grad_(),
        torch.randint(0, 101, (37,), generator=generator),
    )


@pytest.mark.parametrize("rows_per_block", [1, 7, 37, None])
@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "softcap": 3.0}])
def test_values_and_gradients_equal_the_naive_softmax_for_any_block(inputs, rows_per_block, options):
    hidden, weight, bias, target = inputs
    coefficients = torch.linspace(-1, 1, len(target), dtype=torch.float64)

    def value_and_gradients(function, **extra):
        logprobs, entropy = function(hidden, weight, target, bias=bias, **options, **extra)
        return logprobs, entropy, torch.autograd.grad((coefficients * logprobs).sum(), (hidden, weight, bias))

    expected = value_and_gradients(naive)
    found = value_and_gradients(linear_logprob, rows_per_block=rows_per_block)
    for a, b in zip(found[:2] + found[2], expected[:2] + expected[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_no_block_holds_more_logits_than_asked(inputs, monkeypatch):
    hidden, weight, bias, target = inputs
    sizes = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: sizes.append(len(x)) or linear(x, *rest))
    linear_logprob(hidden, weight, target, bias=bias, temperature=1.0, rows_per_block=10)[0].sum().backward()
    assert max(sizes) <= 10 and sum(sizes) == 2 * len(target)  # once forward, once again in the backward pass


def test_an_empty_micro_batch_gives_empty_results(inputs):
    hidden, weight, _, target = inputs
    logprobs, entropy = linear_logprob(hidden[:0], weight, target[:0], temperature=1.0)
    assert logprobs.shape == entropy.shape == (0,)
