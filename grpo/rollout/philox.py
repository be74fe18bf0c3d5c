"""The random numbers that tokens are drawn with.

A random number is a pure function of (seed, training step, problem, sample, token position, stream): never of rank,
slot, batch or order. So the same completion is drawn whichever rank draws it, and whatever is drawn beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_NUMBERS_AT_ONCE = 2**20  # the arithmetic takes some 30 times the memory of its result
TRAINING, EVALUATION = 0, 1  # streams: a word of the random counter, so that the two never share numbers


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): four random 32-bit words per counter.

    counter: [..., 4] int64 words in [0, 2**32); key: two such words.  Returns [..., 4] int64. Integer arithmetic only,
    so the numbers are the same on every device.
    """
    mask = 0xFFFFFFFF
    a, b, c, d = counter.unbind(-1)
    low_key, high_key = key
    for _ in range(10):
        # The product may overflow into the sign bit: its 64 bits are right, and the mask removes the extended sign.
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32 & mask) ^ b ^ low_key, right & mask, (left >> 32 & mask) ^ d ^ high_key, left & mask
        low_key, high_key = (low_key + 0x9E3779B9) & mask, (high_key + 0xBB67AE85) & mask
    return torch.stack([a, b, c, d], -1)


def refuse_large_words(**words: int) -> None:
    """ValueError for the first of these that does not fit a 32-bit word of the random key or counter."""
    for name, word in words.items():
        if not 0 <= word < 2**32:
            raise ValueError(f"{name}={word} must be from 0 to {2**32 - 1}")


def uniforms(
    problems: list[int], group_size: int, positions: int, *, seed: int, step: int, stream: int, device: torch.device
) -> Tensor:
    """One number in (0, 1) for each sampled token: key (seed, step), counter (problem, sample, position, stream).

    problems: global indices.  Returns [len(problems) * group_size, positions] fp64, 52 random bits each.
    """
    word = lambda values: torch.tensor(values, dtype=torch.int64, device=device)
    sample, position = (torch.arange(count, device=device) for count in (group_size, positions))
    numbers = torch.empty(len(problems), group_size, positions, dtype=torch.float64, device=device)
    per_chunk = max(1, MAX_NUMBERS_AT_ONCE // (group_size * positions))
    for start in range(0, len(problems), per_chunk):
        chunk = slice(start, start + per_chunk)
        counter = (word(problems[chunk])[:, None, None], sample[:, None], position, word(stream))
        words = philox(torch.stack(torch.broadcast_tensors(*counter), -1), (seed, step))
        numbers[chunk] = ((words[..., 0] << 20 | words[..., 1] >> 12).double() + 0.5) * 2.0**-52
    return numbers.flatten(0, 1)
