"""sample_token against hand-worked numbers and an fp64 oracle; the dispatch table."""

import math

import pytest
import torch

import kernels
from kernels.sample_token.reference import truncate


def draw(probs, uniforms, *, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
    """Tokens and log-probs for one distribution and many uniforms."""
    logits = torch.tensor(probs).log().expand(len(uniforms), -1)
    uniforms = torch.tensor(uniforms, dtype=torch.float64)
    options = dict(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    token, logprob = kernels.sample_token(logits, uniforms, **options, impl="auto")
    return token.tolist(), logprob.tolist()


def test_a_uniform_picks_the_token_whose_share_of_the_cdf_it_falls_into():
    token, logprob = draw([0.1, 0.2, 0.3, 0.4], [0.05, 0.25, 0.35, 0.59, 0.61, 0.999])
    assert token == [0, 1, 2, 2, 3, 3]
    assert logprob == pytest.approx([math.log(p) for p in (0.1, 0.2, 0.3, 0.3, 0.4, 0.4)], abs=1e-6)
    assert draw([0.5, 0.5], [0.5 - 1e-12, 0.5])[0] == [0, 1]  # the border belongs to the token above it


def test_temperature_one_half_squares_the_odds_and_the_log_prob_says_so():
    # p = [1/4, 3/4] at T = 1/2 becomes [1, 9] / 10.
    token, logprob = draw([0.25, 0.75], [0.09, 0.11], temperature=0.5)
    assert token == [0, 1]
    assert logprob == pytest.approx([math.log(0.1), math.log(0.9)], abs=1e-6)


def test_top_k_keeps_the_k_most_likely_and_log_probs_are_renormalised():
    token, logprob = draw([0.1, 0.2, 0.3, 0.4], [0.01, 0.42, 0.44], top_k=2)  # 3/7, 4/7
    assert token == [2, 2, 3]
    assert logprob == pytest.approx([math.log(3 / 7), math.log(3 / 7), math.log(4 / 7)], abs=1e-6)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probs = [0.05, 0.5, 0.15, 0.3]
    token, logprob = draw(probs, [0.0001, 0.62, 0.63, 0.9999], top_p=0.75)  # 0.5 + 0.3: 5/8, 3/8
    assert token == [1, 1, 3, 3]
    assert logprob == pytest.approx([math.log(5 / 8)] * 2 + [math.log(3 / 8)] * 2, abs=1e-6)
    assert set(draw(probs, [0.01, 0.3, 0.6, 0.99], top_p=0.85)[0]) == {1, 2, 3}
    assert set(draw(probs, [0.01, 0.3, 0.6, 0.99], top_p=0.01)[0]) == {1}


def test_top_p_applies_to_what_top_k_left():
    # top_k=2 leaves 4/7 and 3/7; 4/7 alone reaches 0.5, though 0.4 of the whole does not.
    assert set(draw([0.1, 0.2, 0.3, 0.4], [0.01, 0.5, 0.99], top_k=2, top_p=0.5)[0]) == {3}


def test_min_p_keeps_what_is_at_least_that_share_of_the_most_likely():
    token, logprob = draw([0.1, 0.21, 0.29, 0.4], [0.01, 0.23, 0.25, 0.55, 0.56, 0.99], min_p=0.5)  # 0.21, 0.29, 0.4
    assert token == [1, 1, 2, 2, 3, 3]
    assert logprob == pytest.approx([math.log(p / 0.9) for p in (0.21, 0.21, 0.29, 0.29, 0.4, 0.4)], abs=1e-6)
    assert set(draw([0.1, 0.2, 0.3, 0.4], [0.01, 0.5, 0.99], min_p=1.0)[0]) == {3}


def test_min_p_looks_at_tempered_probabilities_and_after_top_k_and_top_p():
    # At T = 2 the square roots of 0.04, 0.32, 0.64 count: 0.2 / 0.8 = 0.25 stays, though 0.04 / 0.64 would not.
    assert set(draw([0.04, 0.32, 0.64], [0.01, 0.4, 0.99], temperature=2.0, min_p=0.24)[0]) == {0, 1, 2}
    assert set(draw([0.04, 0.32, 0.64], [0.01, 0.4, 0.99], temperature=2.0, min_p=0.24, top_k=2)[0]) == {1, 2}


def test_equal_logits_never_make_top_k_keep_more_than_k():
    kept = truncate(torch.zeros(1, 7), top_p=1.0, top_k=3).isfinite()
    assert kept.tolist() == [[True] * 3 + [False] * 4]


def test_greedy_takes_the_argmax_and_its_log_prob_under_the_whole_untempered_distribution():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.6, 0.2, 0.1, 0.1]]).log()
    token, logprob = kernels.sample_token(logits, torch.rand(2), temperature=0.0, top_p=0.1, top_k=1, impl="torch")
    assert token.tolist() == [3, 0]
    assert logprob.tolist() == pytest.approx([math.log(0.4), math.log(0.6)], abs=1e-6)


def test_evenly_spaced_uniforms_reproduce_the_distribution():
    probs = torch.softmax(torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2, 0)
    count = 20_000
    token, _ = draw(probs.tolist(), ((torch.arange(count) + 0.5) / count).tolist())
    share = torch.bincount(torch.tensor(token), minlength=50) / count
    assert (share - probs).abs().max() <= 1.5 / count  # each border lies between two neighbours of the grid


def test_tokens_of_probability_zero_are_never_drawn():
    token, _ = draw([0.0, 0.5, 0.0, 0.5, 0.0], [1e-16, 0.4999999, 0.5000001, 1 - 2.0**-53])
    assert token == [1, 1, 3, 3]


def test_the_tail_of_a_large_vocabulary_is_reached_token_by_token():
    # 149,999 tokens share 1e-4. Each adds 7e-10 to a sum near 1, where fp32 numbers lie 6e-8 apart.
    logits = torch.full((1, 150_000), math.log(1e-4 / 149_999))
    logits[:, 0] = math.log(1 - 1e-4)
    uniforms = 1 - 5e-5 + torch.arange(40, dtype=torch.float64) * 1e-4 / 149_999
    token, _ = kernels.sample_token(logits.expand(40, -1), uniforms, temperature=1.0, top_p=1.0, top_k=0, impl="auto")
    assert token.diff().tolist() == [1] * 39
    assert abs(token[0].item() - 75_000) < 200  # the fp32 softmax itself moves borders by about 1e-7


def test_auto_resolves_to_torch_and_says_why():
    table = kernels.dispatch_table("auto", "cpu")
    assert set(table) == set(kernels.OPS)
    assert all(choice.impl == "torch" and "Triton" in choice.why for choice in table.values())


def test_asking_for_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="sample_token has no Triton kernel; use impl=auto"):
        kernels.sample_token(torch.zeros(1, 2), torch.zeros(1), temperature=0.0, top_p=1.0, top_k=0, impl="triton")
    with pytest.raises(ValueError, match="impl='cuda' is none of auto, torch, triton"):
        kernels.resolve("sample_token", "cuda", "cpu")
