"""Adapters over a base in 4 bits: equal to adapters over its dequantized weights, everywhere that a model goes."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import eval as evaluation
import train
from grpo import config_check, layers, lora
from grpo.config import BatchConfig, Config, LoraConfig, ModelConfig, ObjectiveConfig, RolloutConfig
from grpo.dry_run import memory_estimate, model_facts
from grpo.first_batch import check_packing, make_yardstick
from grpo.logprobs import PolicyModule
from grpo.policy import MovingReference, Policy, bf16_copy, load_model_config, load_reference
from grpo.rewards import Reward
from grpo.rollout import Sampler
from tests.ranks import run_ranks
from tests.reward_functions import share_of_w7
from tests.test_learns import mean_rewards
from tests.test_lora import CPU, RUN, SAVED, bf16_gradients, logits, micro_batch
from tests.test_train import DEMO, rows_without_clock
from tests.test_update import distance
from tests.tiny import adapted, made_up_groups, tiny_qwen2, word_tokenizer

# QLoRA, appendix E, to the digits that a float has.
LEVELS = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
LEVELS += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]


@pytest.fixture
def library():
    reason = "bitsandbytes is not installed: pip install -c constraints.txt -e '.[quant]'"
    return pytest.importorskip("bitsandbytes", minversion="0.46", reason=reason)


def in_4_bits(model, **settings):
    return adapted(model, quantize="nf4", **settings)


def over_dequantized(model, **settings):
    """The same adapters, over the weights that the 4 bits stand for, by the definition of NF4."""
    model = adapted(model, **settings)
    for layer in model.modules():
        if isinstance(layer, lora.LoraLinear):
            layer.weight.data = rounded_to_nf4(layer.weight.data)
    return model


def rounded_to_nf4(weight):
    """Blocks of 64, each divided by its largest magnitude and rounded to the nearest level."""
    blocks = weight.float().reshape(-1, 64)
    scales, levels = blocks.abs().amax(1, keepdim=True), torch.tensor(LEVELS)
    nearest = (blocks / scales)[..., None].sub(levels).abs().argmin(-1)
    return (levels[nearest] * scales).reshape(weight.shape).to(weight.dtype)


def matrices(model):
    return [layer.weight for layer in model.modules() if isinstance(layer, lora.LoraLinear)]


def logprobs_and_gradients(model, layout):
    module = PolicyModule(Policy(model, word_tokenizer(), "fp32"), temperature=0.9, impl="torch")
    found = module(micro_batch(layout=layout))[0]
    (found**2).sum().backward()
    return found.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_matrix_of_levels_is_kept_exactly_and_any_other_is_rounded_to_them(library):
    levels, x = torch.tensor(LEVELS), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    exact = 2.5 * levels.repeat(3, 4)  # each row a block: its scale is 2.5
    torch.testing.assert_close(lora.Nf4(exact).product(x, None), x @ exact.T, rtol=1e-5, atol=1e-5)
    weight, bias = torch.randn(2, 96, generator=torch.Generator().manual_seed(1)), torch.ones(2)
    product = lora.Nf4(weight).product(torch.eye(96), bias)
    torch.testing.assert_close(product, rounded_to_nf4(weight).T + 1, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(product, weight.T + 1, atol=0.05)


@pytest.mark.parametrize("shape, settings", [({}, {}), SAVED], ids=["adapters", "modules_to_save"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_log_probs_and_gradients_are_those_of_adapters_over_the_dequantized_weights(library, layout, shape, settings):
    ours, gradients = logprobs_and_gradients(in_4_bits(tiny_qwen2(**shape), **settings), layout)
    theirs, expected = logprobs_and_gradients(over_dequantized(tiny_qwen2(**shape), **settings), layout)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert {name.rpartition(".")[2] for name in gradients} == {"lora_A", "lora_B"} | ({"weight"} if settings else set())
    assert distance(gradients, expected) < 1e-5 and gradients.keys() == expected.keys()
    unrounded, _ = logprobs_and_gradients(adapted(tiny_qwen2(**shape), **settings), layout)
    assert not torch.allclose(ours, unrounded, atol=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_working_copy_and_references_share_the_4_bits_and_follow_by_their_adapters(library, base, precision):
    policy = lora.load(str(base), LoraConfig(rank=2, quantize="nf4"), precision=precision, device=CPU)
    reference, moving = load_reference(policy), MovingReference(policy)
    start = logits(reference)
    with torch.no_grad():
        for parameter in policy.trained:
            parameter.add_(0.1)
    policy.refresh()
    assert torch.equal(logits(reference), start) and torch.equal(logits(moving.model), start)
    assert not torch.equal(logits(policy.model), start)
    moving.follow(policy, 1.0)
    assert torch.equal(logits(moving.model), logits(policy.model))
    models = policy.masters, policy.model, reference, moving.masters, moving.model
    assert all(len(set(map(id, same))) == 1 for same in zip(*map(matrices, models), strict=True))
    named, trained = policy.masters.named_parameters(), policy.local_parameters
    kept = {parameter.dtype for name, parameter in named if name not in trained}
    assert kept == {policy.model.dtype}  # embeddings, norms and biases


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_packing_check_knows_the_truth_of_a_model_in_4_bits(library, precision):
    model = in_4_bits(tiny_qwen2() if precision == "fp32" else bf16_copy(tiny_qwen2()))
    module = PolicyModule(Policy(model, word_tokenizer(), precision), temperature=1.0, impl="torch")
    mean, _ = check_packing(module, make_yardstick(module, made_up_groups(1), CPU))
    assert mean < 1e-5 if precision == "fp32" else 1e-5 < mean < 0.1


@pytest.mark.parametrize("change", ["checkpointing", "compile"])
def test_recomputed_and_compiled_layers_give_the_same_gradients(library, change, monkeypatch):
    monkeypatch.setattr(layers, "BACKEND", "eager")  # inductor's own gave the same in two minutes

    def gradients(**options):
        policy = Policy(in_4_bits(tiny_qwen2()).train(), word_tokenizer(), "fp32")
        module = PolicyModule(policy, temperature=1.0, impl="torch", **options)
        module(micro_batch())[0].sum().backward()
        return [parameter.grad for parameter in policy.trained]

    for plain, changed in zip(gradients(), gradients(**{change: True}), strict=True):
        assert plain.norm() > 0
        torch.testing.assert_close(plain, changed, rtol=1e-4, atol=1e-4)


def test_the_sampler_draws_from_the_model_in_4_bits(library):
    policy = Policy(in_4_bits(tiny_qwen2()), word_tokenizer(), "fp32")
    rollout = RolloutConfig(group_size=4, max_new_tokens=12, max_sequences=64, prefill_tokens=512)
    sampler = Sampler(policy.model, policy.tokenizer, rollout, stop=(), seed=0)
    rows = micro_batch(sampler.generate([group.problem for group in made_up_groups(3)], step=1), "padded")
    found = PolicyModule(policy, temperature=1.0, impl="torch")(rows)[0]
    torch.testing.assert_close(rows.tokens.sampler, found.detach(), rtol=0, atol=1e-5)


def test_reward_rises_with_adapters_over_4_bits(library):
    model = tiny_qwen2(initializer_range=0.15)
    lora.add_adapters(model, LoraConfig(rank=8, alpha=16, quantize="nf4"))
    before = [matrix.packed.clone() for matrix in matrices(model)]
    means, _ = mean_rewards({"share": Reward(share_of_w7, 1.0)}, model=model)
    assert sum(means[:3]) / 3 < 0.06 and sum(means[-3:]) / 3 > 0.5
    assert all(torch.equal(matrix.packed, packed) for matrix, packed in zip(matrices(model), before, strict=True))


def on_two_ranks(world):
    wrap = lambda module: DistributedDataParallel(module, broadcast_buffers=False)
    reduced = bf16_gradients(wrap, world.rank, adapt=in_4_bits)
    return reduced, bf16_gradients(lambda module: module, 0, 1, adapt=in_4_bits)


def test_two_ranks_reduce_what_one_would_have(library):
    for reduced, alone in run_ranks(2, on_two_ranks):
        assert all(abs(2 * mean - alone[name]).max() < 1e-5 * abs(alone[name]).max() for name, mean in reduced.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_dry_run_knows_the_bytes_of_a_base_in_4_bits(library, base, precision):
    model = ModelConfig(path=str(base), precision=precision)
    settings = LoraConfig(rank=2, quantize="nf4")
    config = replace(Config(), model=model, lora=settings, objective=ObjectiveConfig(beta=0.1))
    config = replace(config, batch=BatchConfig(tokens_per_micro_batch=64))
    estimate = memory_estimate(config, 1, model_facts(config, CPU))
    expected = sum(estimate.get(name, 0) for name in ("fp32 masters", "frozen base", "working copy, bf16"))
    policy = lora.load(str(base), settings, precision=precision, device=CPU)
    parts = policy.masters, policy.model, load_reference(policy)
    own = sum(parameter.nbytes for parameter in {parameter for part in parts for parameter in part.parameters()})
    own += sum(matrix.packed.nbytes + matrix.state.absmax.nbytes for matrix in matrices(policy.masters))
    assert own == expected + estimate["frozen reference"]


# --- files ---


def saved(base):
    """A folder of adapters that were trained over `base` in 4 bits, and the logits of that model."""
    folder = base.parent / "adapter"
    folder.mkdir()
    policy = lora.load(str(base), LoraConfig(rank=4, quantize="nf4"), precision="fp32", device=CPU)
    with torch.no_grad():
        for parameter in policy.trained:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.save(folder)
    return folder, logits(policy.model)


def test_adapters_come_back_over_the_4_bits_that_they_were_trained_over(library, base):
    folder, expected = saved(base)
    policy = lora.load(str(folder), precision="fp32", device=CPU)
    assert torch.equal(logits(policy.model), expected) and policy.settings.quantize == "nf4"
    again = base.parent / "again"
    again.mkdir()
    policy.save(again)
    assert lora.read_config(again) == lora.read_config(folder)


def test_merging_is_into_the_unrounded_base_and_says_so(library, base, capsys):
    (folder, rounded), out = saved(base), base.parent / "out"
    assert lora.main(["merge", str(folder), str(out)]) == 0
    assert "trained over a base in 4 bits, merged into the unrounded one" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(out)
    plain = lora.load(str(folder), precision="fp32", device=CPU, unquantized=True)
    torch.testing.assert_close(logits(merged), logits(plain.model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), rounded, atol=0.05)


def test_peft_opens_such_adapters_over_its_own_base_in_4_bits(library, base):
    reason = "peft is not installed: pip install -c constraints.txt -e .[dev]"
    peft = pytest.importorskip("peft", reason=reason)
    folder, expected = saved(base)
    theirs = AutoModelForCausalLM.from_pretrained(base)
    for name, layer in list(theirs.named_modules()):
        if name.endswith("_proj"):
            sizes = layer.in_features, layer.out_features, layer.bias is not None
            quantized = library.nn.Linear4bit(*sizes, torch.float32)
            quantized.weight = library.nn.Params4bit(layer.weight.data, compress_statistics=False, quant_type="nf4")
            quantized.bias = layer.bias
            theirs.set_submodule(name, quantized.to("cpu"))
    theirs = peft.PeftModel.from_pretrained(theirs, folder)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)


# --- refusals ---


def test_without_the_library_4_bits_are_refused_with_the_way_to_get_it(base, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"bitsandbytes is not installed; pip install 'bitsandbytes>=0.46'"):
        lora.load(str(base), LoraConfig(rank=2, quantize="nf4"), precision="fp32", device=CPU)
    monkeypatch.chdir(base.parent)
    options = [*DEMO, "--model.path", "base", "--lora.rank=2", "--lora.quantize=nf4", "--run-dir", "run"]
    assert train.main(options) == 2
    assert "lora.quantize=nf4, but bitsandbytes is not installed" in capsys.readouterr().err
    assert not Path("run").exists()
    assert train.main([*options, "--dry-run"]) == 0  # a laptop may plan what a GPU will do


def test_4_bits_without_adapters_are_refused():
    with pytest.raises(ValueError, match=r"lora.quantize=nf4 with lora.rank=0: .* set lora.rank=16"):
        config_check.check(replace(Config(), lora=LoraConfig(quantize="nf4")), 1)


def test_a_base_that_is_quantized_already_is_refused(base):
    path = base / "config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    with pytest.raises(ValueError, match="is quantized; use the unquantized model, with lora.quantize=nf4"):
        load_model_config(str(base))
    with pytest.raises(ValueError, match="is quantized"):  # eval.py, too
        lora.load(str(base), precision="fp32", device=torch.device("cpu"))


# --- a whole run ---


def test_a_whole_run_in_4_bits_resumes_bit_for_bit_and_is_evaluated_as_it_was_trained(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*DEMO, *RUN, "--lora.quantize=nf4", "--run-dir", "whole"]) == 0
    shutil.copytree("whole", "resumed")
    shutil.rmtree("resumed/checkpoints/step_4")
    assert train.main(["--resume", "resumed"]) == 0
    assert rows_without_clock(Path("resumed")) == rows_without_clock(Path("whole"))
    assert evaluation.main(["--model", "whole", "--limit", "20", "--output", "result.json"]) == 0
    found = json.loads(Path("result.json").read_text())["models"]["whole"]["0"]
    of_the_run = json.loads(Path("whole/summary.json").read_text())["results"]
    assert found == of_the_run["after"] != of_the_run["before"]
