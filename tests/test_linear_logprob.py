"""The log-prob head, in all four modes, against a plain log-softmax over all logits and what autograd makes of it."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from grpo.objectives import resolve, token_loss
from kernels.linear_logprob import modes, rows
from kernels.linear_logprob.reference import linear_logprob as reference

T, D, V = 37, 12, 101
OPTIONS = [{"temperature": 1.0}, {"temperature": 0.7, "softcap": 3.0}]
COEFFICIENTS = torch.linspace(-1, 1, T, dtype=torch.float64)


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
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((T, D), (V, D), (V,))
    )
    target = torch.randint(0, V, (T,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), target


@pytest.fixture(params=[1, 7, 1000], ids=lambda height: f"chunk{height}")
def chunk(request, monkeypatch):
    monkeypatch.setattr(modes, "CHUNK_ELEMENTS", {"cpu": request.param * V})
    monkeypatch.setattr(rows, "BLOCK_ELEMENTS", {"cpu": 3 * V})


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def surrogate(logprobs, entropy, rows):
    """A user's own: neither linear in the log-prob nor alike for all rows."""
    return COEFFICIENTS[rows] * torch.sigmoid(2 * logprobs) + 0.1 * logprobs.square()


@pytest.mark.parametrize("options", OPTIONS)
def test_the_reference_equals_the_naive_softmax(inputs, options):
    hidden, weight, bias, target = inputs
    found, expected = (f(hidden, weight, target, bias=bias, **options) for f in (reference, naive))
    close(found, expected)
    gradients = [torch.autograd.grad((COEFFICIENTS * pair[0]).sum(), inputs[:3]) for pair in (found, expected)]
    close(*gradients)


