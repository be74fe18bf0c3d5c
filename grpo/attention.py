"""The attention of the training forward over packed rows: every prompt once, shared by its completions.

A token attends, up to itself, to its row's common prefix, its group's prompt and its own completion (SharedPrefix in
grpo/records.py), and within a sliding window, counted in positions, if the model has one. The model's forward pass
hands the keyword argument `shared_prefix` down to every layer. Registered with AttentionInterface only: for a name
without a mask function transformers builds no mask (its own guess, from where positions restart, would hide the prompt
from all completions but the first).

One function per backend, all exact, all plain autograd to the caller: `merged_parts` (CPU), `gathered` (CUDA,
variable-length flash attention) and `flex` (CUDA, for what `gathered` cannot do).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from grpo.layers import attention_mode, refuse_extras
from grpo.records import SharedPrefix
from kernels import old_capability

SHARED_PREFIX = "grpo_shared_prefix"
WINDOW_ROWS = 512  # queries per sliding-window mask, on CPU


@torch.compiler.disable  # it reads lengths, which differ in every batch: compiled layers would be recompiled
def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prefix: SharedPrefix,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others,
) -> tuple[Tensor, None]:
    """Attention of one packed row, laid out by `shared_prefix`, in the signature that transformers calls.

    query: [1, H, L, D]; key, value: [1, Hkv, L, D].  Returns [1, L, H, D]. ValueError for masks, dropout, soft caps.
    """
    refuse_extras(module, attention_mask, others, "packed rows do not support; use batch.layout=padded")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = backend(query)(query, key, value, shared_prefix, scale, sliding_window)
    return output.transpose(1, 2), None


def backend(query: Tensor) -> Callable[[Tensor, Tensor, Tensor, SharedPrefix, float, int | None], Tensor]:
    """The backend for this query's device, dtype and head width."""
    if query.device.type == "cpu":
        return merged_parts
    width = query.shape[-1]
    fits_flash = query.dtype in (torch.bfloat16, torch.float16) and width <= 256 and width % 8 == 0
    return gathered if fits_flash and {"scale", "window_size"} <= VARLEN_OPTIONS else flex


# CPU ------------------------------------------------------------------------------------------------------------------


def merged_parts(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefix, scale: float, window: int | None
) -> Tensor:
    """Own span, prompt and common prefix in separate calls, merged by their log-sum-exps: no key is copied, and no mask
    made unless a sliding window needs it."""
    return _MergedParts.apply(query, key, value, layout, scale, window)


