"""The public ops and the one place that chooses how each is computed.

Every op is a folder: `reference.py` is its definition in plain PyTorch; a Triton kernel, where there is one, sits
beside it and is imported here only. `impl` travels as an argument: auto, torch or triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.decode_attention import reference as decode_attention_reference
from kernels.linear_logprob import reference as linear_logprob_reference
from kernels.sample_token import reference as sample_token_reference

OPS = ("linear_logprob", "decode_attention", "sample_token")
IMPLS = ("auto", "torch", "triton")


class Choice(NamedTuple):
    """How an op will be computed (`torch` or `triton`) and why."""

    impl: str
    why: str


def resolve(op: str, impl: str, device: torch.device | str) -> Choice:
    """The implementation of `op` for `impl` on `device`. ValueError where what was asked for does not exist."""
    assert op in OPS, f"unknown op {op!r}; the ops are {OPS}"
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is none of {', '.join(IMPLS)}")
    if impl == "triton":
        raise ValueError(
            f"impl=triton on {torch.device(device).type}: {op} has no Triton kernel; use impl=auto or impl=torch"
        )
    return Choice("torch", "asked for" if impl == "torch" else "no Triton kernel for this op")


def dispatch_table(impl: str, device: torch.device | str) -> dict[str, Choice]:
    """What every op resolves to: printed by train.py and stored with the run."""
    return {op: resolve(op, impl, device) for op in OPS}


def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, *, impl: str, **options) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each target under softmax(hidden weight^T); see kernels/linear_logprob/reference.py."""
    resolve("linear_logprob", impl, hidden.device)
    return linear_logprob_reference.linear_logprob(hidden, weight, target, **options)


def decode_attention(query: Tensor, prefix: tuple, suffix: tuple, *, impl: str, **layout) -> Tensor:
    """One query per row against its group's prefix and its own suffix; see kernels/decode_attention/reference.py."""
    resolve("decode_attention", impl, query.device)
    return decode_attention_reference.decode_attention(query, prefix, suffix, **layout)


def sample_token(logits: Tensor, uniforms: Tensor, *, impl: str, **options) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob; see kernels/sample_token/reference.py."""
    resolve("sample_token", impl, logits.device)
    return sample_token_reference.sample_token(logits, uniforms, **options)
