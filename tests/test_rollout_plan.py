"""How much is decoded at a time: the plan of the slab, its budget, its state, and what becomes of the memory."""

import gc
import weakref

import pytest
import torch

from grpo.rollout import engine, slab
from grpo.rollout.schedule import bucket
from grpo.rollout.slab import GIB, KVSlab, Plan, make_plan
from tests.rollout_helpers import EOS, ids_of, problems, sampler, tiny_model

LENGTHS = (17, 30, 1, 5, 22)
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # key and value, 2 layers, 2 heads of width 8, fp32
KIB = 1024


@pytest.fixture(scope="module")
def model():
    """A Qwen2 where 24 of 260 ids end a sequence, so that lengths are ragged."""
    model = tiny_model("qwen2")
    model.generation_config.eos_token_id = [EOS, *range(0, 230, 10)]
    return model


@pytest.fixture
def slabs(monkeypatch):
    """Every slab that is made: its bytes and whether it lives."""
    made = []

    class Recorded(KVSlab):
        def __init__(self, *args):
            super().__init__(*args)
            made.append((sum(x.nbytes for layer in self.layers.values() for x in layer), weakref.ref(self)))

    monkeypatch.setattr(engine, "KVSlab", Recorded)
    return made


def plan(budget, **changes):
    settings = dict(
        num_problems=10, group_size=4, max_rows=100, longest_prefix=100, suffix_size=33, bucket=lambda rows: rows
    )
    return make_plan(10, budget, **{**settings, **changes})


def test_without_a_limit_all_rows_are_decoded_together():
    assert plan(10**9) == Plan(num_problems=10, num_rows=40, num_groups=10, prefix_size=128, suffix_size=33)
    assert plan(10**9, max_rows=23).num_rows == 23
    assert plan(10**9, max_rows=23).num_groups == 10  # twice the 5 groups that fill 23 rows


def test_of_long_completions_last_rows_of_many_groups_keep_their_prefixes_while_others_come_in():
    long = dict(num_problems=100, max_rows=23, suffix_size=501)
    rows = 10 * 23 * 501  # bytes
    assert plan(10**9, **long).num_groups == 20  # four times the 5 that fill 23 rows: 20 * 128 tokens beside 23 * 501
    assert plan(rows + 10 * 19 * 128, **long).num_groups == 10
    assert plan(rows + 10 * 9 * 128, **long).num_groups == 6  # 23 rows, idle ones too, have a seat in 6
    assert {plan(rows + 10 * count * 128, **long).num_rows for count in (6, 9, 19, 99)} == {23}  # never for rows
    assert plan(10**9, **{**long, "suffix_size": 445}).num_groups == 10  # prefixes would be more than a quarter


