"""ddp, zero1 and fsdp: one gradient, one optimizer step, one checkpoint; what a rank keeps has the estimated size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from grpo import sharding
from grpo.config import Config, DistributedConfig
from grpo.dry_run import weights_estimate
from grpo.layers import decoder_layers
from grpo.logprobs import PolicyModule
from grpo.policy import MovingReference, Policy
from grpo.sharding import distribute, fill_all, shard_of, whole_of
from tests.ranks import run_ranks
from tests.test_config import FACTS
from tests.test_update import ALONE, distance, one_update
from tests.tiny import tiny_qwen2, word_tokenizer

STRATEGIES = ("ddp", "zero1", "fsdp")
IN_BF16 = (torch.bfloat16, "grpo", 60, 2, 2, "packed")
CASES = {  # dtype, objective, token budget, minibatches, passes, layout: how far from one rank
    (torch.float32, "dr_grpo", 30, 2, 1, "packed"): 5e-6,
    (torch.float64, "grpo", 60, 2, 2, "packed"): 1e-10,  # it changes the model for good, so it is not the first
    (torch.float64, "gspo, entropy_bonus", 10_000, 1, 2, "padded"): 1e-10,
}


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def num_bytes(tensors):
    storages = [local(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measured(policy, optimizer):
    """Bytes of this rank, by the names that the dry run gives them; the working copy outside `weights_loaded`."""
    moments = [value for entry in optimizer.state.values() for key, value in entry.items() if key != "step"]
    return {
        "fp32 masters": num_bytes([*policy.local_parameters.values(), *policy.masters.parameters()]),
        "gradients, fp32": num_bytes(parameter.grad for parameter in policy.trained),
        "Adam moments, fp32": num_bytes(moments),
        "working copy, bf16": num_bytes(policy.model.parameters()),
    }


def is_refreshed(policy):
    working = dict(policy.model.named_parameters())
    masters = {name: whole_of(local.detach()) for name, local in policy.local_parameters.items()}
    return all(torch.equal(working[name], master.bfloat16()) for name, master in masters.items())


def in_bf16(world, strategy, load=None):
    """One update; then the checkpoint and what else there is to see. load: a checkpoint that is loaded before, in the
    place of an update by other steps."""
    seen = {}

    def observe(policy, optimizer):
        if load is not None:
            policy.load_state_dict(load["policy"])
            optimizer.load_state_dict(load["optimizer"])
        with policy.weights_loaded():
            seen["is_refreshed"] = is_refreshed(policy)
        seen["is_cut_by_layers"] = all(isinstance(layer, FSDPModule) for layer in decoder_layers(policy.masters))
        seen["bytes"] = measured(policy, optimizer)
        seen["state"] = {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}

    options = {"lr": 1e-3 if load is None else 1e-2, "strategy": strategy, "observe": observe}
    seen["gradients"] = one_update(world, *IN_BF16, **options)[0]
    return seen


def are_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(are_equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def on_a_rank(world):
    checked, bytes_of = {}, {}
    states, gradients = {}, {}
    for strategy in STRATEGIES:
        seen = in_bf16(world, strategy)
        states[strategy], bytes_of[strategy] = world.gather(seen["state"])[0], seen["bytes"]
        gradients[strategy] = seen["gradients"]
        checked[f"the working copy of {strategy} is refreshed"] = seen["is_refreshed"]
        checked[f"{strategy} gathers layer by layer, or nothing"] = seen["is_cut_by_layers"] == (strategy == "fsdp")
        if strategy == "zero1":  # whose gradients are those of ddp
            continue
        # A run that goes on makes its first pass in the middle, and must not differ by that.
        later = one_update(world, torch.float32, "dr_grpo", 30, passes=2, lr=0.0, strategy=strategy)[0]
        first = one_update(world, torch.float32, "dr_grpo", 30, strategy=strategy)[0]
        checked[f"the first pass of {strategy} in a process has the bits of a later one"] = are_equal(first, later)
    checked["zero1 has the gradients of ddp to the bit"] = are_equal(gradients["zero1"], gradients["ddp"])
    # AdamW's CPU kernel rounds what is left over past its vector width differently, and shares end elsewhere.
    apart = distance(states["zero1"]["policy"]["masters"], states["ddp"]["policy"]["masters"])
    checked["zero1 has the weights of ddp but for the last bits of a few"] = apart < 1e-8
    for before, after in (("ddp", "zero1"), ("zero1", "fsdp"), ("fsdp", "ddp")):
        seen = in_bf16(world, after, load=states[before])
        same = not world.is_writer or are_equal(seen["state"], states[before])
        checked[f"{after} goes on from {before}"] = same and seen["is_refreshed"]
    return checked, bytes_of, {case: [as_arrays(world, case, strategy) for strategy in STRATEGIES] for case in CASES}


def as_arrays(world, case, strategy):
    gradients, weights, metrics = one_update(world, *case, strategy=strategy)
    return *({name: tensor.numpy() for name, tensor in tensors.items()} for tensors in (gradients, weights)), metrics


def are_joined(world, bucket_bytes):
    """Whether tensors cut evenly, unevenly, and into fewer rows than ranks come back to the bit, by dtype."""
    sharding.BUCKET_BYTES = bucket_bytes
    mesh = sharding.init_device_mesh("cpu", (world.size,))
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(shape, generator=generator) for shape in ((8, 3), (5, 2, 3), (1, 7), (3,), (9,), (64, 4))]
    shares = [shard_of(master, mesh).clone() for master in masters]
    joined = {}
    for dtype in (torch.float32, torch.bfloat16):
        wholes = [torch.full_like(master, torch.nan, dtype=dtype) for master in masters]
        fill_all(zip(wholes, shares, strict=True))
        joined[dtype] = all(torch.equal(whole, m.to(dtype)) for whole, m in zip(wholes, masters, strict=True))
    return joined


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 2**25])
def test_shares_that_travel_together_are_joined_to_the_bit_however_uneven_they_are(world_size, bucket_bytes):
    for joined in run_ranks(world_size, are_joined, bucket_bytes):
        assert joined == {torch.float32: True, torch.bfloat16: True}


def follow_in_shares(world):
    """Whether a reference that goes half of the way to the policy arrives there, in the same shares."""
    arrived = {}
    for strategy in ("zero1", "fsdp"):
        for precision in ("fp32", "bf16"):
            policy = Policy(tiny_qwen2(), word_tokenizer(), precision)
            if strategy == "fsdp":
                policy.sample_from_copy()
            moving = MovingReference(policy)
            distribute(PolicyModule(policy, temperature=1.0, impl="torch"), [policy, moving], world, strategy)
            with torch.no_grad():
                for local in policy.local_parameters.values():
                    local.add_(1.0)
            moving.follow(policy, 0.5)
            state, model = world.gather(moving.state_dict())[0]["masters"], dict(moving.model.named_parameters())
            for name, before in tiny_qwen2().named_parameters():
                after = before.detach() + 0.5
                torch.testing.assert_close(state[name], after)
                assert torch.equal(model[name], state[name].to(model[name].dtype))
            arrived[strategy, precision] = all(isinstance(local, DTensor) for local in moving.local_parameters.values())
    return arrived


def test_a_moving_reference_follows_in_shares_of_its_own():
    for arrived in run_ranks(2, follow_in_shares):
        assert len(arrived) == 4 and all(arrived.values())


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world_size", [2, 4])
def test_strategies_agree_with_one_rank_and_share_out_what_the_dry_run_says(world_size):
    """In bf16 every checkpoint fits every strategy."""
    facts = replace(FACTS, num_parameters=(num := tiny_qwen2().num_parameters()), num_trained=num, has_reference=False)
    results = run_ranks(world_size, on_a_rank, timeout_s=200)
    for checked, bytes_of, _ in results:
        assert all(checked.values()), [claim for claim, is_true in checked.items() if not is_true]
        for strategy in STRATEGIES:
            config = replace(Config(), distributed=DistributedConfig(strategy=strategy))
            estimate = weights_estimate(config, world_size, facts)[0]
            found = bytes_of[strategy]
            assert found == pytest.approx({name: estimate.get(name, 0) for name in found}, rel=0.05)
    for case, limit in CASES.items():
        gradients, weights, metrics = one_update(ALONE, *case)
        for found_gradients, found_weights, found_metrics in (found for _, _, of in results for found in of[case]):
            as_tensors = lambda arrays: {name: torch.from_numpy(array) for name, array in arrays.items()}
            assert distance(as_tensors(found_gradients), gradients) < limit
            assert distance(as_tensors(found_weights), weights) < limit
            assert found_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)
