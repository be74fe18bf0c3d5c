"""Layout: what a packed row holds, how groups are divided, and that no division changes a weight."""

from __future__ import annotations

import pytest
import torch

from grpo.batch import LAYOUTS, balance, dummy, fewest_bins, pack, packed_row, weigh
from grpo.logprobs import PolicyModule
from grpo.policy import Policy
from grpo.records import Batch, Completion, Group, Problem
from tests.tiny import made_up_groups, tiny_qwen2, word_tokenizer

CPU = torch.device("cpu")


def group_of(prompt: tuple[int, ...], *completions: list[int]) -> Group:
    made = [Completion(ids, [-1.0] * len(ids), "", "eos", sample) for sample, ids in enumerate(completions)]
    return Group(Problem(id="", question="", answer="", prompt_ids=prompt), made, step=0)


def packed(groups: list[Group], budget: int, layout: str = "packed", **others) -> Batch:
    options = {"max_over_ranks": lambda tensor: tensor, "device": CPU, "layout": layout} | others
    return pack(groups, minibatches=1, passes=1, tokens_per_micro_batch=budget, **options)


def test_a_packed_row_worked_by_hand():
    groups = [group_of((20, 21), [30, 31, 32], [40]), group_of((22,), [50, 51])]
    row = packed_row(groups, [(1, 0), (0, 1), (0, 0)], CPU)
    # row            0   1   2   3   4   5
    assert row.input_ids.tolist() == [[20, 21, 30, 31, 22, 50]]  # 32, 40 and 51 are only targets
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert row.sequences == [(0, 0), (0, 1), (1, 0)]
    assert row.tokens.target.tolist() == [30, 31, 32, 40, 50, 51]
    assert row.source.tolist() == [1, 2, 3, 1, 4, 5]  # a first token is predicted by the last row of its prompt
    layout = row.shared_prefix
    assert layout.groups == [(slice(0, 2), [slice(2, 4), slice(4, 4)]), (slice(4, 5), [slice(5, 6)])]
    assert layout.group.tolist() == [0, 0, 0, 0, 1, 1]
    assert layout.completion.tolist() == [0, 0, 1, 1, 0, 1]
    assert layout.key_index.tolist() == [0, 1, 0, 1, 2, 3, 4, 4, 5]  # prompt | prompt, c1 | prompt | prompt, c1
    assert layout.query_starts.tolist() == [0, 2, 4, 5, 6]
    assert layout.key_starts.tolist() == [0, 2, 6, 7, 9]
    assert (layout.longest_query, layout.longest_key) == (2, 4)


def test_what_all_prompts_begin_with_stands_once_before_them(monkeypatch):
    monkeypatch.setattr("grpo.records.MIN_COMMON_PREFIX", 2)
    groups = [group_of((20, 21, 22), [30, 31, 32], [40]), group_of((20, 21, 23, 24), [50, 51])]
    row = packed_row(groups, [(0, 0), (0, 1), (1, 0)], CPU)
    # row            0   1   2   3   4   5   6   7
    assert row.input_ids.tolist() == [[20, 21, 22, 30, 31, 23, 24, 50]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]
    assert row.source.tolist() == [2, 3, 4, 2, 6, 7]
    layout = row.shared_prefix
    assert layout.common == slice(0, 2) and layout.groups[1] == (slice(5, 7), [slice(7, 8)])
    assert layout.group.tolist() == [-1, -1, 0, 0, 0, 1, 1, 1]
    assert layout.key_index.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 5, 6, 0, 1, 5, 6, 7]
    assert layout.key_starts.tolist() == [0, 2, 5, 10, 14, 19]
    alone = packed_row(groups, [(0, 0), (0, 1)], CPU)  # one prompt: nothing to share
    assert alone.shared_prefix.common == slice(0, 0) and alone.input_ids.tolist() == [[20, 21, 22, 30, 31]]
    same = packed_row([groups[0], groups[0]], [(0, 0), (1, 0)], CPU)  # each keeps its last token: it predicts
    assert same.input_ids.tolist() == [[20, 21, 22, 30, 31, 22, 30, 31]]


def test_the_budget_counts_what_prompts_begin_with_once_a_micro_batch():
    groups = [group_of((9,) * 40 + (g,), *([[7] * 11] * 4)) for g in range(6)]  # 40, and 1 + 4 * 10 = 41 a group
    sizes = [micro_batch.input_ids.numel() for micro_batch in packed(groups, 163).micro_batches]
    assert sizes == [163, 163]


def test_on_cuda_a_packed_row_ends_on_a_whole_block_with_rows_that_see_only_each_other(monkeypatch):
    monkeypatch.setattr("grpo.batch.ROW_MULTIPLE", {"cpu": 8})
    row = packed_row([group_of((20, 21), [30, 31, 32])], [(0, 0)], CPU)
    assert row.input_ids.tolist() == [[20, 21, 30, 31, 0, 0, 0, 0]]
    assert row.shared_prefix.group.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert row.source.tolist() == [1, 2, 3]


