"""One decode step: every row reads a token and draws the next.

Whatever the step reads or writes lies in buffers that are allocated once, and nothing in it depends on their contents
or waits for the device. So the same function runs eagerly, and as a CUDA graph that is replayed without Python.
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
    """The buffers, an entry per row of the slab, and the step over the first rows of them."""

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
        self.token = make(torch.int64)  # what it reads next
        self.prefix = make(torch.int64)  # tokens of its prompt, without the last
        self.length = make(torch.int64)  # sampled so far, and so where the next one goes; a finished row stands still
        self.alive = make(torch.bool)
        # By position. The last column, here and in the slab's suffix, is where a row of full length idles.
        self.uniforms = make(torch.float64, width)
        self.ids = make(torch.int64, width)
        self.logprobs = make(torch.float32, width)
        self.owned = (self.token, self.prefix, self.length, self.alive, self.uniforms, self.ids, self.logprobs)
        self.stored = make(torch.int64)  # tokens in its suffix, -1 where it has ended: its attention is left out
        self.place = make(torch.int64)  # its seat, see kernels/decode_attention
        self.row = torch.arange(num_rows, device=device)
        self.eos = torch.tensor(eos, device=device)

    def __call__(self, layout: Decode) -> None:
        """The step, for the rows of `layout`."""
        rollout, size = self.rollout, len(layout.place)
        token, length, alive = self.token[:size], self.length[:size], self.alive[:size]
        self.stored[:size] = torch.where(alive, length, -1)
        self.slab.layout = layout
        with using_forwards(self.forwards):
            logits = forward(self.model, token[:, None], (self.prefix[:size] + length)[:, None], self.slab)
        here = (self.row[:size], length)
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
        length += alive
        alive &= (drawn[:, None] != self.eos).all(1) & (length < rollout.max_new_tokens)

    def move(self, rows: Tensor, to: Tensor) -> None:
        """Rows to the places `to`; every other row is left without an owner: finished, and of no length."""
        for buffer in self.owned:
            kept = buffer[rows]
            buffer.zero_()
            buffer[to] = kept

    def admit(self, rows: Tensor, *, token: Tensor, prefix: Tensor, uniforms: Tensor) -> None:
        """New owners of `rows`, with nothing sampled yet."""
        self.token[rows], self.prefix[rows], self.uniforms[rows] = token, prefix, uniforms
        self.alive[rows] = True
