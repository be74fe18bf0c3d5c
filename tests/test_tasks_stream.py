"""The problem stream: epochs are permutations, seeds differ, and its state is enough to go on."""

import pytest

from grpo.records import Problem
from grpo.tasks.stream import ENDLESS_STRIDE, ProblemStream

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
    first, second = (ProblemStream(Endless(), seed=seed).take(3) for seed in (0, 1))
    assert ids(first) == [str(ENDLESS_STRIDE + i) for i in range(3)]
    assert ids(second) == [str(2 * ENDLESS_STRIDE + i) for i in range(3)]
    assert [problem.index for problem in second] == [0, 1, 2]


@pytest.mark.parametrize("problems", [TEN, Endless()])
def test_a_loaded_stream_goes_on_where_the_saved_one_stood(problems):
    stream, resumed = ProblemStream(problems, seed=5), ProblemStream(problems, seed=5)
    stream.take(17)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.take(8) == stream.take(8)


def test_a_state_of_another_stream_is_refused():
    state = ProblemStream(TEN, seed=0).state_dict()
    with pytest.raises(ValueError, match="seed=0, this run seed=1"):
        ProblemStream(TEN, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="problems=10, this run problems=9"):
        ProblemStream(TEN[:9], seed=0).load_state_dict(state)
