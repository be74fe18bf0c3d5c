"""The attention that a transformers model runs while sampling, and the switch that turns it on.

Registered with AttentionInterface but without a mask function, so that transformers builds no mask and never waits for
the device. The model's forward pass hands its keyword argument `slab` down to every layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

import kernels
from grpo.layers import attention_mode, refuse_extras
from grpo.rollout.slab import Decode, KVSlab, Prefill, Probe

SLAB = "grpo_slab"


@torch.compiler.disable  # compiled layers call it uncompiled: it branches on sizes and writes into the slab
def slab_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    slab: KVSlab | Probe | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others,
) -> tuple[Tensor, None]:
    """Store key and value in the slab and attend, as `slab.layout` says; without a layout, only attend.

    query: [N, H, length, D]; key, value: [N, Hkv, length, D], as transformers passes them.  Returns [N, length, H, D].
    """
    if slab is None:
        raise ValueError(
            f"{type(module).__name__} does not receive the model's keyword arguments (slab), so rollout cannot replace "
            "its attention; use another model"
        )
    refuse_extras(module, attention_mask, others, "rollout does not support")
    if isinstance(slab, Probe) and sliding_window is None:
        refuse_untold_window(module)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer, layout = slab.layer(module.layer_idx, key, value), slab.layout
    if isinstance(layout, Decode):
        rows, groups = slice(len(query)), slice(layout.num_groups)
        longest_prefix, longest_suffix = slice(layout.longest_prefix), slice(layout.longest_suffix)
        output = kernels.decode_attention(
            query[:, :, 0],
            key[:, :, 0],
            value[:, :, 0],
            tuple(stored[groups, :, longest_prefix] for stored in layer[:2]),
            tuple(stored[rows, :, longest_suffix] for stored in layer[2:]),
            seats=layout.seats,
            seat_index=layout.seat_index,
            prefix_lengths=layout.prefix_lengths,
            suffix_lengths=layout.suffix_lengths,
            scale=scale,
            softcap=softcap,
            window=sliding_window,
            impl=slab.impl,
        )[:, :, None]
    else:
        if isinstance(layout, Prefill):
            stop = layout.start + key.shape[2]
            layer.prefix_key[layout.groups, :, layout.start : stop] = key
            layer.prefix_value[layout.groups, :, layout.start : stop] = value
            if layout.start:
                key, value = (stored[layout.groups, :, :stop] for stored in layer[:2])
        output = _causal(query, key, value, scale, softcap, sliding_window)
    return output.transpose(1, 2), None


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """Attention over whole prompts, or for their last tokens only (query shorter than key). Padding is on the right:
    the causal mask already hides it from every real token."""
    length, repeats = key.shape[2], query.shape[1] // key.shape[1]
    if softcap is None and (window is None or window >= length) and query.shape[2] == length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=repeats > 1)
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    position = torch.arange(length, device=query.device)
    age = position[-query.shape[2] :, None] - position
    hidden = (age < 0) | (age >= (window or length))
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=~hidden, scale=scale)
    scores = softcap * torch.tanh(query @ key.mT * scale / softcap)
    return scores.masked_fill(hidden, -math.inf).softmax(-1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register(SLAB, slab_attention)


def refuse_untold_window(module: torch.nn.Module) -> None:
    """ValueError for a layer that has a sliding window by its config but does not pass it to its attention function."""
    config = module.config
    kinds, window = (getattr(config, name, None) for name in ("layer_types", "sliding_window"))
    is_used = kinds[module.layer_idx] == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
    if is_used and window and window < config.max_position_embeddings:
        raise ValueError(
            f"{type(module).__name__} does not pass its sliding_window={window} to the attention function, so rollout "
            "would attend to every key; use a model that passes it, or set sliding_window to null in its config.json"
        )


def refuse_unservable(model: PreTrainedModel) -> None:
    """ValueError for a model whose attention the slab cannot serve, as far as its config tells."""
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has an encoder; rollout supports decoder-only models")
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layer_types:
        raise ValueError(
            f"{type(model).__name__} has layers of type {sorted(layer_types)}; rollout supports only "
            "full_attention and sliding_attention"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # one set for all layers, or one for each layer type
        if isinstance(part, dict) and part.get("rope_type") in ("dynamic", "longrope"):
            raise ValueError(
                f"{type(model).__name__} has rotary embeddings of type {part['rope_type']}: their frequencies depend "
                "on the longest row of the batch, so a completion would depend on the others in it; use a model with "
                "fixed frequencies"
            )


@contextmanager
def sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, slab attention, no gradients; random state, modes and attention are restored in any case."""
    in_training = [module for module in model.modules() if module.training]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        model.eval()
        with attention_mode(model, SLAB), torch.no_grad(), torch.random.fork_rng(devices):
            if model.config._attn_implementation != SLAB:
                name = type(model).__name__
                raise ValueError(f"{name} does not let its attention be replaced, as rollout needs; use another model")
            yield
    finally:
        for module in in_training:
            module.training = True
