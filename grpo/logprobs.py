"""Micro-batch -> flat log-probs and entropy of its completion tokens, for policy, old policy and reference alike.

`LogprobModel` is the computation; `PolicyModule` is the only module that DistributedDataParallel or FSDP wraps, and
`PolicyModule.forward` the only call that training makes. Every gradient flows through autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.attention import SHARED_PREFIX
from grpo.layers import attention_mode, checkpoint_layers, compiled_layers, using_forwards, using_weights
from grpo.policy import Policy
from grpo.records import Batch, MicroBatch, TokenColumns
from kernels import linear_logprob, linear_logprob_loss

# (logprobs, entropy, index of these tokens in the micro-batch's [T]) -> loss per token
TokenLoss = Callable[[Tensor, Tensor, slice | Tensor], Tensor]


class LogprobModel(nn.Module):
    """A causal language model as a function from micro-batch to log-probs and entropy, in fp32, at `temperature`.

    impl: kernels to use.  entropy_gradient: the entropy carries a gradient, too, for an objective with entropy bonus.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float,
        impl: str,
        compile: bool = False,
        entropy_gradient: bool = False,
    ):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.impl = impl
        self.entropy_gradient = entropy_gradient
        self._forwards = compiled_layers(model) if compile else {}
        self._cpu_weights: dict[nn.Parameter, Tensor] = {}

    def keep_on_cpu(self) -> None:
        """From here on the (frozen) weights stay in CPU memory, pinned for CUDA, except within `weights_loaded`."""
        for parameter in self.parameters():
            weights = parameter.data.cpu()
            self._cpu_weights[parameter] = weights.pin_memory() if parameter.is_cuda else weights
            parameter.data = self._cpu_weights[parameter]

    @contextmanager
    def weights_loaded(self, device: torch.device) -> Iterator[None]:
        """Within it every weight is on `device`."""
        try:
            for parameter, weights in self._cpu_weights.items():
                parameter.data = weights.to(device, non_blocking=True, copy=True)
            yield
        finally:
            for parameter, weights in self._cpu_weights.items():
                parameter.data = weights

    def forward(self, micro_batch: MicroBatch, token_loss: TokenLoss | None = None) -> tuple[Tensor, ...]:
        """Log-probs and entropy, each [T]; or, given `token_loss`, as `PolicyModule.forward`."""
        # The only shift of tokens against log-probs: hidden state source[t] predicts token t.
        hidden = self._hidden(micro_batch).flatten(0, 1)[micro_batch.source]
        if token_loss is None:
            return self._head(linear_logprob, hidden, micro_batch.tokens.target)
        return self.folded_loss(hidden, micro_batch.tokens, token_loss)

    def folded_loss(self, hidden: Tensor, tokens: TokenColumns, token_loss: TokenLoss) -> tuple[Tensor, Tensor, Tensor]:
        """Summed loss, log-probs and entropy, given hidden states [T, D]. Tokens that are not counted skip the head:
        their log-prob and entropy are NaN."""
        rows = tokens.head_rows
        if rows is None:
            return self._head(linear_logprob_loss, hidden, tokens.target, token_loss)
        loss_of = lambda logprobs, entropy, chunk: token_loss(logprobs, entropy, rows[chunk])
        loss, *columns = self._head(linear_logprob_loss, hidden[rows], tokens.target[rows], loss_of)
        return loss, *(column.new_full((len(hidden),), torch.nan).index_copy_(0, rows, column) for column in columns)

    def _head(self, op: Callable, hidden: Tensor, target: Tensor, *token_loss: TokenLoss) -> tuple[Tensor, ...]:
        """`linear_logprob` or `linear_logprob_loss` (kernels/) with this model's head."""
        head = self.model.get_output_embeddings()
        return op(
            *(hidden, head.weight, target, *token_loss),
            temperature=self.temperature,
            bias=head.bias,
            softcap=getattr(self.model.config, "final_logit_softcapping", None),
            impl=self.impl,
            entropy_gradient=self.entropy_gradient,
        )

    def _hidden(self, micro_batch: MicroBatch) -> Tensor:
        """Last hidden states, [rows, length, D]."""
        inputs = {"input_ids": micro_batch.input_ids, "position_ids": micro_batch.position_ids, "use_cache": False}
        attention = self.model.config._attn_implementation
        if micro_batch.shared_prefix is not None:
            attention, inputs["shared_prefix"] = SHARED_PREFIX, micro_batch.shared_prefix
        # No mask is needed: causal attention never sees the padding on the right, and positions are explicit.
        with self.training_mode(attention):
            return self.model.base_model(**inputs).last_hidden_state

    @contextmanager
    def training_mode(self, attention: str) -> Iterator[None]:
        """Within it the model uses this attention and its compiled layers, if any; rollout sets its own."""
        with using_forwards(self._forwards), attention_mode(self.model, attention):
            yield


