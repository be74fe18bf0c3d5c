"""decode_attention against a loop over rows, heads and keys in fp64."""

import math

import pytest
import torch

import kernels

PREFIX, SUFFIX, SEATS, WIDTH = 9, 6, 3, 4
GROUP, SEAT = [0, 0, 0, 1, 2, 2], [0, 1, 2, 0, 0, 1]  # three groups with 3, 1 and 2 rows left
PREFIX_LENGTHS, SUFFIX_LENGTHS = [9, 9, 9, 0, 5, 5], [1, 6, 3, 2, 4, 1]


def inputs(heads, kv_heads, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    rows, groups = len(GROUP), max(GROUP) + 1
    query = make(rows, heads, WIDTH) * 2
    prefix = (make(groups, kv_heads, PREFIX, WIDTH), make(groups, kv_heads, PREFIX, WIDTH))
    suffix = (make(rows, kv_heads, SUFFIX, WIDTH), make(rows, kv_heads, SUFFIX, WIDTH))
    return query, prefix, suffix


def attend(query, prefix, suffix, **terms):
    return kernels.decode_attention(
        query,
        prefix,
        suffix,
        seats=SEATS,
        place=torch.tensor([group * SEATS + seat for group, seat in zip(GROUP, SEAT, strict=True)]),
        prefix_lengths=torch.tensor(PREFIX_LENGTHS),
        suffix_lengths=torch.tensor(SUFFIX_LENGTHS),
        scale=0.5,
        impl="torch",
        **terms,
    )


def oracle(query, prefix, suffix, *, softcap=None, window=None):
    """One row, one head, one key at a time."""
    query, prefix, suffix = query.double(), [x.double() for x in prefix], [x.double() for x in suffix]
    output = torch.zeros_like(query)
    for row, group in enumerate(GROUP):
        p, s = PREFIX_LENGTHS[row], SUFFIX_LENGTHS[row]
        for head in range(query.shape[1]):
            shared = head * suffix[0].shape[1] // query.shape[1]
            keys = [*prefix[0][group, shared, :p], *suffix[0][row, shared, :s]][-(window or p + s) :]
            values = [*prefix[1][group, shared, :p], *suffix[1][row, shared, :s]][-(window or p + s) :]
            scores = [0.5 * float(query[row, head] @ key) for key in keys]
            if softcap:
                scores = [softcap * math.tanh(score / softcap) for score in scores]
            total = sum(map(math.exp, scores))
            for score, value in zip(scores, values, strict=True):
                output[row, head] += math.exp(score) / total * value
    return output


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize("terms", [{}, {"window": 4}, {"window": 1}, {"softcap": 1.5}, {"softcap": 1.5, "window": 7}])
def test_it_is_one_softmax_over_prefix_and_suffix(heads, kv_heads, terms):
    given = inputs(heads, kv_heads)
    assert (attend(*given, **terms) - oracle(*given, **terms)).abs().max() < 2e-6


def test_bf16_scores_are_not_rounded_before_the_softmax():
    query, prefix, suffix = inputs(4, 2, dtype=torch.bfloat16, seed=4)
    query = query * 8  # scores near 10, where bf16 numbers lie 0.06 apart
    output = attend(query, prefix, suffix)
    assert output.dtype == torch.bfloat16
    # Measured: 0.008; with scores rounded to bf16, 0.079.
    assert (output.double() - oracle(query, prefix, suffix)).abs().max() < 0.02


def test_what_is_stored_beyond_a_length_has_no_effect():
    query, prefix, suffix = inputs(4, 2)
    clean = attend(query, prefix, suffix)
    for row, group in enumerate(GROUP):
        for tensor in prefix:
            tensor[group, :, PREFIX_LENGTHS[row] :] = 1e4
        for tensor in suffix:
            tensor[row, :, SUFFIX_LENGTHS[row] :] = -1e4
    assert torch.equal(attend(query, prefix, suffix), clean)