class _MergedParts(torch.autograd.Function):
    """Softmax over a union of parts: the sum of their outputs times exp(lse_part - lse), lse = log sum exp(lse_part).

    A row of prompt p and completions a and b, two tokens each, takes four calls (`_attention_calls`); 4 is not causal:

           p p a a b b   keys
        p  1 . . . . .
        p  1 1 . . . .
        a  4 4 2 . . .   call 1: p to p     3: b to b
        a  4 4 2 2 . .        2: a to a     4: a and b to p
        b  4 4 . . 3 .
        b  4 4 . . 3 3   output of b = out_3 exp(lse_3 - lse) + out_4 exp(lse_4 - lse), lse = log(exp lse_3 + exp lse_4)

    Backward: a key's probability is exp(score - lse) whichever part it is in, so the flash backward of each part,
    given the *merged* output and log-sum-exp, yields that part's exact share of the gradient. (Merging two
    differentiable calls instead would need the gradient of lse, which torch's flash functions drop.)
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefix, scale: float, window: int | None
    ) -> Tensor:
        """The merged output, shaped as query: [1, H, L, D]; key, value: [1, Hkv, L, D]."""
        output = torch.zeros_like(query)
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = torch.full(query.shape[:3], -math.inf, dtype=wide, device=query.device)
        for rows, keys, is_causal, mask in _attention_calls(layout, window, query.dtype):
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, rows], key[:, :, keys], value[:, :, keys], 0.0, is_causal, attn_mask=mask, scale=scale
            )
            if mask is not None:  # for a query that sees no key here the kernel returns lse 0
                part_lse = part_lse.masked_fill(mask.isinf().all(-1), -math.inf)
            merged = torch.logaddexp(lse[:, :, rows], part_lse)
            before, now = (torch.exp(old - merged)[..., None] for old in (lse[:, :, rows], part_lse))
            output[:, :, rows] = output[:, :, rows] * before + part * now
            lse[:, :, rows] = merged
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.scale, ctx.window = layout, scale, window
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for rows, keys, is_causal, mask in _attention_calls(ctx.layout, ctx.window, query.dtype):
            shares = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(gradient[:, :, rows], query[:, :, rows], key[:, :, keys], value[:, :, keys]),
                *(output[:, :, rows], lse[:, :, rows], 0.0, is_causal),
                **{"attn_mask": mask, "scale": ctx.scale},
            )
            for total, place, share in zip(gradients, (rows, keys, keys), shares, strict=True):
                total[:, :, place] += share
        return *gradients, None, None, None


def _attention_calls(
    layout: SharedPrefix, window: int | None, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, bool, Tensor | None]]:
    """(query rows, key rows, is causal, additive mask) of every attention call. A token's own span comes first: its
    log-sum-exp is then finite before a part in which a sliding window may hide every key."""
    common, after = layout.common, []  # after: the spans behind the common prefix
    calls: list[tuple[list[slice], slice]] = []  # adjacent spans of queries, and the span of keys that they see
    for prompt, completions in layout.groups:
        completions = [span for span in completions if span.stop > span.start]
        calls += [([span], span) for span in (prompt, *completions)]
        calls += [(completions, prompt)] if completions else []  # all completions in one call
        after += [prompt, *completions]
    if common.stop:
        calls += [([common], common), (after, common)]
    for spans, keys in calls:
        rows = slice(spans[0].start, spans[-1].stop)
        is_own = rows == keys
        age = 0 if window is None else int(layout.position[rows].max() - layout.position[keys.start])  # largest
        if window is None or age < window:
            yield rows, keys, is_own, None
        else:
            for span in spans:
                yield from _windowed_calls(span, keys, is_own, window, layout.position, dtype)


def _windowed_calls(
    span: slice, keys: slice, is_own: bool, window: int, position: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, bool, Tensor]]:
    """The calls of a span's windowed attention to `keys`, in blocks of queries with only the keys in their window, so
    that masks do not grow quadratically. Positions are consecutive within the span and within the keys."""
    first_key = int(position[keys.start])
    for start in range(span.start, span.stop, WINDOW_ROWS):
        rows = slice(start, min(start + WINDOW_ROWS, span.stop))
        oldest = int(position[start]) - window + 1  # first position in the window of the block's first query
        near = slice(keys.start + max(0, oldest - first_key), rows.stop if is_own else keys.stop)
        if near.start >= near.stop:
            return  # later queries are even further away
        age = position[rows, None] - position[near]
        hidden = (age < 0) | (age >= window)
        yield rows, near, False, torch.zeros(age.shape, dtype=dtype).masked_fill_(hidden, -math.inf)


# CUDA -----------------------------------------------------------------------------------------------------------------

VARLEN_OPTIONS = set(inspect.signature(varlen.varlen_attn).parameters)  # they differ between torch releases


def gathered(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefix, scale: float, window: int | None
) -> Tensor:
    """One flash call: queries stay where they are, keys and values are gathered as prompt | prompt, c1 | prompt, c2 ...

    The mask is causal from the bottom right: the last query of a sequence sees its last key.
    """
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    key, value = (_GatherRows.apply(tensor, layout.key_index) for tensor in (key, value))
    options = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in VARLEN_OPTIONS:  # torch 2.11 has no such option: its kernels always do grouped queries
        options["enable_gqa"] = query.shape[1] > key.shape[1]
    starts = (layout.query_starts, layout.key_starts, layout.longest_query, layout.longest_key)
    return varlen.varlen_attn(query, key, value, *starts, **options).transpose(0, 1)[None]


class _GatherRows(torch.autograd.Function):
    """tensor[rows] with a gradient accumulated in fp32. Indexing would accumulate in the tensor's dtype: in bf16 the
    gradient of a key that a hundred sequences share would be rounded a hundred times."""

    @staticmethod
    def forward(ctx, tensor: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = tensor.shape
        return tensor[rows]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros(ctx.shape, dtype=wide)
        return total.index_add_(0, ctx.saved_tensors[0], gradient.to(wide)).to(gradient.dtype), None


def flex(query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefix, scale: float, window: int | None) -> Tensor:
    """flex_attention with the layout's block mask: any dtype, on CUDA compiled once for all lengths."""
    function = _compiled(flex_attention) if query.device.type == "cuda" else flex_attention
    mask, is_grouped = block_mask(layout, window), query.shape[1] != key.shape[1]
    return function(query, key, value, block_mask=mask, scale=scale, enable_gqa=is_grouped)


@functools.lru_cache(maxsize=4)
def block_mask(layout: SharedPrefix, window: int | None) -> BlockMask:
    """Which blocks of keys each block of queries needs. Cached: every layer of a pass asks for the same."""

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_group = layout.group[query] == layout.group[key]
        shared_or_own = (layout.completion[key] == 0) | (layout.completion[query] == layout.completion[key])
        age = layout.position[query] - layout.position[key]
        near = age >= 0 if window is None else (age >= 0) & (age < window)
        return (same_group & shared_or_own | (layout.group[key] < 0)) & near

    length, device = len(layout.group), layout.group.device
    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(is_visible, None, None, length, length, device=device)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


# The model ------------------------------------------------------------------------------------------------------------

AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)


def choose_layout(layout: str, model: PreTrainedModel) -> tuple[str, str]:
    """`packed` or `padded` for batch.layout, and why. ValueError if `packed` is asked for and the model cannot."""
    reason = why_not_packed(model)
    if layout == "packed" and reason:
        raise ValueError(f"batch.layout=packed, but {type(model).__name__} {reason}; use auto or padded")
    if layout != "auto":
        return layout, "asked for"
    return ("padded", f"{type(model).__name__} {reason}") if reason else ("packed", "every prompt is computed once")


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Why this model's completions cannot share a prompt, as far as class, config and device tell; None if they can.

    Dropout (the completions would share their prompt's mask) is no reason here: `grpo.policy` refuses it in any layout.
    """
    if capability := old_capability(model.device):
        return f"is on a GPU of compute capability {capability}, and packed attention needs 8.0"
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    others |= {kind for kind in getattr(config, "layers_block_type", None) or () if kind != "attention"}
    if others:
        return f"has layers of type {sorted(others)}, whose state cannot be forked after the prompt"
    with attention_mode(model, SHARED_PREFIX):
        if model.config._attn_implementation != SHARED_PREFIX:
            return "does not support a custom attention function"
    if getattr(config, "output_router_logits", False):
        return "adds a router loss over all tokens, in which a shared prompt would count once"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "caps its attention scores"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "has attention sinks"
    if getattr(config, "v_head_dim", None) is not None:
        return "has value heads of another size than its keys"
    return None
