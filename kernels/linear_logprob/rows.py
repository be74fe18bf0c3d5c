"""A chunk of logits -> log-prob and entropy of each row, then, in the same memory, the gradient of any loss of them.

Two steps, because the loss lies between them and is ordinary PyTorch. With z = cap(logits) / temperature, p =
softmax(z), H = -sum_v p_v log p_v, and a loss whose derivatives are g by the log-prob and h by the entropy:

    d loss / d logits_v = (g ([v = target] - p_v) - h p_v (log p_v + H)) cap'(logits_v) / temperature

Here in PyTorch; kernel.py has the same two functions in Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Elements worked on together: they stay in the cache of a CPU; a GPU wants few launches.
BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


class Temper(NamedTuple):
    """What is done to logits before the softmax: z = softcap * tanh(logits / softcap) / temperature."""

    temperature: float
    softcap: float | None = None  # None: z = logits / temperature


class RowStatistics(NamedTuple):
    """Log-prob of the target and entropy, both [R] fp32; `saved` is for `gradients` of the same implementation."""

    logprobs: Tensor
    entropy: Tensor
    saved: tuple[Tensor, ...]


class Rows(NamedTuple):
    """One implementation of the work on rows. `forward` is a whole head without gradient; None: chunk by chunk."""

    statistics: Callable[[Tensor, Tensor, Temper], RowStatistics]
    gradients: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, Tensor]] | None = None


def statistics(logits: Tensor, target: Tensor, temper: Temper) -> RowStatistics:
    """Log-prob and entropy of each row. logits: [R, V] fp32 or fp64, overwritten by log p; target: [R] int64."""
    lse, entropy = torch.empty_like(logits[:, :1]), torch.empty_like(logits[:, 0])
    for rows in _blocks(logits):
        z = _temper_(logits[rows], temper)
        top = z.amax(-1, keepdim=True)
        exp = torch.exp(z.sub_(top))  # after subtracting the largest: logits of 1e4 keep their precision
        total = exp.sum(-1, keepdim=True)
        entropy[rows] = (total.log() - torch.linalg.vecdot(exp, z)[:, None] / total)[:, 0]
        lse[rows] = top + total.log()
        z.sub_(total.log())
    return RowStatistics(logits.gather(1, target[:, None])[:, 0], entropy, (logits, lse))


def gradients(
    found: RowStatistics, target: Tensor, temper: Temper, g: Tensor, h: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """d loss / d logits as [R, V] of `dtype`, in the memory of the logits where the dtype is theirs.

    g, h: [R], derivatives of the loss by log-prob and by entropy; h None where the entropy has no part in the loss.
    """
    logprobs, lse = found.saved
    for rows in _blocks(logprobs):
        block, by_logprob = logprobs[rows], (g[rows] / temper.temperature)[:, None]
        slope = _cap_slope(block + lse[rows], temper) if temper.softcap is not None else None
        factor = by_logprob
        if h is not None:
            factor = (block + found.entropy[rows, None]).mul_(h[rows, None] / temper.temperature).add_(by_logprob)
        block.exp_().mul_(factor).neg_().scatter_add_(1, target[rows, None], by_logprob)
        if slope is not None:
            block.mul_(slope)
    return logprobs.to(dtype)


def _blocks(logits: Tensor) -> list[slice]:
    height = max(1, BLOCK_ELEMENTS[logits.device.type] // logits.shape[1])
    return [slice(start, start + height) for start in range(0, len(logits), height)]


def _temper_(logits: Tensor, temper: Temper) -> Tensor:
    if temper.softcap is not None:
        return logits.div_(temper.softcap).tanh_().mul_(temper.softcap / temper.temperature)
    return logits if temper.temperature == 1 else logits.div_(temper.temperature)


def _cap_slope(z: Tensor, temper: Temper) -> Tensor:
    """cap'(logits) = 1 - tanh^2(logits / softcap), from z = cap(logits) / temperature."""
    return 1 - (z * (temper.temperature / temper.softcap)).square_()


TORCH = Rows(statistics, gradients)
