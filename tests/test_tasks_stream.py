"""The problem stream: epochs are permutations, a curriculum leaves problems out, and its state is enough to go on."""

import math
import random
from dataclasses import replace

import pytest
import torch

from grpo.records import TENSOR_FIELDS, Problem, Scores
from grpo.tasks.stream import ENDLESS_STRIDE, ProblemStream, target_rate

TEN = [Problem(id=str(i), question=f"{i}?", answer=str(i)) for i in range(10)]


class Endless:
    endless = True

    def __getitem__(self, i):
        return Problem(id=str(i), question="", answer="")


def ids(problems):
    return [problem.id for problem in problems]


def test_every_epoch_is_a_fresh_permutation_and_index_counts_on():
    drawn = ProblemStream(TEN, seed=0).take(30)
    epochs = [ids(drawn[i : i + 10]) for i in (0, 10, 20)]
    assert all(sorted(epoch) == ids(TEN) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, ids(TEN)]}) == 4
    assert [problem.index for problem in drawn] == list(range(30))


def test_the_stream_depends_on_the_seed_and_not_on_the_size_of_the_takes():
    stream = ProblemStream(TEN, seed=0)
    assert [p for n in (3, 1, 14, 7) for p in stream.take(n)] == ProblemStream(TEN, seed=0).take(25)
    assert ids(ProblemStream(TEN, seed=1).take(10)) != ids(ProblemStream(TEN, seed=0).take(10))


def test_an_endless_split_is_read_in_order_and_no_two_seeds_share_problems():
    streams = [ProblemStream(Endless(), seed=seed) for seed in (0, 1)]
    first, second = (stream.take(3) for stream in streams)
    assert ids([*first, *streams[0].take(2)]) == [str(ENDLESS_STRIDE + i) for i in range(5)]
    assert ids(second) == [str(2 * ENDLESS_STRIDE + i) for i in range(3)]
    assert [problem.index for problem in second] == [0, 1, 2]


@pytest.mark.parametrize("problems", [TEN, Endless()])
def test_a_loaded_stream_goes_on_where_the_saved_one_stood(problems):
    stream, resumed = ProblemStream(problems, seed=5), ProblemStream(problems, seed=5)
    stream.take(17)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.take(8) == stream.take(8)


def visit(stream, count, rate_of):
    """Takes one problem after the other; what was taken, as the digits of their ids."""
    taken = []
    for _ in range(count):
        (problem,) = stream.take(1)
        stream.remember([rate_of(int(problem.id))])
        taken.append(problem.id)
    return "".join(taken)


def test_solved_problems_are_left_out_of_later_epochs_until_none_is_left():
    stream = ProblemStream(TEN, seed=0, curriculum="drop_solved")
    first = visit(stream, 10, lambda i: 1.0 if i < 7 else 0.875)
    second = visit(stream, 3, lambda i: 1.0 if i == 7 else 0.0)
    third = visit(stream, 2, lambda i: 1.0)
    assert [sorted(epoch) for epoch in (first, second, third)] == [list("0123456789"), list("789"), list("89")]
    assert stream.metrics() == {"problems/epoch": 3, "problems/solved": 1.0, "problems/skipped": 0.8}
    assert sorted(visit(stream, 10, lambda i: 1.0)) == list("0123456789")


def test_a_problem_is_visited_the_more_often_the_nearer_its_rate_is_to_the_target():
    # target 0.5: distances 0.5, 0.3, 0, 0.5 of at most 0.5 -> chances 0 (raised to 0.1), 0.4, 1, 0.1; a new one 1
    rates, rng = torch.tensor([0.0, 0.2, 0.5, 1.0, torch.nan]), random.Random(0)
    kept = torch.stack([target_rate(rates, 0.5, rng) for _ in range(4000)]).float().mean(0)
    assert kept.tolist() == pytest.approx([0.1, 0.4, 1, 0.1, 1], abs=0.02)
    # target 0.8: of at most 0.8, rate 0 is 0.8 away, 0.4 half of it, 1 a quarter
    kept = torch.stack([target_rate(torch.tensor([0.0, 0.4, 1.0]), 0.8, rng) for _ in range(4000)]).float().mean(0)
    assert kept.tolist() == pytest.approx([0.1, 0.5, 0.75], abs=0.02)


