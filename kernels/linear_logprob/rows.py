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

# Elements processed at a time: few enough to stay in a CPU's cache; on a GPU many, for few launches.
BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


class LogitTransform(NamedTuple):
    """What is done to logits before the softmax: z = softcap * tanh(logits / softcap) / temperature."""

    temperature: float
    softcap: float | None = None  # None: z = logits / temperature


class RowStatistics(NamedTuple):
    """Log-prob of the target and entropy, [R], fp32 or fp64; `saved` is for `gradients` of the same implementation."""

    logprobs: Tensor
    entropy: Tensor
    saved: tuple[Tensor, ...]


class RowOps(NamedTuple):
    """One implementation of the work on rows.

    fused: the matmul and `statistics` in one, (hidden, weight, bias, target, transform, buffer) -> RowStatistics; None
    if there is no such kernel. buffer: [R, V] fp16, keeps the logits for `gradients`; None if those are not needed.
    """

    statistics: Callable[[Tensor, Tensor, LogitTransform], RowStatistics]
    gradients: Callable[..., Tensor]
    fused: Callable[..., RowStatistics] | None = None


def statistics(logits: Tensor, target: Tensor, transform: LogitTransform) -> RowStatistics:
    """Log-prob and entropy of each row. logits: [R, V] fp32 or fp64, overwritten by e^(z - max z)."""
    logprobs, entropy, top, total = (torch.empty_like(logits[:, 0]) for _ in range(4))
    for rows in _blocks(logits):
        z = _transform_(logits[rows], transform)
        top[rows] = z.amax(-1)
        z = z - top[rows, None]  # logits of 1e4 keep their precision
        exp = torch.exp(z, out=logits[rows])
        total[rows] = exp.sum(-1)
        log_total = total[rows].log()
        logprobs[rows] = z.gather(1, target[rows, None])[:, 0] - log_total
        entropy[rows] = log_total - z.mul_(exp).sum(-1) / total[rows]  # summed pairwise, which a dot product is not
    return RowStatistics(logprobs, entropy, (logits, top, total))


def gradients(
    found: RowStatistics, target: Tensor, transform: LogitTransform, g: Tensor, h: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """d loss / d logits as [R, V] of `dtype`, in the memory of the logits if that is their dtype.

    g, h: [R], derivatives of the loss by log-prob and by entropy; h None where the entropy has no part in the loss.
    """
    exps, top, total = (column if column.dim() == 2 else column[:, None] for column in found.saved)
    by_target, by_logprob = target[:, None], (g / transform.temperature)[:, None]
    for rows in _blocks(exps):
        exp, factor = exps[rows], by_logprob[rows] / -total[rows]
        if h is None and transform.softcap is None:
            exp.mul_(factor).scatter_add_(1, by_target[rows], by_logprob[rows])
            continue
        # Where e^(z - max z) underflows to 0, log p matters only at the target, and there it is known.
        logprobs = (exp / total[rows]).clamp_min_(torch.finfo(exp.dtype).tiny).log_()
        logprobs.scatter_(1, by_target[rows], found.logprobs[rows, None])
        if h is not None:
            by_entropy = h[rows, None] / transform.temperature
            factor = (logprobs + found.entropy[rows, None]).mul_(by_entropy).add_(by_logprob[rows]).div_(-total[rows])
        exp.mul_(factor).scatter_add_(1, by_target[rows], by_logprob[rows])
        if transform.softcap is not None:
            exp.mul_(_cap_slope(logprobs + (top[rows] + total[rows].log()), transform))
    return exps.to(dtype)


def _blocks(logits: Tensor) -> list[slice]:
    height = max(1, BLOCK_ELEMENTS[logits.device.type] // logits.shape[1])
    return [slice(start, start + height) for start in range(0, len(logits), height)]


def _transform_(logits: Tensor, transform: LogitTransform) -> Tensor:
    if transform.softcap is not None:
        return logits.div_(transform.softcap).tanh_().mul_(transform.softcap / transform.temperature)
    return logits if transform.temperature == 1 else logits.div_(transform.temperature)


def _cap_slope(z: Tensor, transform: LogitTransform) -> Tensor:
    """cap'(logits) = 1 - tanh^2(logits / softcap), from z = cap(logits) / temperature."""
    return 1 - (z * (transform.temperature / transform.softcap)).square_()


TORCH = RowOps(statistics, gradients)
