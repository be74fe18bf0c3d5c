"""Token weights and masks: who is counted, who is active, and one gradient for any ranks, micro-batches and order."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.batch import correct_mismatch, counted_completions, keep_high_entropy, kl_per_completion, pack, weigh
from grpo.objectives import PRESETS, resolve
from grpo.update import weighted_loss
from tests.ranks import Ranks
from tests.tiny import VOCABULARY, made_up_groups

NUM_GROUPS, GROUP_SIZE, MAX_NEW_TOKENS = 8, 4, 12
CPU = torch.device("cpu")
ALONE = {"max_over_ranks": lambda values: values}


def one_micro_batch(groups):
    batch = pack(groups, minibatches=1, passes=1, tokens_per_micro_batch=10_000, device=CPU, **ALONE)
    return batch, batch.micro_batches[0].tokens, batch.micro_batches[0].sequences


def weigh_alone(batch, counted, aggregation="token_mean"):
    options = {"aggregation": aggregation, "max_new_tokens": MAX_NEW_TOKENS, "sum_over_ranks": lambda values: values}
    weigh(batch, torch.ones(counted.shape), counted, **options)


def lengths_2_and_3():
    """One group of two completions, of 2 and of 3 tokens; the second ran into the limit."""
    group = made_up_groups(1, 2)[0]
    first, second = group.completions
    first = replace(first, ids=[5, 6], logprobs=[-1.0, -1.0])
    second = replace(second, ids=[7, 8, 9], logprobs=[-1.0, -1.0, -1.0], finish="length")
    return [replace(group, completions=[first, second])]


@pytest.mark.parametrize(
    ("aggregation", "short", "long"),
    [
        ("sequence_mean", 1 / (2 * 2), 1 / (2 * 3)),  # two sequences, each the mean of its tokens
        ("token_mean", 1 / 5, 1 / 5),  # five tokens
        ("constant", 1 / (2 * 12), 1 / (2 * 12)),  # two sequences of at most twelve
    ],
)
def test_weights_of_two_completions_worked_by_hand(aggregation, short, long):
    batch, tokens, sequences = one_micro_batch(lengths_2_and_3())
    weigh_alone(batch, torch.ones(1, 2, dtype=torch.bool), aggregation)
    by_sample = {sample: tokens.weight[tokens.sequence == row].tolist() for row, (_, sample) in enumerate(sequences)}
    assert by_sample == {0: pytest.approx([short] * 2), 1: pytest.approx([long] * 3)}


def test_a_truncated_completion_leaves_loss_and_denominators_only_where_it_is_masked():
    groups, scored = lengths_2_and_3(), torch.ones(1, 2, dtype=torch.bool)
    assert counted_completions(groups, scored, mask_truncated=False).tolist() == [[True, True]]
    counted = counted_completions(groups, scored, mask_truncated=True)
    assert counted.tolist() == [[True, False]]
    batch, tokens, _ = one_micro_batch(groups)
    weigh_alone(batch, counted)
    assert sorted(tokens.weight.tolist()) == pytest.approx([0, 0, 0, 1 / 2, 1 / 2])
    assert torch.equal(tokens.counted, tokens.weight > 0) and torch.equal(tokens.active, tokens.counted)


def test_high_entropy_tokens_keep_their_weight_and_the_others_stay_in_the_denominator():
    batch, tokens, sequences = one_micro_batch(lengths_2_and_3())
    weigh_alone(batch, torch.ones(1, 2, dtype=torch.bool))
    tokens.entropy = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3])
    keep_high_entropy(batch, 0.4, lambda mine: [mine])  # 1 + floor(0.4 * (5 - 1)) = 2 of 5
    assert tokens.weight.tolist() == pytest.approx([0, 0.2, 0, 0.2, 0])
    assert tokens.active.tolist() == [False, True, False, True, False] and tokens.counted.all()


def test_tokens_of_one_distribution_stay_together_whatever_rounding_made_of_their_entropy():
    batch, tokens, sequences = one_micro_batch(lengths_2_and_3())
    weigh_alone(batch, torch.ones(1, 2, dtype=torch.bool))
    tokens.entropy = torch.tensor([0.1, 0.9, 0.7 - 2e-6, 0.7, 0.3])
    keep_high_entropy(batch, 0.4, lambda mine: [mine])
    assert tokens.active.tolist() == [False, True, True, True, False]


def test_the_entropy_threshold_is_over_all_ranks_and_ignores_what_is_not_counted():
    groups = lengths_2_and_3()
    batch, tokens, sequences = one_micro_batch(groups)
    weigh_alone(batch, counted_completions(groups, torch.ones(1, 2, dtype=torch.bool), mask_truncated=True))
    tokens.entropy = torch.where(tokens.counted, 0.5, 9.0)
    keep_high_entropy(batch, 0.5, lambda mine: [mine, torch.tensor([0.6, 0.7, 0.8])])  # 3 of 5: from 0.6 on
    assert not tokens.active.any()


def with_mismatch(mode, level, cap, log_ratios):
    batch, tokens, sequences = one_micro_batch(lengths_2_and_3())
    weigh_alone(batch, torch.ones(1, 2, dtype=torch.bool))
    column = torch.cat([torch.tensor(log_ratios[sample]) for _, sample in sequences])
    tokens.old = tokens.sampler + column
    correct_mismatch(batch, mode, level=level, cap=cap)
    factor = tokens.weight / 0.2
    return {sample: factor[tokens.sequence == row].tolist() for row, (_, sample) in enumerate(sequences)}, tokens


@pytest.mark.parametrize(
    ("mode", "level", "short", "long"),
    [  # log-ratios: log 3 and 0 (sum log 3, mean half of it); -0.1, -0.2, -0.6 (sum -0.9, mean -0.3); cap 2
        ("token_truncate", "mean", [2, 1], [math.exp(-0.1), math.exp(-0.2), math.exp(-0.6)]),
        ("sequence_truncate", "mean", [math.sqrt(3)] * 2, [math.exp(-0.3)] * 3),
        ("sequence_truncate", "sum", [2, 2], [math.exp(-0.9)] * 3),
        ("sequence_mask", "mean", [1, 1], [1, 1, 1]),
        ("sequence_mask", "sum", [0, 0], [0, 0, 0]),  # 3 is above 2, exp(-0.9) = 0.41 below 1/2
    ],
)
def test_mismatch_corrections_worked_by_hand(mode, level, short, long):
    factors, tokens = with_mismatch(mode, level, 2.0, {0: [math.log(3), 0.0], 1: [-0.1, -0.2, -0.6]})
    assert factors == {0: pytest.approx(short), 1: pytest.approx(long)}
    assert torch.equal(tokens.active, tokens.weight > 0) and tokens.counted.all()


def test_the_token_ratio_turns_the_mean_over_the_samplers_tokens_into_the_policys():
    generator = torch.Generator().manual_seed(0)
    old, sampler = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    values = torch.randn(6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((sampler.exp() * (old - sampler).exp() * values).sum(), (old.exp() * values).sum())


def test_kl_by_completion_sums_old_minus_ref():
    batch, tokens, sequences = one_micro_batch(lengths_2_and_3())
    tokens.ref = torch.zeros(5)
    column = {0: [0.5, 0.25], 1: [1.0, 2.0, -0.5]}
    tokens.old = torch.cat([torch.tensor(column[sample]) for _, sample in sequences])
    assert kl_per_completion(batch).tolist() == [[0.75, 2.5]]


def bigram(seed):
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def columns_of(table, micro_batch):
    """Log-probs and entropy of a bigram model: the smallest model for which packing can go wrong."""
    logits = table[micro_batch.input_ids.flatten()[micro_batch.source]].log_softmax(-1)
    picked = logits.gather(1, micro_batch.tokens.target[:, None])[:, 0]
    return picked, -(logits.exp() * logits).sum(-1)


def gradient(objective, num_ranks, budget, order):
    """What DDP would hold: the mean over ranks of each rank's gradient times the number of ranks."""
    groups, advantages, scored = made_up_groups(NUM_GROUPS, GROUP_SIZE), *advantages_and_scored()
    groups, advantages, scored = [groups[i] for i in order], advantages[order], scored[order]
    ranks = Ranks(num_ranks)

    def work(rank):
        mine = slice(rank, None, num_ranks)
        reduce = {name: lambda values, name=name: getattr(ranks, name)(rank, values) for name in ("sum", "max")}
        options = {"minibatches": 1, "passes": 1, "tokens_per_micro_batch": budget, "device": CPU}
        batch = pack(groups[mine], **options, max_over_ranks=reduce["max"])
        for micro_batch in batch.micro_batches:
            tokens = micro_batch.tokens
            tokens.old, tokens.entropy = columns_of(OLD, micro_batch)
            tokens.ref = columns_of(bigram(2), micro_batch)[0]
            tokens.sampler = tokens.old + 0.3 * (tokens.sampler + 1.5)  # a sampler that is a little off
        counted = counted_completions(groups[mine], scored[mine], mask_truncated=objective.mask_truncated)
        limits = {"aggregation": objective.aggregation, "max_new_tokens": MAX_NEW_TOKENS}
        weigh(batch, advantages[mine], counted, **limits, sum_over_ranks=reduce["sum"])
        if objective.entropy_share < 1:
            keep_high_entropy(batch, objective.entropy_share, lambda item: ranks.gather(rank, item))
        if objective.mismatch != "none":
            correct_mismatch(batch, objective.mismatch, level=objective.mismatch_level, cap=objective.mismatch_cap)
        table = NOW.clone().requires_grad_()
        for micro_batch in batch.micro_batches:
            logprobs, entropy = columns_of(table, micro_batch)
            loss = weighted_loss(objective, micro_batch)(logprobs, entropy, slice(0, len(logprobs))).sum()
            (loss * num_ranks).backward()
        return table.grad

    return torch.stack(ranks.run(work)).mean(0)


