"""What each rank keeps of masters, gradients and Adam moments: all, or a shard. grpo.run calls `distribute` once.

    ddp     all three whole on every rank
    zero1   shards of masters and moments; gradients whole, averaged by DistributedDataParallel (ZeRO stage 1,
            arXiv:1910.02054 section 5.1), bit-identical to ddp
    fsdp    shards of all three (FSDP2): the training forward gathers one layer at a time, and the sampler's working
            copy exists only while sampling

A shard is a DTensor: this rank's rows of dimension 0, split as by torch.chunk. Checkpoints hold whole tensors, so a run
may be resumed under another strategy or with another number of ranks.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from grpo.distributed import World
from grpo.layers import decoder_layers

if TYPE_CHECKING:
    from grpo.policy import Policy

BUCKET_BYTES = 2**25  # size of the whole tensors that are gathered in one message


def rows_of(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """A view of this rank's rows; it may have none if there are fewer rows than ranks."""
    rows = whole.chunk(mesh.size())[mesh.get_local_rank() : mesh.get_local_rank() + 1]
    return rows[0] if rows else whole[:0]


def shard_of(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's shard, a view, of a tensor that is whole and the same on every rank."""
    return as_shard(rows_of(whole, mesh), whole, mesh)


def as_shard(rows: Tensor, whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's rows, of a tensor with the shape of `whole`, as a DTensor."""
    layout = {"shape": whole.shape, "stride": whole.stride(), "run_check": False}
    return DTensor.from_local(rows, mesh, [Shard(0)], **layout)


def whole_of(tensor: Tensor) -> Tensor:
    """The shards of all ranks joined; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_writer(tensor: Tensor) -> Tensor:
    """A whole tensor unchanged; a shard gathered on the CPU of rank 0, which writes it. Every rank must call it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    whole = whole_of(tensor.detach())
    return whole.cpu() if torch.distributed.get_rank() == 0 else torch.empty(0)


def fill(tensor: Tensor, whole: Tensor) -> None:
    """Write a whole tensor, the same on every rank, into a tensor or into this rank's shard of one."""
    if isinstance(tensor, DTensor):
        tensor, whole = tensor.to_local(), rows_of(whole, tensor.device_mesh)
    tensor.copy_(whole)


def fill_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy into the first of each pair, a whole tensor, the second: a whole one, or a shard, gathered from all ranks in
    buckets."""
    buckets, end = defaultdict(list), 0
    for whole, source in pairs:
        if isinstance(source, DTensor):
            end += whole.nbytes
            buckets[whole.dtype, end // BUCKET_BYTES].append((whole, source))
        else:
            whole.copy_(source)
    for bucket in buckets.values():
        _gather(*zip(*bucket, strict=True))


def _gather(wholes: tuple[Tensor, ...], shards: tuple[DTensor, ...]) -> None:
    """Fill whole tensors from the shards of all ranks in one all_gather, in the dtype of the whole tensors. A rank with
    fewer rows leaves part of its slot unused."""
    mesh = shards[0].device_mesh
    sizes = [whole.chunk(mesh.size())[0].numel() for whole in wholes]
    fitting = lambda slot, rows: slot[: rows.numel()].view_as(rows)
    local = [shard.to_local() for shard in shards]
    sent = wholes[0].new_empty(sum(sizes))
    torch._foreach_copy_(list(map(fitting, sent.split(sizes), local)), local)
    received = [torch.empty_like(sent) for _ in range(mesh.size())]
    torch.distributed.all_gather(received, sent, group=mesh.get_group())
    into, out_of = [], []
    for whole, *slots in zip(wholes, *(of_rank.split(sizes) for of_rank in received), strict=True):
        for rows, slot in zip(whole.chunk(mesh.size()), slots, strict=False):  # fewer rows than ranks: fewer chunks
            into.append(rows)
            out_of.append(fitting(slot, rows))
    torch._foreach_copy_(into, out_of)


class ShardedAdamW(torch.optim.AdamW):
    """AdamW on this rank's rows of the masters; in a checkpoint its state looks like that of AdamW on whole masters.

    masters: the parameters that receive the gradients, in the order of `shards`; under fsdp they are the shards.
    """

    def __init__(self, shards: list[DTensor], masters: list[nn.Parameter], **options: object):
        self.rows = [shard.detach().to_local() for shard in shards]
        super().__init__(self.rows, **options)
        self.pairs = list(zip(shards, masters, strict=True))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the masters."""
        for _, master in self.pairs:
            if set_to_none:
                master.grad = None
            elif master.grad is not None:
                master.grad.zero_()

    def step(self) -> None:
        """Update this rank's rows with its rows of each gradient."""
        for rows, (shard, master) in zip(self.rows, self.pairs, strict=True):
            gradient = master.grad
            rows.grad = gradient.to_local() if shard is master else rows_of(gradient, shard.device_mesh)
        super().step()
        for rows in self.rows:
            rows.grad = None

    def state_dict(self) -> dict:
        """On rank 0 the state of AdamW on whole masters, on the CPU. Every rank must call it."""
        return self._convert(
            super().state_dict(),
            lambda value, shard: gather_to_writer(as_shard(value, shard, shard.device_mesh) if value.dim() else value),
        )

    def load_state_dict(self, state: dict) -> None:
        """Load this rank's rows of the state that `state_dict` returned on rank 0."""
        rows = lambda value, shard: rows_of(value, shard.device_mesh).clone() if value.shape == shard.shape else value
        super().load_state_dict(self._convert(state, rows))

    def _convert(self, state: dict, convert: Callable[[Tensor, DTensor], Tensor]) -> dict:
        """The state with every value, a shard's moment or step count, replaced by convert(value, shard)."""
        shards, of_all = [shard for shard, _ in self.pairs], state["state"]
        converted = {i: {name: convert(value, shards[i]) for name, value in of_all[i].items()} for i in sorted(of_all)}
        return state | {"state": converted}


def shard_fully(module: nn.Module, policy: Policy, mesh: DeviceMesh) -> None:
    """Turn the masters that `module` trains into shards, in place; each layer is gathered when it is computed.

    Gradients are reduced in fp32 with every micro-batch: to keep them until the last, each rank would need them whole.
    """
    options: dict = {"mesh": mesh}
    if policy.model.dtype == torch.bfloat16:
        precision = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
        options["mp_policy"] = MixedPrecisionPolicy(**precision)
    for layer in decoder_layers(policy.masters):
        fully_shard(layer, **options)
    fully_shard(module, **options)
    policy.local_parameters = {name: shard for name, shard in policy.masters.named_parameters() if shard.requires_grad}
    policy.trained = list(policy.local_parameters.values())


def distribute(module: nn.Module, policies: list[Policy], world: World, strategy: str) -> nn.Module:
    """`module`, the PolicyModule of the first policy, wrapped so that its gradients are averaged over all ranks.

    The masters of all policies given are sharded as the strategy says: a MovingReference must match its policy.
    """
    if world.size == 1:
        return module
    mesh = init_device_mesh(world.device.type, (world.size,))
    if strategy == "fsdp":
        shard_fully(module, policies[0], mesh)
        policies = policies[1:]
    else:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 renames broadcast_buffers
            module = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    if strategy != "ddp":
        for policy in policies:
            policy.keep_shards(mesh)
    return module
