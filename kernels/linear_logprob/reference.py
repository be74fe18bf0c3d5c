"""The definition, in PyTorch, one block of rows at a time.

For one row: logits = cap(h W^T + b) / temperature, logprob = log_softmax(logits)[target],
entropy = -sum_v p_v log p_v, with cap(x) = softcap * tanh(x / softcap) where a soft cap is given (Gemma 2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Logits of one block. Large on CUDA, where a matmul wants 2,048 rows or more; small enough for a cache-poor CPU.
BLOCK_ELEMENTS = {"cuda": 2**28, "cpu": 2**24}


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    rows_per_block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of its distribution, differentiable in hidden, weight and bias.

    hidden: [T, D]; weight: [V, D]; bias: [V]; target: [T] int64.  Returns ([T], [T]), natural log, fp32 (fp64 for
    fp64 input); the entropy carries no gradient. At most `rows_per_block` x V logits exist at a time, also in the
    backward pass, which computes each block again.
    """
    if rows_per_block is None:
        rows_per_block = max(1, BLOCK_ELEMENTS.get(hidden.device.type, 2**24) // weight.shape[0])

    def block(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_softmax = torch.log_softmax(logits / temperature, dim=-1)
        logprobs = log_softmax.gather(1, target[:, None])[:, 0]
        with torch.no_grad():
            entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        return logprobs, entropy

    if len(target) <= rows_per_block:  # also the empty case
        return block(hidden, target)
    parts = [
        checkpoint(
            block, hidden[start : start + rows_per_block], target[start : start + rows_per_block], use_reentrant=False
        )
        for start in range(0, len(target), rows_per_block)
    ]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])