@pytest.mark.parametrize("options", OPTIONS)
def test_without_gradients_only_values_are_computed(inputs, chunk, options):
    hidden, weight, bias, target = inputs
    with torch.no_grad():
        found = kernels.linear_logprob(hidden, weight, target, bias=bias, impl="torch", **options)
    close(found, naive(hidden, weight, target, bias=bias, **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_frozen_head_gives_the_gradient_of_the_hidden_states_for_any_loss(inputs, chunk, options):
    hidden, weight, bias, target = inputs[0], inputs[1].detach(), inputs[2].detach(), inputs[3]
    found, expected = (
        f(hidden, weight, target, bias=bias, **options, **extra)
        for f, extra in ((kernels.linear_logprob, {"impl": "torch"}), (naive, {}))
    )
    assert found[0].grad_fn.name() == "_FrozenHeadBackward"
    close(found, expected)
    losses = [surrogate(logprobs, None, slice(None)).sum() for logprobs, _ in (found, expected)]
    close(*(torch.autograd.grad(loss, hidden) for loss in losses))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("entropy_gradient", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_any_loss_gives_all_gradients(inputs, chunk, options, entropy_gradient, with_bias):
    hidden, weight, bias, target = inputs
    parameters = (hidden, weight, bias) if with_bias else (hidden, weight)
    options = {**options, "bias": bias if with_bias else None}
    found = kernels.linear_logprob(hidden, weight, target, impl="torch", entropy_gradient=entropy_gradient, **options)
    expected = naive(hidden, weight, target, **options)
    close(found, expected)
    assert found[1].requires_grad == entropy_gradient

    def loss(logprobs, entropy):
        value = surrogate(logprobs, None, slice(None))
        return (value + COEFFICIENTS.flip(0) * entropy.square() if entropy_gradient else value).sum()

    close(*(torch.autograd.grad(loss(*pair), parameters) for pair in (found, expected)))


@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("entropy_gradient", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_users_own_loss_folded_into_the_head_gives_the_same_gradients(
    inputs, chunk, options, entropy_gradient, is_frozen
):
    hidden, weight, bias, target = inputs
    parameters = (hidden,) if is_frozen else (hidden, weight, bias)
    if is_frozen:
        weight, bias = weight.detach(), bias.detach()

    def loss_of(logprobs, entropy, rows):
        return surrogate(logprobs, entropy, rows) - (0.3 * logprobs * entropy if entropy_gradient else 0)

    loss, *columns = kernels.linear_logprob_loss(
        hidden, weight, target, loss_of, bias=bias, impl="torch", entropy_gradient=entropy_gradient, **options
    )
    expected = naive(hidden, weight, target, bias=bias, **options)
    expected_loss = loss_of(*expected, slice(None)).sum()
    close([loss, *columns], [expected_loss, *expected])
    assert not any(column.requires_grad for column in columns)
    close(torch.autograd.grad(3 * loss, parameters), torch.autograd.grad(3 * expected_loss, parameters))


@pytest.mark.parametrize("has_old", [True, False], ids=["off policy", "on policy"])
def test_the_clipped_objective_with_kl_folded_into_the_head_equals_autograd(inputs, chunk, has_old):
    hidden, weight, _, target = inputs
    objective = resolve("grpo", beta=0.3)
    current = naive(hidden, weight, target, temperature=0.9)[0].detach()
    noise = torch.randn(2, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    old, ref = current + 0.3 * noise[0], current + 0.3 * noise[1]

    def loss_of(logprobs, entropy, rows):
        columns = {"old": old[rows] if has_old else None, "ref": ref[rows], "advantages": COEFFICIENTS[rows]}
        return token_loss(objective, logprobs, **columns) / T

    loss = kernels.linear_logprob_loss(hidden, weight, target, loss_of, temperature=0.9, impl="torch")[0]
    expected = loss_of(*naive(hidden, weight, target, temperature=0.9), slice(None)).sum()
    close([loss], [expected])
    close(torch.autograd.grad(loss, inputs[:2]), torch.autograd.grad(expected, inputs[:2]))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_of_log_prob_and_entropy(softcap):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((5, 4), (11, 4), 11)
    )
    target = torch.tensor([0, 10, 3, 3, 7])

    def both(hidden, weight, bias):
        return kernels.linear_logprob(
            hidden, weight, target, temperature=0.8, bias=bias, softcap=softcap, impl="torch", entropy_gradient=True
        )

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))
    frozen = lambda hidden: both(hidden, weight.detach(), bias.detach())
    assert torch.autograd.gradcheck(frozen, hidden)


def test_a_tied_weight_adds_the_gradient_of_its_other_use(inputs):
    _, weight, _, target = inputs
    rows = torch.arange(T)
    loss, *_ = kernels.linear_logprob_loss(weight[rows], weight, target, surrogate, temperature=1.0, impl="torch")
    expected = surrogate(naive(weight[rows], weight, target, temperature=1.0)[0], None, slice(None)).sum()
    close(torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight))


def test_hand_worked():
    """Logits (0, ln 3): p = (1/4, 3/4), log-prob of the second ln 3/4, entropy ln 4 - 3/4 ln 3. The gradient of the
    log-prob by the logits is (-1/4, 1/4); by the hidden state, 1/4 (w_2 - w_1) = ln 3 / 4."""
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    logprobs, entropy = kernels.linear_logprob(hidden, weight, torch.tensor([1]), temperature=1.0, impl="torch")
    assert logprobs.item() == pytest.approx(math.log(3 / 4))
    assert entropy.item() == pytest.approx(math.log(4) - 3 / 4 * math.log(3))
    logprobs.sum().backward()
    assert hidden.grad.item() == pytest.approx(math.log(3) / 4)
    assert weight.grad.flatten().tolist() == pytest.approx([-0.25, 0.25])


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_large_and_very_negative_logits_keep_their_precision(offset):
    """Every logit moved by the same amount changes nothing: what is left is the rounding of the moved logits."""
    logits = torch.tensor([[0.5, 1.0, -2.0], [0.0, 0.0, 0.0]]) + offset
    target = torch.tensor([1, 2])
    found = rows.statistics(logits.clone(), target, rows.LogitTransform(1.0))
    exact = torch.log_softmax(logits.double(), -1)
    assert (found.logprobs - exact[torch.arange(2), target]).abs().max() < 2e-7
    assert (found.entropy + (exact.exp() * exact).sum(-1)).abs().max() < 3e-7


def test_no_more_logits_than_a_chunk_are_ever_held(inputs, monkeypatch):
    """And they are computed once with a folded loss, twice with any loss."""
    hidden, weight, bias, target = inputs
    monkeypatch.setattr(modes, "CHUNK_ELEMENTS", {"cpu": 10 * V})
    heights = []
    logits_of = modes._logits
    monkeypatch.setattr(
        modes, "_logits", lambda head, rows, out: heights.append(len(rows)) or logits_of(head, rows, out)
    )
    options = {"temperature": 1.0, "bias": bias, "impl": "torch"}
    kernels.linear_logprob_loss(hidden, weight, target, surrogate, **options)[0].backward()
    assert heights == [10, 10, 10, 7]
    heights.clear()
    kernels.linear_logprob(hidden, weight, target, **options)[0].sum().backward()
    assert heights == 2 * [10, 10, 10, 7]


def test_no_tensor_is_larger_than_the_logits_of_a_chunk(inputs, monkeypatch):
    hidden, weight, bias, target = inputs
    monkeypatch.setattr(modes, "CHUNK_ELEMENTS", {"cpu": (D + 1) * V})
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal largest
            result = operation(*args, **(kwargs or {}))
            largest = max([largest, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))])
            return result

    options = {"temperature": 1.0, "bias": bias, "impl": "torch"}
    with Sizes():
        kernels.linear_logprob_loss(hidden, weight, target, surrogate, **options)[0].backward()
        kernels.linear_logprob(hidden, weight, target, entropy_gradient=True, **options)[0].sum().backward()
        kernels.linear_logprob(hidden, weight.detach(), target, **options | {"bias": None})[0].sum().backward()
        with torch.no_grad():
            kernels.linear_logprob(hidden, weight, target, **options)
    assert largest == (D + 1) * V < T * V


