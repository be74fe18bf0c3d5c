"""Contexts that change how a transformers model computes: with other weights, other attention, in fp32, or with
compiled layers. They restore it at their end; only `checkpoint_layers` is permanent.

Used by grpo.logprobs, which trains, and by grpo.rollout, which samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

BACKEND = "inductor"  # of torch.compile
MOST_GRAPHS = 64  # compiled variants of one piece of a layer: with and without gradient, decoding, one row, several ...


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a model of any family, whatever their list is called there."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def using_weights(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Within it `model` computes with these tensors in place of its parameters of the same names, tied ones included.

    Like torch.func.functional_call, but as a context, because gradient checkpointing has to enter it again when it
    recomputes a layer in the backward pass.
    """
    owners = []
    by_parameter = {id(parameter): weights[name] for name, parameter in model.named_parameters() if name in weights}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in by_parameter:
                owners.append((module, name, parameter))
    try:
        for module, name, parameter in owners:
            module._parameters[name] = by_parameter[id(parameter)]
        yield
    finally:
        for module, name, parameter in owners:
            module._parameters[name] = parameter


@contextmanager
def using_forwards(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Within it each of these modules uses the given function as its forward."""
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            del module.forward


@contextmanager
def attention_mode(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within it the model uses the attention registered as `name`; its own is restored even after an error."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)


def refuse_extras(module: nn.Module, mask: Tensor | None, others: dict[str, object], limit: str) -> None:
    """ValueError if a layer passes its attention something that our attention function would ignore.

    others: the keyword arguments that ours does not name.  limit: the end of the message, after "which".
    """
    passed = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    passed += ["dropout"] if others.get("dropout") else []
    passed += ["a mask of its own"] if mask is not None else []
    if passed:
        raise ValueError(f"{type(module).__name__} passes {', '.join(passed)} to its attention, which {limit}")


@contextmanager
def in_fp32(model: PreTrainedModel) -> Iterator[None]:
    """Within it `model` computes in fp32; only one layer's weights are converted at a time, to save memory."""
    layers = decoder_layers(model)
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = {name: weight.float() for name, weight in model.named_parameters() if id(weight) not in in_layers}

    def converted(layer: nn.Module, forward: Callable) -> Callable:
        def run(*inputs: object, **named: object) -> object:
            with using_weights(layer, {name: weight.float() for name, weight in layer.named_parameters()}):
                return forward(*inputs, **named)

        return run

    with using_forwards({layer: converted(layer, layer.forward) for layer in layers}), using_weights(model, outside):
        yield


def compiled_layers(model: PreTrainedModel) -> dict[nn.Module, Callable]:
    """Every decoder layer's forward under torch.compile, for any number of rows and any length; for `using_forwards`.

    Layers are alike, so the first one's compiled code serves all: norm, rotary and MLP arithmetic in a few kernels
    around the matmuls, attention left alone. A piece that cannot be compiled, forward or backward, runs eagerly, with a
    warning.
    """
    lenient = torch._dynamo.config.patch(suppress_errors=True, recompile_limit=MOST_GRAPHS)
    # Compile the backward with the forward: lazily, one that cannot be compiled would fail only when it is run.
    early = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    compiled = lambda layer: early(lenient(torch.compile(layer.forward, dynamic=True, backend=BACKEND)))
    return {layer: compiled(layer) for layer in decoder_layers(model)}


def checkpoint_layers(model: PreTrainedModel, **options: object) -> None:
    """Recompute each layer in the backward pass instead of keeping activations. options: of torch.utils.checkpoint."""
    # transformers 5.17 has only the second name; 6 will have only the first
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **options})
