"""What the policy sends to its log-prob head."""

import torch

import grpo.logprobs
from grpo.batch import pack, weigh
from grpo.logprobs import PolicyModule
from grpo.objectives import resolve
from grpo.policy import Policy
from grpo.update import weighted_loss
from tests.tiny import made_up_groups, tiny_qwen2, word_tokenizer


def test_tokens_of_weight_zero_never_reach_the_head(monkeypatch):
    batch = pack(
        made_up_groups(3),
        minibatches=1,
        passes=1,
        tokens_per_micro_batch=10_000,
        max_over_ranks=lambda x: x,
        device=torch.device("cpu"),
    )
    (micro_batch,) = batch.micro_batches
    scored = torch.ones(3, 4, dtype=torch.bool)
    scored[1, 2] = scored[2, 0] = False
    weigh(
        batch,
        torch.randn(3, 4),
        scored,
        aggregation="token_mean",
        max_new_tokens=12,
        sum_over_ranks=lambda x: x.double(),
    )
    sizes = []
    original = grpo.logprobs.linear_logprob_loss
    monkeypatch.setattr(
        grpo.logprobs,
        "linear_logprob_loss",
        lambda hidden, *rest, **options: sizes.append(len(hidden)) or original(hidden, *rest, **options),
    )
    module = PolicyModule(Policy(tiny_qwen2(), word_tokenizer(), "fp32"), temperature=1.0, impl="torch")
    tokens = micro_batch.tokens
    loss_of = weighted_loss(resolve("dr_grpo"), micro_batch)
    loss, logprobs, entropy = module(micro_batch, loss_of)
    assert sizes == [int(tokens.counted.sum())] and sizes[0] < len(tokens.target)
    assert torch.equal(logprobs.isnan(), ~tokens.counted) and torch.equal(entropy.isnan(), ~tokens.counted)

    expected_logprobs, expected_entropy = module(micro_batch)
    expected = loss_of(expected_logprobs, expected_entropy, slice(None)).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logprobs[tokens.counted], expected_logprobs[tokens.counted])
    parameters = list(module.parameters())
    for found, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
