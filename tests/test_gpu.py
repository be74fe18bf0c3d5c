"""On one CUDA device (`make gpu`): the whole chain of rooms in bf16, how far it is from fp32, and its memory."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.train_step import make_group
from grpo.advantages import normalise
from grpo.batch import LAYOUTS, pack, weigh
from grpo.config import OptimConfig, RolloutConfig
from grpo.distributed import World
from grpo.logprobs import LogprobModel, PolicyModule, frozen_logprobs
from grpo.objectives import resolve
from grpo.policy import Policy, bf16_copy, load_reference
from grpo.records import Problem
from grpo.rewards import Reward, score_groups
from grpo.rollout import Sampler
from grpo.update import Updater, make_optimizer, update_policy
from tests.test_learns import share_of_w7
from tests.tiny import adapted, made_up_groups, tiny_qwen2, word_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
OBJECTIVE = resolve("grpo", beta=0.02)
CUDA, MIB = torch.device("cuda"), 2**20
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "initializer_range": 0.05}


def train_three_steps(precision: str, groups_of, *, base: str | None) -> tuple[float, list[dict[str, float]]]:
    """How far the masters moved in three steps, and the metrics of each. groups_of(sampler, step) -> groups.

    base: lora.quantize of a model with adapters; None: a model without.
    """
    world = World(rank=0, size=1, device=torch.device("cuda"))
    model = tiny_qwen2(**SHAPE).to("cuda")
    if base == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[quant]'")
    if base:
        model = adapted(model if precision == "fp32" else bf16_copy(model), quantize=base)
    policy = Policy(model, word_tokenizer(), precision)
    module = PolicyModule(policy, temperature=1.0, impl="auto")
    reference = LogprobModel(load_reference(policy), temperature=1.0, impl="auto")
    rollout = RolloutConfig(group_size=8, max_new_tokens=24, max_sequences=64, prefill_tokens=2048)
    sampler = Sampler(policy.model, policy.tokenizer, rollout, stop=(), seed=0)
    start = torch.cat([parameter.detach().flatten().clone() for parameter in policy.masters.parameters()])
    optimizer = make_optimizer(list(module.parameters()), OptimConfig(lr=1e-3))
    updater = Updater(module, optimizer, OBJECTIVE, world, 1.0, policy.refresh)
    rows = []
    for step in range(1, 4):
        groups = groups_of(sampler, step)
        scores = score_groups(groups, {"share": Reward(share_of_w7, 1.0)}, require_finish=False)
        batch = pack(
            groups,
            minibatches=1,
            passes=1,
            tokens_per_micro_batch=512,
            max_over_ranks=world.max,
            device=world.device,
        )
        frozen_logprobs(batch, module, reference)
        advantages = torch.randn(scores.total.shape, generator=torch.Generator().manual_seed(step))
        advantages += normalise(OBJECTIVE.advantages, scores.total, scores.scored)
        weigh(
            batch,
            advantages,
            scores.scored,
            aggregation=OBJECTIVE.aggregation,
            max_new_tokens=24,
            sum_over_ranks=world.sum,
        )
        rows.append(update_policy(updater, batch, step=step, lr=1e-3))
    end = torch.cat([parameter.detach().flatten() for parameter in policy.masters.parameters()])
    return (end - start).norm().item(), rows


@pytest.mark.parametrize("base", [None, "none", "nf4"])
def test_three_steps_in_bf16_have_finite_losses_and_move_the_masters_as_far_as_in_fp32(base):
    fixed = lambda sampler, step: made_up_groups(8, 8, seed=step)
    distance_fp32, _ = train_three_steps("fp32", fixed, base=base)
    distance_bf16, rows = train_three_steps("bf16", fixed, base=base)
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    assert distance_bf16 == pytest.approx(distance_fp32, rel=0.1)


@pytest.mark.parametrize("base", [None, "none", "nf4"])
def test_sampled_log_probs_agree_with_the_training_forward(base):
    problems = [Problem(id=str(i), question="", answer="", index=i, prompt_ids=(2 + i, 3, 4)) for i in range(8)]
    sample = lambda sampler, step: sampler.generate(problems, step)
    _, fp32 = train_three_steps("fp32", sample, base=base)
    _, bf16 = train_three_steps("bf16", sample, base=base)
    assert max(row["mismatch_max"] for row in fp32) < 1e-3
    assert max(row["mismatch"] for row in bf16) < 0.1  # an untrained model; reported every step as `mismatch`


def gradient(precision: str, layout: str) -> torch.Tensor:
    """Of a weighted sum of log-probs by every master, for weights that are bf16 numbers in either precision."""
    model = tiny_qwen2(**SHAPE).to(CUDA)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    module = PolicyModule(Policy(model, word_tokenizer(), precision), temperature=1.0, impl="auto")
    groups = made_up_groups(8, 8)
    members = [(g, s) for g in range(8) for s in range(8)]
    logprobs, _ = module(LAYOUTS[layout][1](groups, members, CUDA))
    (torch.linspace(-1, 1, len(logprobs), device=CUDA) * logprobs).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).double()


def test_a_shared_prefix_gives_the_gradient_of_padded_rows():
    exact = gradient("fp32", "padded")
    distance = lambda found: ((found - exact).norm() / exact.norm()).item()
    assert distance(gradient("fp32", "packed")) < 1e-4
    assert distance(gradient("bf16", "packed")) < 1.5 * distance(gradient("bf16", "padded")) < 0.15


def test_a_reference_on_the_cpu_gives_the_same_bits_and_its_memory_back():
    policy = Policy(tiny_qwen2(**SHAPE, vocab_size=4096).to(CUDA), word_tokenizer(), "bf16")
    reference = LogprobModel(load_reference(policy), temperature=1.0, impl="auto")
    rows = LAYOUTS["packed"][1](made_up_groups(2, 2), [(0, 0), (0, 1), (1, 0)], CUDA)
    weights = sum(parameter.nbytes for parameter in reference.parameters())
    with torch.no_grad():
        expected = reference(rows)[0]
        before = torch.cuda.memory_allocated()
        reference.keep_on_cpu()
        assert before - torch.cuda.memory_allocated() > weights - MIB > 0
        for _ in range(2):
            with reference.weights_loaded(CUDA):
                assert torch.equal(reference(rows)[0], expected)
            assert torch.cuda.memory_allocated() < before - weights + MIB


def one_step(memory: int | None = None) -> tuple[dict[str, float], Updater, int]:
    """The metrics of an optimizer step of one large micro-batch, and the most memory that it held; `memory`: a limit in
    bytes beyond what is held before."""
    world = World(rank=0, size=1, device=CUDA)
    policy = Policy(tiny_qwen2(**SHAPE).to(CUDA), word_tokenizer(), "bf16")
    module = PolicyModule(policy, temperature=1.0, impl="auto")
    optimizer = make_optimizer(list(module.parameters()), OptimConfig(lr=1e-3))
    updater = Updater(module, optimizer, resolve("dr_grpo"), world, 1.0, policy.refresh, tokens_per_micro_batch=40_000)
    groups = [make_group(200, 8, 61, 100, 300, seed=seed) for seed in range(20)]
    limits = {"minibatches": 1, "passes": 1, "tokens_per_micro_batch": updater.token_budget}
    batch = pack(groups, **limits, max_over_ranks=world.max, device=CUDA)
    assert len(batch.micro_batches) == 1
    advantages, counted = torch.tensor([1.0, -0.5] * 4).expand(20, 8), torch.ones(20, 8, dtype=torch.bool)
    weigh(batch, advantages, counted, aggregation="token_mean", max_new_tokens=300, sum_over_ranks=world.sum)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, total = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(CUDA).total_memory
    if memory is not None:
        torch.cuda.set_per_process_memory_fraction((before + memory) / total)
    try:
        metrics = update_policy(updater, batch, step=1, lr=1e-3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return metrics, updater, torch.cuda.max_memory_allocated() - before


def test_a_micro_batch_that_does_not_fit_is_halved_with_the_same_gradient():
    one_step()  # libraries take what they keep
    expected, updater, needed = one_step()
    assert updater.too_large is None and needed > 256 * MIB
    metrics, updater, _ = one_step(memory=int(0.8 * needed))
    assert (updater.too_large, updater.token_budget) == (40_000, 20_000)
    for name in ("loss", "grad_norm", "entropy"):
        assert metrics[name] == pytest.approx(expected[name], rel=2e-2, abs=1e-5)