@pytest.mark.parametrize("budget", range(2600, 27_000, 1111))
def test_a_plan_has_the_most_rows_that_fit(budget):
    found = plan(budget)
    assert found.num_bytes(10) <= budget
    one_more = found.num_rows + 1  # with no more groups than its rows fill
    assert one_more > 40 or 10 * (-(-one_more // 4) * 128 + one_more * 33) > budget


def test_rows_in_buckets_all_have_a_seat():
    for max_rows in range(4, 100):
        found = plan(10**9, max_rows=max_rows, bucket=bucket)
        assert found.num_rows == bucket(min(max_rows, 40)) <= found.num_groups * 4


def test_a_budget_too_small_for_one_group_says_how_much_one_needs():
    with pytest.raises(ValueError, match=r"4 completions of 32 tokens plus a prompt of 101 need 2.42e-06 GiB") as error:
        plan(10 * (128 + 4 * 33) - 1)  # 2,600 bytes
    assert "budget of 2.42e-06 GiB cannot hold one group" in str(error.value) and "raise rollout.kv_gib" in str(
        error.value
    )


@pytest.mark.parametrize("kib", [27, 40, 60, 100])
def test_a_budget_is_never_exceeded_and_changes_no_token(model, slabs, kib):
    made = problems(*LENGTHS)
    expected = ids_of(sampler(model).generate(made, step=1))
    engine_ = sampler(model, kv_gib=kib * KIB / GIB)
    assert ids_of(engine_.generate(made, step=1)) == expected
    assert slabs[-1][0] == engine_.planned_bytes() <= kib * KIB
    assert engine_.plan.num_rows < 15 or kib == 100


def test_without_a_limit_the_budget_is_a_share_of_the_memory(model, monkeypatch):
    limited, free = sampler(model, kv_gib=0.3 * 200 * KIB / GIB), sampler(model)
    monkeypatch.setattr(slab, "total_memory", lambda device: 200 * KIB)
    for each in (limited, free):
        each.generate(problems(*LENGTHS), step=1)
    assert free.plan == limited.plan and free.plan.num_rows < 15


def test_one_group_that_does_not_fit_is_refused_by_the_sampler_too(model):
    with pytest.raises(ValueError, match="cannot hold one group: 3 completions of 12 tokens plus a prompt of 30"):
        sampler(model, kv_gib=25 * KIB / GIB).generate(problems(*LENGTHS), step=0)  # 64 + 3 * 13 tokens: 25.75 KiB


def test_the_slab_has_the_planned_size_and_is_freed_with_the_call_also_by_one_that_raises(model, slabs):
    engine_ = sampler(model, max_sequences=7)
    engine_.generate(problems(*LENGTHS), step=0)
    # 4 groups (twice 7 // 3) of 29 prefix tokens, rounded up to 64; 7 rows of 12 + 1.
    assert [size for size, _ in slabs] == [TOKEN_BYTES * (4 * 64 + 7 * 13)]
    gc.collect()
    assert slabs[0][1]() is None
    engine_.progress = lambda done, total: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine_.generate(problems(*LENGTHS), step=1)
    gc.collect()
    assert len(slabs) == 2 and slabs[1][1]() is None


def test_a_slab_is_kept_on_cuda_alone_and_up_to_a_fifth_of_its_memory(monkeypatch):
    monkeypatch.setattr(slab, "total_memory", lambda device: 100)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert slab.is_kept(20, cuda) and not slab.is_kept(21, cuda) and not slab.is_kept(1, cpu)


def test_a_slab_that_is_kept_is_made_once_and_released_on_demand(model, slabs, monkeypatch):
    monkeypatch.setattr(engine, "is_kept", lambda num_bytes, device: num_bytes == slabs[0][0])
    warm = sampler(model)
    first = ids_of(warm.generate(problems(*LENGTHS), step=1))
    assert ids_of(warm.generate(problems(*LENGTHS), step=1)) == first
    assert len(slabs) == 1
    held = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: (gc.collect(), held.append(slabs[0][1]())))
    warm.release()
    assert held == [None], "what CUDA is asked to give back is free by then"
    assert ids_of(warm.generate(problems(*LENGTHS), step=1)) == first


def test_a_resumed_sampler_takes_turns_as_the_first_one_would_have_to_the_bit(model):
    limits = dict(kv_gib=60 * KIB / GIB)
    first = sampler(model, **limits)
    first.generate(problems(100, 3), step=0)  # a long prompt: from now on there is room for fewer rows
    expected = first.generate(problems(*LENGTHS), step=1)
    resumed, fresh = sampler(model, **limits), sampler(model, **limits)
    resumed.load_state_dict(first.state_dict())
    assert resumed.generate(problems(*LENGTHS), step=1) == expected
    fresh.generate(problems(*LENGTHS), step=1)
    assert resumed.plan == first.plan != fresh.plan
    assert sampler(model).state_dict()["plan"] is None
    for changed in (
        {"kv_gib": 50 * KIB / GIB},  # out of memory, say
        {**limits, "max_sequences": 6},
        {**limits, "group_size": 2},
    ):
        other = sampler(model, **changed)
        other.load_state_dict(first.state_dict())
        assert other.plan is None
    fresh.load_state_dict({"plan": first.state_dict()["plan"]})  # of a checkpoint that told no limits
    assert fresh.plan == first.plan
    fresh.load_state_dict(sampler(model, **limits).state_dict())  # of a run that had not sampled
    assert fresh.plan is None


def test_planned_bytes_count_every_layer_in_its_own_dtype(model):
    engine_ = sampler(tiny_model("qwen2").to(torch.bfloat16))
    assert engine_.planned_bytes() == 0
    engine_.generate(problems(9), step=0)
    assert engine_.planned_bytes() == TOKEN_BYTES // 2 * (64 + 3 * 13)
