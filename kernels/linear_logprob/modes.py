"""The four ways through the log-prob head, chosen by what needs a gradient. Called by the dispatch in kernels.

                            cost, in matmuls of 2TDV flops; no more than the logits of one chunk are ever held
A  no gradient                 1     log-prob and entropy
B  frozen head, any loss       2     forward keeps d logprob / d hidden, [T, D]; backward scales its rows
C  loss known per chunk        3     logits, loss, coefficients, gradients, both matmuls; then the next chunk
D  any loss, known later       4     forward as A; backward as C, with the coefficients that autograd brings

With a frozen head C and D save the matmul of its gradient.

Log-probs, sums over chunks and the weight's gradient are fp32 for bf16 inputs (fp64 for fp64), and every mode takes its
log-probs from the same function, so that all agree on them. Every gradient is returned to autograd: writing `.grad`
here would bypass the reducer of DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear_logprob.rows import LogitTransform, RowOps, RowStatistics

# Logits of one chunk. A GPU wants 1,500 rows or more (1,664 at V = 151,936: 1 GB in fp32): with fewer, the memory
# traffic of the weight's gradient outweighs its arithmetic. For a CPU 220 (128 MiB) are enough.
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}
CHUNK_MULTIPLE = {"cpu": 1, "cuda": 128}

TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]  # (logprobs, entropy, rows) -> loss of each of these rows
Coefficients = Callable[[RowStatistics, slice], tuple[Tensor, Tensor | None]]


class Head(NamedTuple):
    """logits = hidden weight^T + bias, then `transform`; and the implementation (`ops`) that computes it."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    transform: LogitTransform
    ops: RowOps
    rows_per_chunk: int

    @property
    def is_trained(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


def check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    """ValueError where the arguments do not fit together, with both values. Never waits for a GPU."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} are not [T, D] and [V, D]")
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"target is {tuple(target.shape)} {target.dtype}; {len(hidden)} rows of hidden need one int64 each"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit a vocabulary of {len(weight)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (hidden.dtype, hidden.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, hidden {hidden.dtype} on {hidden.device}; cast one"
            )
    if target.device.type == "cpu" and len(target):
        smallest, largest = (bound.item() for bound in target.aminmax())
        if smallest < 0 or largest >= len(weight):
            worst = smallest if smallest < 0 else largest
            raise ValueError(f"target {worst} is outside the head's vocabulary of {len(weight)}")


def rows_per_chunk(vocabulary: int, device_type: str) -> int:
    """Rows whose logits are held at a time."""
    multiple = CHUNK_MULTIPLE[device_type]
    return max(1, CHUNK_ELEMENTS[device_type] // vocabulary // multiple) * multiple


def logprobs_and_entropy(
    head: Head, hidden: Tensor, target: Tensor, *, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """([T], [T]): mode A, B or D."""
    if not (torch.is_grad_enabled() and (hidden.requires_grad or head.is_trained)):
        return _measure(head, hidden, target)
    if head.is_trained or entropy_gradient:
        return _AnyLoss.apply(hidden, head.weight, head.bias, target, head, entropy_gradient)
    return _FrozenHead.apply(hidden, target, head)


def folded_loss(
    head: Head, hidden: Tensor, target: Tensor, token_loss: TokenLoss, *, entropy_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the loss, log-probs [T], entropy [T]), the last two detached: mode C."""
    if not (torch.is_grad_enabled() and (hidden.requires_grad or head.is_trained)):
        logprobs, entropy = _measure(head, hidden, target)
        return token_loss(logprobs, entropy, slice(0, len(target))).sum(), logprobs, entropy
    return _FoldedLoss.apply(hidden, head.weight, head.bias, target, head, token_loss, entropy_gradient)


class _FrozenHead(torch.autograd.Function):
    """Mode B. Whatever the loss, a row's gradient is its coefficient times d logprob / d hidden."""

    @staticmethod
    def forward(ctx, hidden: Tensor, target: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        one = lambda found, rows: (torch.ones_like(found.logprobs), None)
        logprobs, entropy, (unit, _, _) = _fold(head, hidden, target, one, (True, False, False))
        ctx.save_for_backward(unit)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, _) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        return (g[:, None] * unit).to(unit.dtype), None, None


class _FoldedLoss(torch.autograd.Function):
    """Mode C. The gradients are computed in forward; backward multiplies them by the gradient of the sum."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, head: Head, token_loss: TokenLoss, entropy_gradient: bool):
        losses = [hidden.new_zeros((), dtype=_accumulator(hidden.dtype))]

        def coefficients(found: RowStatistics, rows: slice) -> tuple[Tensor, Tensor | None]:
            loss, *derivatives = _differentiate(token_loss, found, rows, entropy_gradient)
            losses.append(loss)
            return tuple(derivatives)

        logprobs, entropy, ctx.gradients = _fold(head, hidden, target, coefficients, ctx.needs_input_grad[:3])
        ctx.mark_non_differentiable(logprobs, entropy)
        return torch.stack(losses).sum(), logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor, *_) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_logprob_loss allows one backward pass; compute the loss again for a second one")
        gradients, ctx.gradients = ctx.gradients, None  # not needed again, so scaled in place: no second [V, D]
        return *(None if gradient is None else gradient.mul_(scale) for gradient in gradients), None, None, None, None


class _AnyLoss(torch.autograd.Function):
    """Mode D. Forward keeps nothing but its arguments; backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, head: Head, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        logprobs, entropy = _measure(head, hidden, target)
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.head, ctx.entropy_gradient = head._replace(weight=None, bias=None), entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target = ctx.saved_tensors
        head = ctx.head._replace(weight=weight, bias=bias)
        coefficients = lambda found, rows: (g[rows], h[rows] if ctx.entropy_gradient else None)
        gradients = _fold(head, hidden, target, coefficients, ctx.needs_input_grad[:3])[2]
        return *gradients, None, None, None


def _measure(head: Head, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mode A: log-probs and entropy, [T] each."""
    if head.ops.fused:
        return head.ops.fused(hidden, head.weight, head.bias, target, head.transform, None)[:2]
    logprobs, entropy, buffer = _outputs(head, hidden)
    for rows in _chunks(head, hidden):
        logprobs[rows], entropy[rows], _ = _statistics(head, hidden[rows], target[rows], buffer)
    return logprobs, entropy


def _statistics(head: Head, hidden: Tensor, target: Tensor, buffer: Tensor) -> RowStatistics:
    """The statistics of a chunk; its logits stay in `buffer`, for the gradients."""
    if head.ops.fused:
        return head.ops.fused(hidden, head.weight, head.bias, target, head.transform, buffer[: len(hidden)])
    return head.ops.statistics(_logits(head, hidden, buffer), target, head.transform)


def _fold(
    head: Head, hidden: Tensor, target: Tensor, coefficients: Coefficients, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Log-probs, entropy and the gradients of hidden, weight and bias (None where `needs` is false), chunk by chunk.

    coefficients(statistics, rows): derivatives of the loss by each row's log-prob and entropy.

    One buffer, [R, V], serves every chunk. It holds the chunk's logits (fp16 if fused, else fp32; rows.py turns them
    into exponentials), then in their place the gradients, which the matmuls read (rows.py copies them if they have to
    be narrower), then the next chunk's logits.
    """
    logprobs, entropy, buffer = _outputs(head, hidden)
    hidden_gradient, weight_gradient, bias_gradient = (
        tensor.new_zeros(tensor.shape, dtype=dtype) if needed else None
        for tensor, dtype, needed in zip(
            (hidden, head.weight, head.bias), (hidden.dtype, logprobs.dtype, logprobs.dtype), needs, strict=True
        )
    )
    for rows in _chunks(head, hidden):
        found = _statistics(head, hidden[rows], target[rows], buffer)
        logprobs[rows], entropy[rows] = found.logprobs, found.entropy
        g, h = coefficients(found, rows)
        logit_gradients = head.ops.gradients(found, target[rows], head.transform, g, h, head.weight.dtype)
        if hidden_gradient is not None:
            _multiply(logit_gradients, head.weight, hidden_gradient[rows])
        if weight_gradient is not None:
            _add_product(logit_gradients.t(), hidden[rows], weight_gradient)
        if bias_gradient is not None:
            bias_gradient += logit_gradients.sum(0, dtype=bias_gradient.dtype)
    cast = lambda gradient, like: None if gradient is None else gradient.to(like.dtype)
    return logprobs, entropy, (hidden_gradient, cast(weight_gradient, head.weight), cast(bias_gradient, head.bias))


def _differentiate(
    token_loss: TokenLoss, found: RowStatistics, rows: slice, entropy_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed loss of a chunk and its derivatives by log-prob and (where asked for) entropy."""
    with torch.enable_grad():
        logprobs = found.logprobs.detach().requires_grad_()
        entropy = found.entropy.detach().requires_grad_(entropy_gradient)
        loss = token_loss(logprobs, entropy, rows)
        if loss.shape != logprobs.shape:
            raise ValueError(
                f"token_loss must return one loss per row, shape {tuple(logprobs.shape)}, not {tuple(loss.shape)}; "
                "do not reduce"
            )
        inputs = (logprobs, entropy) if entropy_gradient else (logprobs,)
        derivatives = torch.autograd.grad(loss.sum(), inputs, materialize_grads=True)
    return loss.detach().sum(), derivatives[0], derivatives[1] if entropy_gradient else None


def _outputs(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised memory for log-probs [T], entropy [T] and the logits of a chunk, [R, V]."""
    wide = _accumulator(hidden.dtype)
    logprobs, entropy = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(2))
    shape = (min(head.rows_per_chunk, len(hidden)), len(head.weight))
    return logprobs, entropy, hidden.new_empty(shape, dtype=torch.float16 if head.ops.fused else wide)


def _chunks(head: Head, hidden: Tensor) -> list[slice]:
    return [
        slice(start, min(start + head.rows_per_chunk, len(hidden)))
        for start in range(0, len(hidden), head.rows_per_chunk)
    ]


def _logits(head: Head, hidden: Tensor, buffer: Tensor) -> Tensor:
    logits = _multiply(hidden, head.weight.t(), buffer[: len(hidden)])
    return logits if head.bias is None else logits.add_(head.bias)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left @ right, accumulated in fp32; out may be wider than they are."""
    if out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.copy_(left @ right)


def _add_product(left: Tensor, right: Tensor, total: Tensor) -> None:
    """total += left @ right; total may be wider than they are."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
