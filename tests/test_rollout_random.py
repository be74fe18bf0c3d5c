"""Philox against its published vectors; which numbers a completion gets."""

import pytest
import torch

from grpo.config import RolloutConfig
from grpo.config_check import outside_intervals
from grpo.rollout import philox as philox_module
from grpo.rollout.philox import philox, refuse_large_words, uniforms

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # counter, key, words: kat_vectors of Random123 (Salmon et al., SC 2011), philox4x32 with 10 rounds
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def draw(problems=(0, 1), group_size=2, positions=3, seed=5, step=9, stream=0):
    device = torch.device("cpu")
    return uniforms(list(problems), group_size, positions, seed=seed, step=step, stream=stream, device=device)


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, words):
    assert philox(torch.tensor(counter), tuple(key)).tolist() == words


def test_philox_of_many_counters_is_philox_of_each():
    counters = torch.randint(0, 2**32, (5, 3, 4), generator=torch.Generator().manual_seed(0))
    together = philox(counters, (1, 2))
    assert all(torch.equal(together[i, j], philox(counters[i, j], (1, 2))) for i in range(5) for j in range(3))


def test_a_number_is_its_counters_first_52_bits():
    numbers = draw(problems=[7, 4], group_size=2, positions=3, seed=5, step=9, stream=1)
    first, second, *_ = philox(torch.tensor([4, 1, 2, 1]), (5, 9)).tolist()
    assert numbers[3, 2].item() == (((first << 32 | second) >> 12) + 0.5) / 2**52


def test_numbers_depend_on_problem_and_sample_only_not_on_company_or_length():
    alone, together = draw(problems=[8]), draw(problems=[3, 8], positions=5, group_size=4)
    assert torch.equal(alone, together[4:6, :3])


@pytest.mark.parametrize("together", [1, 11, 12, 13, 24])
def test_numbers_made_a_few_problems_at_a_time_are_the_same(together, monkeypatch):
    expected = draw(problems=range(5), positions=6)
    monkeypatch.setattr(philox_module, "MAX_NUMBERS_AT_ONCE", together)
    assert torch.equal(draw(problems=range(5), positions=6), expected)


def test_never_more_numbers_are_at_work_than_a_bound(monkeypatch):
    sizes = []
    spied = lambda counter, key: sizes.append(counter.numel() // 4) or philox(counter, key)
    monkeypatch.setattr(philox_module, "philox", spied)
    draw(problems=range(40), group_size=16, positions=16_385)
    assert max(sizes) <= philox_module.MAX_NUMBERS_AT_ONCE and sum(sizes) == 40 * 16 * 16_385


@pytest.mark.parametrize("change", [{"seed": 6}, {"step": 10}, {"stream": 1}, {"problems": (2, 3)}])
def test_every_word_of_the_key_and_counter_changes_every_number(change):
    assert (draw() != draw(**change)).all()


def test_numbers_are_uniform_and_never_0_or_1():
    numbers = draw(problems=range(100), group_size=10, positions=100).flatten()
    assert numbers.min() > 0 and numbers.max() < 1
    # Kolmogorov-Smirnov: sqrt(n) * distance is below 1.95 with probability 0.999.
    n = len(numbers)
    distance = (numbers.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance * n**0.5 < 1.95


@pytest.mark.parametrize("word", [-1, 2**32])
def test_a_word_that_does_not_fit_is_refused(word):
    refuse_large_words(seed=0, step=2**32 - 1)
    with pytest.raises(ValueError, match=f"step={word} must be from 0 to 4294967295"):
        refuse_large_words(seed=0, step=word)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"top_p": 0.0}, "top_p=0.0 is outside (0, 1]"),
        ({"top_p": 1.1}, "top_p=1.1 is outside (0, 1]"),
        ({"top_k": -1}, "top_k=-1 is outside [0, inf)"),
        ({"min_p": 1.1}, "min_p=1.1 is outside [0, 1]"),
        ({"temperature": -0.5}, "temperature=-0.5 is outside [0, inf)"),
        ({"temperature": float("nan")}, "temperature=nan is outside [0, inf)"),
        ({"group_size": 0}, "group_size=0 is outside [1, inf)"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is outside [1, inf)"),
    ],
)
def test_impossible_sampling_is_refused(change, message):
    assert list(outside_intervals(RolloutConfig(**change), "rollout.")) == [f"rollout.{message}; choose a value inside"]
    assert not list(outside_intervals(RolloutConfig(temperature=0.0, top_p=0.9, top_k=5, min_p=0.1)))