def test_items_go_largest_first_into_the_bin_with_least_in_it():
    assert balance([2, 7, 4, 3], 2) == [[1, 0], [2, 3]]  # 7, 2 | 4, 3: of two bins with 7 the one of fewer items
    assert balance([0, 0, 5], 3) == [[2], [0], [1]]
    assert fewest_bins([2, 7, 4, 3], 9) == 2
    assert fewest_bins([2, 7, 4, 3], 8) == 3  # 7 | 4 | 3, 2
    assert fewest_bins([2, 7, 4, 3], 1) == 4  # nothing fits: one each
    assert fewest_bins([0, 0], -5) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 40, 60, 10_000])
def test_every_sequence_is_laid_out_once_and_the_budget_is_kept(layout, budget):
    groups = made_up_groups(8, 4)
    micro_batches = packed(groups, budget, layout).micro_batches
    assert sorted(member for m in micro_batches for member in m.sequences) == [
        (g, s) for g in range(8) for s in range(4)
    ]
    for micro_batch in micro_batches:
        assert micro_batch.input_ids.numel() <= budget or len(micro_batch.sequences) == 1


def test_groups_stay_whole_where_the_budget_allows_and_micro_batches_are_of_like_size():
    groups = [group_of((9,) * 10, *([[7] * 11] * 4)) for _ in range(6)]  # 10 + 4 * 10 = 50 tokens each
    sizes = [micro_batch.input_ids.numel() for micro_batch in packed(groups, 149).micro_batches]
    assert sizes == [100, 100, 100]
    split = packed(groups[:1], 30).micro_batches  # the prompt again in each part
    assert [micro_batch.input_ids.numel() for micro_batch in split] == [30, 30]


def test_a_rank_with_less_work_spreads_it_over_as_many_micro_batches_and_fills_up_with_dummies():
    groups = [group_of((9,) * 10, *([[7] * 11] * 4)) for _ in range(2)]
    four_elsewhere = packed(groups, 1000, max_over_ranks=lambda tensor: torch.tensor(4)).micro_batches
    assert [bool(micro_batch.sequences) for micro_batch in four_elsewhere] == [True, True, False, False]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_silent_group_is_in_no_micro_batch_and_still_in_the_denominators(layout):
    groups = made_up_groups(4)
    batch = packed(groups, 60, layout, skipped=[False, True, True, False])
    assert {g for micro_batch in batch.micro_batches for g, _ in micro_batch.sequences} == {0, 3}
    options = {"aggregation": "constant", "max_new_tokens": 12, "sum_over_ranks": lambda tensor: tensor}
    weigh(batch, torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool), **options)
    weights = torch.cat([micro_batch.tokens.weight for micro_batch in batch.micro_batches])
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / (16 * 12)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_whose_groups_are_all_silent_gets_one_dummy(layout):
    (only,) = packed(made_up_groups(2), 60, layout, skipped=[True, True]).micro_batches
    assert not only.sequences


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dummy_touches_every_parameter_and_moves_none(layout):
    module = PolicyModule(Policy(tiny_qwen2(), word_tokenizer(), "fp32"), temperature=1.0, impl="torch")
    micro_batch = dummy(LAYOUTS[layout][1], made_up_groups(1)[0], CPU)
    weigh(
        Batch([[micro_batch]], 1, [range(1)], torch.ones(1, 4, dtype=torch.int64)),
        torch.zeros(1, 4),
        torch.ones(1, 4, dtype=torch.bool),
        aggregation="constant",
        max_new_tokens=12,
        sum_over_ranks=lambda tensor: tensor,
    )
    loss, *_ = module(micro_batch, lambda logprobs, entropy, rows: micro_batch.tokens.weight[rows] * logprobs)
    loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_the_weight_of_a_token_does_not_depend_on_layout_or_splits(aggregation):
    groups = made_up_groups(6, 4)
    advantages, scored = torch.randn(6, 4), torch.rand(6, 4) > 0.2

    def weights(budget: int, layout: str) -> dict[tuple[int, int], list[float]]:
        batch = packed(groups, budget, layout)
        options = {"aggregation": aggregation, "max_new_tokens": 12, "sum_over_ranks": lambda tensor: tensor}
        weigh(batch, advantages, scored, **options)
        return {
            member: m.tokens.weight[m.tokens.sequence == row].tolist()
            for m in batch.micro_batches
            for row, member in enumerate(m.sequences)
        }

    whole = weights(10_000, "packed")
    assert all(weights(budget, layout) == whole for budget in (1, 30) for layout in LAYOUTS)