class _WorkingCopy(torch.autograd.Function):
    """Forward: the bf16 working copy's weight. Backward: its gradient goes to the fp32 master, cast to fp32."""

    @staticmethod
    def forward(ctx, master: Tensor, working: Tensor) -> Tensor:
        return working.view_as(working)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


class PolicyModule(nn.Module):
    """The policy as DistributedDataParallel or FSDP sees it: its parameters are the fp32 masters.

    options: those of LogprobModel.
    """

    compute: LogprobModel  # runs the training forward
    working: PreTrainedModel  # what the sampler uses

    def __init__(self, policy: Policy, *, checkpointing: bool = False, **options: object):
        super().__init__()
        self.masters = policy.masters
        model = policy.masters if policy.is_sampler_only else policy.model
        # Bypasses nn.Module, which would register the working copy's parameters as this module's.
        vars(self).update(compute=LogprobModel(model, **options), working=policy.model)
        self._shares_weights = model is policy.masters
        self._weights: dict[str, Tensor] = {}
        if checkpointing:
            checkpoint_layers(model, context_fn=self._checkpoint_contexts)

    def forward(self, micro_batch: MicroBatch, token_loss: TokenLoss | None = None) -> tuple[Tensor, ...]:
        """Log-probs and entropy, each [T]; or, given `token_loss`, the weighted loss summed over the micro-batch
        (a scalar) with detached log-probs and entropy, NaN where a token is not counted.

        With `token_loss` the head computes its logits once, chunk by chunk, so a token's loss must not depend on other
        tokens. A loss over whole sequences needs all log-probs first, and computes the logits a second time.
        """
        with self._weights_for_this_pass():
            return self.compute(micro_batch, token_loss)

    def _weights_for_this_pass(self) -> AbstractContextManager:
        """For a pass with gradients: replace the working copy's weights by outputs of `_WorkingCopy`, which pass their
        gradients on to the masters. Without gradients it stays as it is: compiled layers then share the reference's
        graphs."""
        if self._shares_weights or not torch.is_grad_enabled():
            return nullcontext()
        working = dict(self.compute.model.named_parameters())
        trained = [(name, master) for name, master in self.masters.named_parameters() if master.requires_grad]
        self._weights = {name: _WorkingCopy.apply(master, working[name]) for name, master in trained}
        return using_weights(self.compute.model, self._weights)

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts for a checkpointed layer's forward pass and for its recomputation in the backward pass."""
        return nullcontext(), self._as_in_this_pass(self.compute.model.config._attn_implementation, self._weights)

    @contextmanager
    def _as_in_this_pass(self, attention: str, weights: dict[str, Tensor]) -> Iterator[None]:
        """Within it the model has this forward pass's attention and weights again: it lost both at the pass's end."""
        weights_then = using_weights(self.compute.model, weights) if weights else nullcontext()
        with self.compute.training_mode(attention), weights_then:
            yield


@torch.no_grad()
def frozen_logprobs(
    batch: Batch, policy: PolicyModule, reference: LogprobModel | None, *, always_policy: bool = False
) -> None:
    """Fill the batch's columns `old` and `entropy`, if the policy takes several steps on it, and `ref`, if there is a
    reference.

    With one optimizer step per rollout old is the current log-prob itself: no pass is made for it, unless the
    objective needs it earlier (always_policy, see `Objective.needs_frozen_pass`).
    """
    if always_policy or batch.passes * len(batch.optimizer_steps) > 1:
        for micro_batch in batch.micro_batches:
            micro_batch.tokens.old, micro_batch.tokens.entropy = policy(micro_batch)
    if reference is not None:
        with reference.weights_loaded(batch.micro_batches[0].input_ids.device):
            for micro_batch in batch.micro_batches:
                micro_batch.tokens.ref = reference(micro_batch)[0]
