"""One decode step: every row reads a token and draws the next.

Whatever the step reads or writes lies in buffers that are allocated once. Its shapes and control flow never depend on
their contents, and it never waits for the device: so the same function runs eagerly or is captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import kernels
from grpo.config import RolloutConfig
from grpo.layers import using_forwards
from grpo.rollout.slab import Decode, KVSlab, Probe


def forward(model: PreTrainedModel, ids: Tensor, positions: Tensor, slab: KVSlab | Probe) -> Tensor:
    """Logits of the last position, [N, V]. ids, positions: [N, length] int64."""
    output = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1, slab=slab)
    return output.logits[:, -1]


class DecodeStep:
    """Buffers with an entry per row of the slab, and the decode step over the first rows of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        slab: KVSlab,
        rollout: RolloutConfig,
        eos: list[int],
        forwards: dict[nn.Module, Callable],  # of layers that are compiled
    ):
        self.model, self.slab, self.rollout, self.forwards = model, slab, rollout, forwards
        num_rows, width, device = slab.plan.num_rows, slab.plan.suffix_size, model.device
        make = lambda dtype, *shape: torch.zeros(num_rows, *shape, dtype=dtype, device=device)
        self.token = make(torch.int64)  # what the row reads next
        self.prefix_lengths = make(torch.int64)  # tokens of its prompt, without the last
        self.num_sampled = make(torch.int64)  # tokens so far, so the column of the next one; fixed once it has ended
        self.alive = make(torch.bool)
        # [rows, position]. The last column is scratch: a row of full length goes on writing there.
        self.uniforms = make(torch.float64, width)
        self.ids = make(torch.int64, width)
        self.logprobs = make(torch.float32, width)
        state = (self.token, self.prefix_lengths, self.num_sampled, self.alive, self.uniforms, self.ids, self.logprobs)
        self.owned = state  # what moves with a row's owner; the others are set anew
        self.suffix_lengths = make(torch.int64)  # stored tokens; -1 once it has ended, so that attention skips it
        self.seat_index = make(torch.int64)  # group * seats + seat, see kernels/decode_attention/reference.py
        self.row = torch.arange(num_rows, device=device)
        self.eos = torch.tensor(eos, device=device)

    def __call__(self, layout: Decode) -> None:
        """Run the step for the rows of `layout`, which are the first ones."""
        rollout, size = self.rollout, len(layout.seat_index)
        token, num_sampled, alive = self.token[:size], self.num_sampled[:size], self.alive[:size]
        self.suffix_lengths[:size] = torch.where(alive, num_sampled, -1)
        self.slab.layout = layout
        with using_forwards(self.forwards):
            positions = self.prefix_lengths[:size] + num_sampled
            logits = forward(self.model, token[:, None], positions[:, None], self.slab)
        here = (self.row[:size], num_sampled)
        drawn, logprob = kernels.sample_token(
            logits,
            self.uniforms[here],
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            impl=self.slab.impl,
        )
        self.ids[here], self.logprobs[here] = drawn, logprob
        token.copy_(drawn)
        num_sampled += alive
        alive &= (drawn[:, None] != self.eos).all(1) & (num_sampled < rollout.max_new_tokens)

    def move(self, rows: Tensor, to: Tensor) -> None:
        """Move rows to `to`; every other row is left without an owner: not alive, and with nothing sampled."""
        for buffer in self.owned:
            kept = buffer[rows]
            buffer.zero_()
            buffer[to] = kept

    def admit(self, rows: Tensor, *, token: Tensor, prefix_lengths: Tensor, uniforms: Tensor) -> None:
        """New owners of `rows`, with nothing sampled yet."""
        self.token[rows], self.prefix_lengths[rows], self.uniforms[rows] = token, prefix_lengths, uniforms
        self.alive[rows] = True
