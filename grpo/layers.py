"""A transformers model that computes otherwise for a while: with other weights, in fp32, with its layers compiled, or
with each of them computed again in the backward pass. Put back afterwards, all but `checkpoint_layers`.

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
MOST_GRAPHS = 64  # of one piece of a layer: with and without gradient, decoding, one row or several ...


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of any family, whatever it calls their list."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def using_weights(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Let `model` compute with these tensors in place of its parameters so named, tied ones too; then put them back.

    Like torch.func.functional_call, but as a context, because gradient checkpointing has to enter it again when it
    computes a layer a second time in the backward pass.
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
    """Let modules compute by these functions in place of their class's own."""
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            del module.forward


@contextmanager
def attention_mode(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model attends through the function registered as `name`; its own comes back in any case."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)


def refuse_extras(module: nn.Module, mask: Tensor | None, others: dict[str, object], who: str) -> None:
    """ValueError for what a layer hands to its attention and one of ours would leave out.

    others: what that one does not take by name.  who: ends the sentence.
    """
    wants = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    wants += ["dropout"] if others.get("dropout") else []
    wants += ["a mask of its own"] if mask is not None else []
    if wants:
        raise ValueError(f"{type(module).__name__} wants {', '.join(wants)} in its attention, which {who}")


@contextmanager
def in_fp32(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` compute in fp32, with the weights of one layer at a time converted."""
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
    """For `using_forwards`: every decoder layer by torch.compile, for any number of rows and any length.

    Layers are alike, so what is compiled for the first serves all: norm, rotary and MLP arithmetic in a few kernels
    around the matmuls, and attention left alone. A piece that cannot be compiled, or whose backward pass cannot, is run
    as it is, with a warning.
    """
    lenient = torch._dynamo.config.patch(suppress_errors=True, recompile_limit=MOST_GRAPHS)
    # A backward pass compiled with its forward pass: one that cannot be would only fail when it is needed.
    early = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    compiled = lambda layer: early(lenient(torch.compile(layer.forward, dynamic=True, backend=BACKEND)))
    return {layer: compiled(layer) for layer in decoder_layers(model)}


def checkpoint_layers(model: PreTrainedModel, **options: object) -> None:
    """Compute each layer again in the backward pass. options: of torch.utils.checkpoint."""
    # transformers 5.17 has only the second name; 6 will have only the first
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **options})
