"""The definition, in PyTorch.

For one row: logits = cap(h W^T + b) / temperature, logprob = log_softmax(logits)[target],
entropy = -sum_v p_v log p_v, with cap(x) = softcap * tanh(x / softcap) where a soft cap is given (Gemma 2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of its distribution, differentiable in hidden, weight and bias.

    hidden: [T, D]; weight: [V, D]; bias: [V]; target: [T] int64.  Returns ([T], [T]), natural log, fp32 (fp64 for
    fp64 input); the entropy carries no gradient.
    """
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_softmax = torch.log_softmax(logits / temperature, dim=-1)
    logprobs = log_softmax.gather(1, target[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return logprobs, entropy
