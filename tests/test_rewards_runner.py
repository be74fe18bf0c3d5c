"""score_groups: totals by hand, statuses, and that one bad completion costs only itself."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from grpo.advantages import normalise
from grpo.records import ABSTAIN, ERROR, OK, Completion, Group, Problem, Scores, merge_scores
from grpo.rewards import (
    Reward,
    correctness_reward,
    format_reward,
    refuse_unscored,
    runner,
    score_groups,
    score_texts,
)

GSM8K = {"format": Reward(format_reward, 0.5), "correctness": Reward(correctness_reward, 1.0)}
LINE = "#### The final answer is "


def group(*texts, finish="stop", answer="4", **columns):
    problem = Problem(id="train/0", question="2 + 2?", answer=answer, columns=columns, prompt="Q: 2 + 2?")
    completions = [Completion(ids=[1], logprobs=[0.0], text=t, finish=finish, sample=i) for i, t in enumerate(texts)]
    return Group(problem=problem, completions=completions, step=0)


def length_of(completions, **columns):
    return [float(len(text)) for text in completions]


def refuse_x(completions, **columns):
    """Raises on the letter x wherever it is in the batch."""
    if any("x" in text for text in completions):
        raise RuntimeError("no x")
    return length_of(completions)


@pytest.fixture(autouse=True)
def forget_logged_kinds(monkeypatch):
    monkeypatch.setattr(runner, "_logged_kinds", {})


def test_totals_are_the_weighted_sums_of_the_components():
    scores = score_groups(
        [group(LINE + "4", LINE + "5"), group("4", LINE + "-7", answer="-7")], GSM8K, require_finish=True
    )
    assert (scores.names, scores.weights) == (("format", "correctness"), (0.5, 1.0))
    assert scores.components.tolist() == [[[1, 1], [1, 0]], [[0, 0], [1, 1]]]
    assert scores.total.tolist() == [[1.5, 0.5], [0.0, 1.5]]
    assert scores.scored.all() and scores.status == [[[OK, OK]] * 2] * 2


def test_an_unfinished_completion_earns_nothing_and_is_not_shown_to_the_functions():
    def pay_all(completions, **columns):
        assert "tail" not in completions
        return [1.0] * len(completions)

    rewards = GSM8K | {"all": Reward(pay_all, 2.0)}
    cut = group(LINE + "4", "tail", finish="length")
    scores = score_groups([group("a", "b"), cut], rewards, require_finish=True)
    assert scores.total.tolist() == [[2.0, 2.0], [0.0, 0.0]]
    assert scores.components[1].tolist() == [[0.0] * 3] * 2 and scores.scored.all()
    assert scores.truncated.tolist() == [[False, False], [True, True]]
    paid = score_groups([cut], GSM8K, require_finish=False)
    assert paid.total.tolist() == [[1.5, 0.0]]


@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_running_into_the_limit_never_pays_more_than_finishing(weight):
    penalty = Reward(lambda texts, **_: [None if text == "?" else -weight * len(text) for text in texts], weight)
    texts = [(LINE + "4", "eos"), ("1234567", "stop"), ("?", "eos"), ("", "length")]
    completions = [Completion([], [], text, finish, i) for i, (text, finish) in enumerate(texts)]
    mixed = replace(group("a"), completions=completions)
    scores = score_groups([mixed], GSM8K | {"penalty": penalty}, require_finish=True)
    assert scores.components[0, 3].tolist() == [0.0, 0.0, -weight * len(texts[0][0])]
    assert scores.total[0, 3] <= scores.total[0, :3].min()
    alone = replace(mixed, completions=completions[3:])
    assert score_groups([alone], {"penalty": penalty}, require_finish=True).total.tolist() == [[0.0]]


def test_functions_get_columns_beside_the_completions_and_never_the_finish_reason():
    seen = {}

    def look(completions, **columns):
        seen.update(columns)
        return [None] * len(completions)

    groups = [group("a", "b", level=3), group("c", "d", finish="eos", answer="5", topic="sums")]
    score_groups(groups, {"look": Reward(look, 1.0)}, require_finish=True)
    assert seen == {
        "answer": ["4", "4", "5", "5"],
        "question": ["2 + 2?"] * 4,
        "prompt": ["Q: 2 + 2?"] * 4,
        "level": [3, 3, None, None],
        "topic": [None, None, "sums", "sums"],
    }


def test_an_abstaining_component_adds_nothing_and_the_others_still_count():
    rewards = {"maybe": Reward(lambda completions, **_: [None, 1.0], 4.0), "length": Reward(length_of, 1.0)}
    scores = score_groups([group("abc", "d")], rewards, require_finish=True)
    assert scores.total.tolist() == [[3.0, 5.0]] and scores.scored.all()
    assert scores.status == [[[ABSTAIN, OK], [OK, OK]]] and math.isnan(scores.components[0, 0, 0])


def test_a_completion_that_nobody_judged_is_unscored_not_scored_0_and_ends_no_run():
    """Else it would be the worst of a group whose rewards are positive, and the best of one whose are penalties."""
    rewards = {"maybe": Reward(lambda texts, **_: [-float(text) if text else None for text in texts], 2.0)}
    scores = score_groups([group("1", "", "3"), group("", "", "")], rewards, require_finish=True)
    assert scores.scored.tolist() == [[True, False, True], [False] * 3]
    assert normalise("group_mean", scores.total, scores.scored).tolist() == [[2.0, 0.0, -2.0], [0.0] * 3]
    assert scores.means()["reward"] == -4.0 and scores.means()["unscored"] == pytest.approx(4 / 6)
    refuse_unscored(scores, 0.0)
    rewards["watched"] = Reward(length_of, 0.0)  # without a weight it judges nothing
    assert score_groups([group("1", "")], rewards, require_finish=True).scored.tolist() == [[True, False]]


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_what_fails_alone_is_unscored_where_it_has_a_weight_and_the_rest_of_the_batch_is_scored(weight):
    scores = score_groups([group("ab", "axb", "abc")], {"x": Reward(refuse_x, weight)}, require_finish=True)
    assert scores.status == [[[OK], [ERROR], [OK]]]
    assert scores.scored.tolist() == [[True, weight == 0, True]]
    assert scores.total.tolist() == [[2 * weight, 0.0, 3 * weight]]


@pytest.mark.parametrize(
    "returned",
    [[], [1.0], [1.0, 2.0, 3.0], [math.nan, 1.0], [1e39, 1.0], ["a", 1.0], None, 7, {0: 1.0, 1: 2.0}, "12"],
)
def test_a_wrong_return_value_is_an_error_of_that_component_alone(returned):
    rewards = {"wrong": Reward(lambda completions, **_: returned, 1.0), "length": Reward(length_of, 1.0)}
    outcomes = score_texts(["ab", "c"], {}, rewards)
    expected = OK if returned == [1.0] else ERROR  # right for one completion, wrong for the batch
    assert [(row[0].status, row[1].value) for row in outcomes] == [(expected, 2.0), (expected, 1.0)]


def test_one_traceback_is_logged_for_each_kind_of_failure(caplog):
    def fail(completions, **columns):
        raise KeyError("verdict") if completions == ["b"] else RuntimeError("no")

    with caplog.at_level(logging.WARNING):
        score_texts(["a", "b", "c"], {}, {"fail": Reward(fail, 1.0)})
        score_texts(["a", "b", "c"], {}, {"fail": Reward(fail, 1.0)})
    assert [record.message.splitlines()[-1] for record in caplog.records] == ["RuntimeError: no", "KeyError: 'verdict'"]


def test_no_call_sees_more_completions_than_its_batch_size_and_an_async_function_is_awaited():
    seen = []

    async def look(completions, *, level, **columns):
        seen.append((completions, level))
        return [1.0] * len(completions)

    columns = {"level": [1, 2, 3], "answer": ["", "", ""]}
    outcomes = score_texts(["a", "b", "c"], columns, {"look": Reward(look, 1.0, batch_size=2)})
    assert seen == [(["a", "b"], [1, 2]), (["c"], [3])] and [row[0].value for row in outcomes] == [1.0] * 3


def test_a_step_with_too_many_unscored_completions_is_refused_with_the_share_and_the_remedy():
    scores = score_groups([group("ab", "axb", "abc", "d")], {"x": Reward(refuse_x, 1.0)}, require_finish=True)
    refuse_unscored(scores, 0.25)
    with pytest.raises(ValueError, match=r"25% .*1 errors, 0 timeouts.*max_unscored=0.2;.*raise rewards.timeout_s"):
        refuse_unscored(scores, 0.2)
    half = score_groups([group("ab", "axb"), group("x", "d")], {"x": Reward(refuse_x, 1.0)}, require_finish=True)
    refuse_unscored(half, 0.5)
    with pytest.raises(ValueError, match=r"50% .*2 errors"):
        refuse_unscored(half, 0.4)


def test_interrupting_a_reward_is_not_swallowed():
    def interrupt(completions, **columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_texts(["a"], {}, {"interrupt": Reward(interrupt, 1.0)})


def test_no_groups_give_empty_scores():
    scores = score_groups([], GSM8K, require_finish=True)
    assert scores.components.shape == (0, 0, 2) and scores.total.shape == scores.scored.shape == (0, 0)
    assert scores.lengths.shape == scores.truncated.shape == (0, 0)


def test_scores_of_all_ranks_come_in_the_order_of_the_problems_each_with_its_status():
    def scores_of(*problems):  # of two completions each
        column = torch.tensor([[10.0 * i, 10 * i + 1] for i in problems])
        status = [[[f"{i}"], [f"{i}"]] for i in problems]
        others = {"lengths": column.long() + 1, "truncated": column > 30}
        return Scores(("a",), (2.0,), column[..., None], status, total=2 * column, scored=column < 30, **others)

    merged = merge_scores([scores_of(0, 3), scores_of(1, 4), scores_of(2, 5)])  # problem i was on rank i mod 3
    for found, expected in ((merged, scores_of(*range(6))), (merged.pick([4, 0]), scores_of(4, 0))):
        assert found.status == expected.status
        for name in ("components", "total", "scored", "lengths", "truncated"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
