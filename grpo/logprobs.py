"""Micro-batch -> flat log-probs and entropy of its completion tokens. Policy, old and reference all go this way.

`LogprobModel` is the computation; `PolicyModule` is the only module that DistributedDataParallel wraps and
`PolicyModule.forward` the only call that training makes. Every gradient flows through autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.policy import Policy
from grpo.records import Batch, MicroBatch
from kernels import linear_logprob

TokenLoss = Callable[
    [Tensor, Tensor, slice], Tensor
]  # (logprobs, entropy, rows of the micro-batch's [T]) -> loss per token


class LogprobModel(nn.Module):
    """A causal language model as a function from micro-batch to ([T], [T]) log-probs and entropy, fp32, tempered."""

    def __init__(self, model: PreTrainedModel, *, temperature: float, impl: str):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.impl = impl

    def forward(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        # Right padding needs no mask under causal attention, and explicit positions leave nothing to be guessed.
        outputs = self.model.base_model(
            input_ids=micro_batch.input_ids, position_ids=micro_batch.position_ids, use_cache=False
        )
        hidden = outputs.last_hidden_state.flatten(0, 1)[
            micro_batch.source
        ]  # row source[t] predicts token t: the only shift
        head = self.model.get_output_embeddings()
        return linear_logprob(
            hidden,
            head.weight,
            micro_batch.tokens.target,
            temperature=self.temperature,
            bias=head.bias,
            softcap=getattr(self.model.config, "final_logit_softcapping", None),
            impl=self.impl,
        )


class _WorkingCopy(torch.autograd.Function):
    """Forward: the bf16 working copy. Backward: its gradient goes to the fp32 master, in fp32."""

    @staticmethod
    def forward(ctx, master: Tensor, working: Tensor) -> Tensor:
        return working.view_as(working)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


@contextmanager
def using_weights(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Let `model` compute with these tensors in place of its parameters, tied ones too; then put its own back.

    Like torch.func.functional_call, but as a context, because gradient checkpointing has to enter it again when it
    computes a layer a second time in the backward pass.
    """
    owners = []
    by_parameter = {id(parameter): weights[name] for name, parameter in model.named_parameters()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.append((module, name, parameter))
    try:
        for module, name, parameter in owners:
            module._parameters[name] = by_parameter[id(parameter)]
        yield
    finally:
        for module, name, parameter in owners:
            module._parameters[name] = parameter


class PolicyModule(nn.Module):
    """The policy as DistributedDataParallel sees it: its parameters are the fp32 masters."""

    def __init__(self, policy: Policy, *, temperature: float, impl: str, checkpointing: bool = False):
        super().__init__()
        self.masters = policy.masters
        compute = LogprobModel(policy.model, temperature=temperature, impl=impl)
        self._hidden_from_ddp = (compute,)  # a tuple, so that the working copy is not registered as parameters too
        self._shares_weights = policy.model is policy.masters
        self._weights: dict[str, Tensor] = {}
        if checkpointing:
            options = {"use_reentrant": False, "context_fn": self._checkpoint_contexts}
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    @property
    def compute(self) -> LogprobModel:
        return self._hidden_from_ddp[0]

    def forward(self, micro_batch: MicroBatch, token_loss: TokenLoss | None = None) -> tuple[Tensor, ...]:
        """Log-probs and entropy, each [T]; or, given `token_loss`, the weighted loss summed over the micro-batch
        (a scalar) with detached log-probs and entropy."""
        with self._weights_for_this_pass():
            logprobs, entropy = self.compute(micro_batch)
        if token_loss is None:
            return logprobs, entropy
        loss = token_loss(logprobs, entropy, slice(0, len(logprobs))).sum()
        return loss, logprobs.detach(), entropy.detach()

    def _weights_for_this_pass(self) -> AbstractContextManager:
        """The working copy, tied to the masters by a cast whose backward hands them fp32 gradients."""
        if self._shares_weights:
            return nullcontext()
        working = dict(self.compute.model.named_parameters())
        masters = self.masters.named_parameters()
        self._weights = {name: _WorkingCopy.apply(master, working[name]) for name, master in masters}
        return using_weights(self.compute.model, self._weights)

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For the forward pass of a checkpointed layer, and for its second computation in the backward pass."""
        if self._shares_weights:
            return nullcontext(), nullcontext()
        return nullcontext(), using_weights(self.compute.model, self._weights)


@torch.no_grad()
def frozen_logprobs(
    batch: Batch, policy: PolicyModule, reference: LogprobModel | None, *, always_policy: bool = False
) -> None:
    """Fill `old` and `entropy` (where the policy will move within the batch, or always) and `ref` (with a reference).

    With one optimizer step per rollout old is the current log-prob itself: no pass is made for it, unless the
    objective has to know it beforehand (`Objective.needs_frozen_pass`).
    """
    needs_policy = always_policy or len(batch.optimizer_steps) > 1
    for micro_batch in {id(micro_batch): micro_batch for micro_batch in batch.micro_batches}.values():
        if needs_policy:
            micro_batch.tokens.old, micro_batch.tokens.entropy = policy(micro_batch)
        if reference is not None:
            micro_batch.tokens.ref = reference(micro_batch)[0]
