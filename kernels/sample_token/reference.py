"""The definition, in PyTorch: temperature, top-k, top-p, min-p, then the inverse of the cumulative distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample_token(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float, top_k: int, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The first token v with cdf(v) > u, and log p(v), where p = truncate(softmax(logits / temperature)).

    Temperature 0 is greedy: the argmax and its log-prob under softmax(logits), untruncated.
    logits: [B, V]; uniforms: [B] fp64 in (0, 1).  Returns tokens [B] int64 and log-probs [B] fp32.
    """
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1)
        return token, _log_prob(logits, token)
    logits = truncate(logits / temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    # fp64: in fp32 the sum stops growing near 1 and the tail of a large vocabulary could never be drawn.
    cdf = torch.softmax(logits, -1).double().cumsum(-1)
    threshold = uniforms[:, None] * cdf[:, -1:]
    # right=True skips tokens of probability 0; the clamp only matters for NaN logits, whose log-prob is NaN too.
    token = torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
    return token, _log_prob(logits, token)


def truncate(logits: Tensor, *, top_p: float, top_k: int, min_p: float = 0.0) -> Tensor:
    """-inf for all but the top_k most likely tokens (0: keep all), then for all outside their nucleus.

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p (arXiv:1904.09751), taken
    from the distribution that top_k left. Equal logits rank by token id. Last, tokens less likely than min_p times
    the most likely one are dropped (arXiv:2407.01082). logits: [B, V], divided by the temperature.
    """
    if top_p < 1 or 0 < top_k < logits.shape[-1]:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        if top_k > 0:
            ranked[:, top_k:] = -math.inf
        if top_p < 1:
            probs = torch.softmax(ranked, -1)
            ranked = ranked.masked_fill(probs.cumsum(-1) - probs >= top_p, -math.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ranked)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    return logits


def _log_prob(logits: Tensor, token: Tensor) -> Tensor:
    return logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)