def test_a_folded_loss_without_gradients_is_its_value(inputs, chunk):
    hidden, weight, _, target = inputs
    with torch.no_grad():
        loss, *columns = kernels.linear_logprob_loss(hidden, weight, target, surrogate, temperature=0.7, impl="torch")
        expected = naive(hidden, weight, target, temperature=0.7)
    close([loss, *columns], [surrogate(*expected, slice(None)).sum(), *expected])


def test_an_empty_micro_batch_gives_empty_results_and_zero_gradients(inputs):
    hidden, weight, _, target = inputs
    options = {"temperature": 1.0, "impl": "torch"}
    logprobs, entropy = kernels.linear_logprob(hidden[:0], weight, target[:0], **options)
    assert logprobs.shape == entropy.shape == (0,)
    loss, *_ = kernels.linear_logprob_loss(hidden[:0], weight, target[:0], surrogate, **options)
    loss.backward()
    assert loss == 0 and weight.grad.count_nonzero() == 0 and hidden.grad.count_nonzero() == 0


def test_a_folded_loss_refuses_a_second_backward_and_a_reduced_loss(inputs):
    hidden, weight, _, target = inputs
    options = {"temperature": 1.0, "impl": "torch"}
    loss, *_ = kernels.linear_logprob_loss(hidden, weight, target, surrogate, **options)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="allows one backward pass"):
        loss.backward()
    with pytest.raises(ValueError, match=r"one loss per row, shape \(37,\), not \(\)"):
        kernels.linear_logprob_loss(hidden, weight, target, lambda logprobs, *_: logprobs.sum(), **options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target": torch.full((T,), V)}, f"target {V} is outside the head's vocabulary of {V}"),
        ({"target": torch.full((T,), -1)}, f"target -1 is outside the head's vocabulary of {V}"),
        ({"target": torch.zeros(T - 1, dtype=torch.int64)}, r"target is \(36,\).*37 rows"),
        ({"target": torch.zeros(T)}, r"torch.float32; 37 rows of hidden need one int64"),
        ({"weight": torch.zeros(V, D + 1, dtype=torch.float64)}, r"hidden \(37, 12\) and weight \(101, 13\)"),
        ({"weight": torch.zeros(V, D)}, "weight is torch.float32 on cpu, hidden torch.float64"),
        ({"bias": torch.zeros(V - 1, dtype=torch.float64)}, r"bias \(100,\) does not fit a vocabulary of 101"),
    ],
)
def test_what_does_not_belong_together_is_refused_with_both_values(inputs, change, message):
    arguments = {"hidden": inputs[0], "weight": inputs[1], "target": inputs[3], **change}
    with pytest.raises(ValueError, match=message):
        kernels.linear_logprob(**arguments, temperature=1.0, impl="torch")


def test_a_nan_or_infinite_hidden_state_reaches_the_log_prob_of_its_row_only(inputs):
    hidden, weight, _, target = inputs
    for bad in (float("nan"), float("inf")):
        poisoned = hidden.detach().clone()
        poisoned[5, 3] = bad
        logprobs, _ = kernels.linear_logprob(poisoned, weight.detach(), target, temperature=1.0, impl="torch")
        assert (~logprobs.isfinite()).nonzero().tolist() == [[5]]