def advantages_and_scored():
    advantages = torch.randn(NUM_GROUPS, GROUP_SIZE, generator=torch.Generator().manual_seed(3))
    scored = torch.ones(NUM_GROUPS, GROUP_SIZE, dtype=torch.bool)
    advantages[2], scored[5, 1] = 0.0, False
    return advantages, scored


OLD = bigram(0)
NOW = OLD + 0.1 * bigram(1)  # off-policy: clips and gates act
EXTRAS = {"beta": 0.1, "kl_corrected": True, "entropy_bonus": 0.01}
VARIANTS = {
    **{name: resolve(name) for name in PRESETS},
    "dual_clip": resolve("grpo", surrogate="dual_clip", ratio_cap=1.3, **EXTRAS),
    "sequence_token": resolve("gspo", surrogate="sequence_token", entropy_share=0.3, mask_truncated=True),
    "masked": resolve("dapo", entropy_share=0.2, mismatch="sequence_mask", mismatch_cap=1.5, **EXTRAS),
    "corrected": resolve("cispo", mismatch="sequence_truncate", mismatch_level="sum"),
}
ON_ONE_RANK = {name: gradient(objective, 1, 10_000, list(range(NUM_GROUPS))) for name, objective in VARIANTS.items()}


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 20, 60, 10_000]), st.permutations(range(NUM_GROUPS)))
@pytest.mark.parametrize("name", list(VARIANTS))
def test_any_ranks_micro_batches_and_order_give_one_gradient(name, num_ranks, budget, order):
    expected = ON_ONE_RANK[name]
    found = gradient(VARIANTS[name], num_ranks, budget, order)
    assert (found - expected).norm() < 1e-10 * expected.norm()
    assert expected.norm() > 1e-3


def test_a_surrogate_of_whole_sequences_refuses_some_rows():
    batch, tokens, _ = one_micro_batch(lengths_2_and_3())
    weigh_alone(batch, torch.ones(1, 2, dtype=torch.bool))
    loss_of = weighted_loss(resolve("gspo"), batch.micro_batches[0])
    assert len(loss_of(torch.zeros(5), torch.zeros(5), slice(0, 5))) == 5
    with pytest.raises(AssertionError, match="sequence got 3 of 5 tokens"):
        loss_of(torch.zeros(3), torch.zeros(3), slice(0, 3))