def test_without_a_curriculum_what_is_remembered_changes_nothing():
    stream = ProblemStream(TEN, seed=0)
    assert visit(stream, 30, lambda i: i / 9) == "".join(ids(ProblemStream(TEN, seed=0).take(30)))


def test_a_stream_over_other_problems_is_not_gone_on_with():
    state, others = ProblemStream(TEN, seed=0).state_dict(), [replace(problem, answer="?") for problem in TEN]
    with pytest.raises(ValueError, match="has data=.* resume with the same data and seed"):
        ProblemStream(others, seed=0).load_state_dict(state)
    del state["data"]  # as checkpoints were before they had it
    ProblemStream(others, seed=0).load_state_dict(state)


@pytest.mark.parametrize("curriculum", ["drop_solved", "target_rate"])
def test_a_loaded_stream_remembers_what_the_saved_one_knew(curriculum):
    stream, resumed = (ProblemStream(TEN, seed=5, curriculum=curriculum) for _ in range(2))
    rate_of = lambda i: i % 3 / 2
    visit(stream, 14, rate_of)
    resumed.load_state_dict(stream.state_dict())
    assert visit(resumed, 40, rate_of) == visit(stream, 40, rate_of)
    assert resumed.metrics() == stream.metrics()


def test_a_state_has_no_list_of_all_problems_but_lists_of_older_checkpoints_are_gone_on_with():
    """A checkpoint copies, pickles and reads back a list entry by entry: of a million for seconds."""
    stream, resumed = (ProblemStream(TEN, seed=5, curriculum="drop_solved") for _ in range(2))
    visit(stream, 14, lambda i: i % 3 / 2)
    state = stream.state_dict()
    assert not any(isinstance(value, list) for value in state.values())
    rates = [None if math.isnan(rate) else rate for rate in state["rates"].tolist()]
    resumed.load_state_dict(state | {"rates": rates, "queue": state["queue"].tolist()})
    visit(stream, 20, lambda i: 1.0)
    assert visit(resumed, 20, lambda i: 1.0) and resumed.metrics() == stream.metrics()
    stream.load_state_dict(state)
    assert stream.rates.data_ptr() != state["rates"].data_ptr(), "not the memory that is mapped from a file"


def test_an_endless_split_has_no_curriculum():
    with pytest.raises(
        ValueError, match="data.curriculum=drop_solved: .* is endless, so no problem is ever seen twice"
    ):
        ProblemStream(Endless(), seed=0, curriculum="drop_solved")


def test_a_pass_rate_counts_full_marks_among_the_completions_that_were_judged():
    nan = torch.nan
    marks = torch.tensor([[1.0, 0.5, 0.0, 1.0], [nan, 1.0, nan, 1.0], [nan, nan, nan, nan]])
    columns = dict.fromkeys(TENSOR_FIELDS) | {"components": torch.stack([torch.zeros(3, 4), marks], -1)}
    scores = Scores(names=("format", "correctness"), weights=(1.0, 1.0), status=[], **columns)
    assert scores.pass_rates("correctness") == [0.5, 1.0, None]
    stream = ProblemStream(TEN[:3], seed=0)
    places = [int(problem.id) for problem in stream.take(3)]
    stream.remember([0.25, 0.5, 0.75])
    stream.take(3)
    stream.remember([None, None, None])
    assert [stream.rates[place] for place in places] == [0.25, 0.5, 0.75]


def test_a_state_of_another_stream_is_refused():
    state = ProblemStream(TEN, seed=0).state_dict()
    with pytest.raises(ValueError, match="seed=0, this run seed=1"):
        ProblemStream(TEN, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="problems=10, this run problems=9"):
        ProblemStream(TEN[:9], seed=0).load_state_dict(state)
