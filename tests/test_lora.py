"""Adapters: the formula, what is trained, what is shared, PEFT's files both ways, and a whole run with them."""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import train
from grpo import config_check, lora
from grpo.batch import LAYOUTS, pack
from grpo.config import BatchConfig, Config, LoraConfig, ModelConfig, ObjectiveConfig, RolloutConfig
from grpo.dry_run import memory_estimate, model_facts
from grpo.first_batch import check_packing, make_yardstick
from grpo.logprobs import PolicyModule
from grpo.metrics import read_metrics
from grpo.policy import MovingReference, Policy, bf16_copy, load_model_config, load_reference
from grpo.rewards import Reward
from grpo.rollout import Sampler
from kernels.linear_logprob import modes
from tests.ranks import run_ranks
from tests.reward_functions import share_of_w7
from tests.test_learns import mean_rewards
from tests.test_train import DEMO, rows_without_clock
from tests.test_update import ALONE, distance, one_update, ranks_worker
from tests.tiny import adapted, made_up_groups, tiny_qwen2, use_fp64_rms_norm, word_tokenizer

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
IDS = torch.arange(2, 30)[None]
SAVED = {"tie_word_embeddings": False}, {"modules_to_save": ("lm_head", "norm"), "rslora": True}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def micro_batch(groups=None, layout="packed"):
    options = {"minibatches": 1, "passes": 1, "max_over_ranks": lambda x: x, "device": CPU, "layout": layout}
    (only,) = pack(groups or made_up_groups(2), tokens_per_micro_batch=10_000, **options).micro_batches
    return only


# --- the layer ---


def test_the_layer_by_hand():
    # W x = [5, 2]; A x = 3; B A x = [3, 6]; scale 6 / 1 = 6, with rslora and rank 4 it would be 6 / 2.
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    layer = lora.LoraLinear(linear, LoraConfig(rank=1, alpha=6), torch.Generator())
    x = torch.tensor([[1.0, 2.0]])
    assert layer(x).tolist() == [[5.0, 2.0]]
    layer.lora_A.data, layer.lora_B.data = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [2.0]])
    assert layer(x).tolist() == [[23.0, 38.0]]
    assert torch.compile(layer, backend="eager")(x).tolist() == [[23.0, 38.0]]  # which adds otherwise
    assert lora.LoraLinear(linear, LoraConfig(rank=4, alpha=6, rslora=True), torch.Generator()).scale == 3.0


def test_fresh_adapters_are_uniform_within_one_over_the_root_of_the_width_and_do_nothing():
    layer = lora.LoraLinear(nn.Linear(16, 3), LoraConfig(rank=400), torch.Generator())
    assert 0.249 < layer.lora_A.max() <= 0.25 and -0.25 <= layer.lora_A.min() < -0.249
    torch.testing.assert_close(layer.lora_A.std(), torch.tensor(0.25 / 3**0.5), rtol=0.05, atol=0)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 and not layer.lora_B.any()


def test_dropout_is_in_passes_that_form_gradients_alone_and_keeps_the_mean():
    layer = lora.LoraLinear(nn.Linear(8, 3), LoraConfig(rank=2, alpha=2, dropout=0.5), torch.Generator())
    layer.lora_A.data, layer.lora_B.data, x = torch.full((2, 8), 0.5), torch.full((3, 2), 0.5), torch.ones(8)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
        expected = layer(x)
    many = layer(x.expand(20_000, 8))  # 0.5 * (sum of 8 coins that are 0 or 2): deviation sqrt(8) / 2 = 1.41
    torch.testing.assert_close(many.std(0), torch.full((3,), 2**0.5), rtol=0.05, atol=0)
    torch.testing.assert_close(many.mean(0), expected, rtol=0, atol=0.06)  # six standard errors


def test_dropout_is_refused_but_with_padded_rows():
    config = replace(Config(), lora=LoraConfig(rank=2, dropout=0.1))
    with pytest.raises(ValueError, match=r"lora.dropout=0.1 with batch.layout=auto.*use batch.layout=padded"):
        config_check.check(config, 1)
    config_check.check(replace(config, batch=BatchConfig(layout="padded")), 1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ("query",)}, r"lora.target_modules: Qwen2ForCausalLM has no 'query'; it has .*q_proj"),
        ({"target_modules": ("proj",)}, "lora.target_modules: .* no 'proj'"),  # a name from its first letter on
        ({"target_modules": ("embed_tokens",)}, "lora.target_modules: .* no 'embed_tokens'"),
        ({"target_modules": ("lm_head",)}, "names the head lm_head; train it whole"),
        ({"modules_to_save": ("lm_head",)}, "lm_head, which this model ties to another"),
        ({"modules_to_save": ("mlp",)}, r"names model.layers.0.mlp, in which lora.target_modules has adapters"),
        ({"modules_to_save": ("q_proj",)}, r"q_proj, in which lora.target_modules has adapters"),
    ],
)
def test_modules_that_cannot_be_adapted_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        lora.add_adapters(tiny_qwen2(), LoraConfig(rank=2, **settings))


# --- in the model ---


def test_a_layer_that_is_more_than_linear_is_left_alone():
    class Other(nn.Linear):
        pass

    model = tiny_qwen2()
    model.model.layers[0].mlp.up_proj.__class__ = Other
    lora.add_adapters(model, LoraConfig(rank=2, target_modules=("up_proj",)))
    assert [type(layer.mlp.up_proj) for layer in model.model.layers] == [Other, lora.LoraLinear]


def test_what_is_trained_over_a_bf16_base_is_fp32_and_all_else_stays():
    shape, settings = SAVED
    model = adapted(bf16_copy(tiny_qwen2(**shape)), **settings)
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_base_in_a_folder_is_known_by_its_whole_path(base, monkeypatch):
    monkeypatch.chdir(base.parent)
    assert lora.load(base.name, LoraConfig(rank=2), precision="fp32", device=CPU).base == str(base.resolve())


@pytest.mark.parametrize("shape, settings", [({}, {}), SAVED], ids=["adapters", "modules_to_save"])
def test_the_gradient_is_that_of_an_explicit_w_plus_scale_b_a_and_of_nothing_else(shape, settings, monkeypatch):
    use_fp64_rms_norm(monkeypatch)
    model = adapted(tiny_qwen2(**shape), **settings).double()
    (model(IDS).logits ** 2).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(trained)
    assert {name.rpartition(".")[2] for name in trained} == {"lora_A", "lora_B"} | ({"weight"} if settings else set())

    plain, weights = tiny_qwen2(**shape).double(), {}
    explicit = {name: tensor.detach().requires_grad_() for name, tensor in trained.items()}
    for name, weight in plain.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A" in explicit:
            scale = 8 / 2 if settings else 8 / 4  # alpha / sqrt(rank), alpha / rank
            weights[name] = weight + scale * explicit[f"{layer}.lora_B"] @ explicit[f"{layer}.lora_A"]
        elif name in explicit:
            weights[name] = explicit[name]
    (torch.func.functional_call(plain, weights, IDS).logits ** 2).sum().backward()
    for name, tensor in explicit.items():
        torch.testing.assert_close(trained[name].grad, tensor.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fresh_adapters_are_the_base_and_so_stays_the_reference_which_shares_its_tensors(base, precision):
    policy = lora.load(str(base), LoraConfig(rank=2), precision=precision, device=CPU)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=policy.model.dtype)
    reference = load_reference(policy)
    assert torch.equal(logits(policy.model), logits(plain))
    with torch.no_grad():
        for parameter in policy.masters.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    policy.refresh()
    assert not torch.equal(logits(policy.model), logits(plain))
    assert torch.equal(logits(reference), logits(plain))
    for name, weight in plain.named_parameters():
        ours = [dict(model.named_parameters())[name] for model in (policy.masters, policy.model, reference)]
        assert ours[0] is ours[1] is ours[2] and ours[0].dtype == weight.dtype


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_moving_reference_follows_the_adapters_over_the_same_base(base, precision):
    policy = lora.load(str(base), LoraConfig(rank=2), precision=precision, device=CPU)
    moving = MovingReference(policy)
    with torch.no_grad():
        for parameter in policy.masters.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    policy.refresh()
    assert not torch.equal(logits(moving.model), logits(policy.model))
    moving.follow(policy, 1.0)
    assert torch.equal(logits(moving.model), logits(policy.model))
    assert moving.model.model.embed_tokens.weight is policy.model.model.embed_tokens.weight
    assert all(name.endswith(("lora_A", "lora_B")) for name in moving.state_dict()["masters"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_dry_run_knows_the_bytes_of_base_masters_working_copy_and_reference(base, precision):
    model = ModelConfig(path=str(base), precision=precision)
    config = replace(Config(), model=model, lora=LoraConfig(rank=2), objective=ObjectiveConfig(beta=0.1))
    config = replace(config, batch=BatchConfig(tokens_per_micro_batch=64))
    estimate = memory_estimate(config, 1, model_facts(config, CPU))
    expected = sum(estimate.get(name, 0) for name in ("fp32 masters", "frozen base", "working copy, bf16"))
    policy = lora.load(str(base), config.lora, precision=precision, device=CPU)
    parts = policy.masters, policy.model, load_reference(policy)
    own = {parameter for part in parts for parameter in part.parameters()}
    assert sum(parameter.nbytes for parameter in own) == expected + estimate["frozen reference"]


def test_in_bf16_adapters_have_fp32_masters_and_gradients_and_a_working_copy_that_follows_in_place():
    policy = Policy(adapted(bf16_copy(tiny_qwen2())), word_tokenizer(), "bf16")
    working = dict(policy.model.named_parameters())
    addresses = {name: parameter.data_ptr() for name, parameter in working.items()}
    PolicyModule(policy, temperature=1.0, impl="torch")(micro_batch())[0].sum().backward()
    with torch.no_grad():
        for name, master in policy.masters.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                assert master.dtype == master.grad.dtype == torch.float32 and master.grad.norm() > 0
                master.add_(master.grad)
            else:
                assert master.grad is None and master is working[name]
    policy.refresh()
    for name, master in policy.masters.named_parameters():
        assert working[name].data_ptr() == addresses[name] and working[name].grad is None
        assert torch.equal(working[name], master.bfloat16())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_no_gradient_of_an_adapter(precision):
    def gradients(checkpointing):
        model = tiny_qwen2() if precision == "fp32" else bf16_copy(tiny_qwen2())
        policy = Policy(adapted(model).train(), word_tokenizer(), precision)
        module = PolicyModule(policy, temperature=1.0, impl="torch", checkpointing=checkpointing)
        module(micro_batch())[0].sum().backward()
        return [parameter.grad for parameter in module.parameters() if parameter.requires_grad]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert plain.norm() > 0 and torch.equal(plain, checkpointed)


def test_packed_and_padded_rows_give_adapters_one_gradient(monkeypatch):
    use_fp64_rms_norm(monkeypatch)
    updates = [
        one_update(ALONE, torch.float64, "grpo", 40, layout=layout, adapt=adapted)[0] for layout in sorted(LAYOUTS)
    ]
    assert all(name.endswith(("lora_A", "lora_B")) for name in updates[0])
    assert distance(*updates) < 1e-10


def bf16_gradients(wrap, *seeds, adapt=adapted):
    """Of the adapters of a bf16 model, summed over micro-batches."""
    policy = Policy(adapt(bf16_copy(tiny_qwen2())), word_tokenizer(), "bf16")
    module = wrap(PolicyModule(policy, temperature=1.0, impl="torch"))
    for seed in seeds:
        module(micro_batch(made_up_groups(2, seed=seed)))[0].sum().backward()
    trained = {name: parameter for name, parameter in policy.masters.named_parameters() if parameter.requires_grad}
    return {name: parameter.grad.numpy() for name, parameter in trained.items()}


def on_two_ranks(world):
    reduced = bf16_gradients(lambda module: DistributedDataParallel(module, broadcast_buffers=False), world.rank)
    alone = bf16_gradients(lambda module: module, 0, 1)  # before the patch that keeps RMSNorm in fp64
    return reduced, alone, *ranks_worker(world, torch.float64, "grpo", 40, 2, 2, "packed", adapted)[0]


def test_two_ranks_train_adapters_like_one_and_reduce_in_fp32_over_a_bf16_base(monkeypatch):
    use_fp64_rms_norm(monkeypatch)
    expected_gradients, expected_weights, _ = one_update(ALONE, torch.float64, "grpo", 40, 2, 2, "packed", adapted)
    as_tensors = lambda arrays: {name: torch.from_numpy(array) for name, array in arrays.items()}
    for reduced, alone, gradients, weights in run_ranks(2, on_two_ranks):
        assert distance(as_tensors(gradients), expected_gradients) < 1e-10
        assert distance(as_tensors(weights), expected_weights) < 1e-10
        summed = {name: 2 * mean for name, mean in reduced.items()}
        assert distance(as_tensors(summed), as_tensors(alone)) < 1e-6


def test_the_frozen_head_gets_no_gradient_and_its_log_probs_the_cheap_mode(monkeypatch):
    fold, needs = modes._fold, []
    monkeypatch.setattr(modes, "_fold", lambda *arguments: needs.append(arguments[-1]) or fold(*arguments))
    module = PolicyModule(Policy(adapted(tiny_qwen2()), word_tokenizer(), "fp32"), temperature=1.0, impl="torch")
    logprobs, _ = module(micro_batch())
    assert type(logprobs.grad_fn).__name__ == "_FrozenHeadBackward"
    module(micro_batch(), lambda logprobs, entropy, rows: -logprobs)
    assert needs == [(True, False, False)] * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_packing_check_knows_the_truth_of_an_adapted_model(precision):
    model = adapted(tiny_qwen2() if precision == "fp32" else bf16_copy(tiny_qwen2()))
    module = PolicyModule(Policy(model, word_tokenizer(), precision), temperature=1.0, impl="torch")
    mean, _ = check_packing(module, make_yardstick(module, made_up_groups(1), CPU))
    assert mean < 1e-5 if precision == "fp32" else 1e-5 < mean < 0.1  # of bf16 against fp32, not against itself


def test_the_sampler_draws_from_the_adapted_model():
    policy = Policy(adapted(tiny_qwen2()), word_tokenizer(), "fp32")
    rollout = RolloutConfig(group_size=4, max_new_tokens=12, max_sequences=64, prefill_tokens=512)
    sampler = Sampler(policy.model, policy.tokenizer, rollout, stop=(), seed=0)
    groups = sampler.generate([group.problem for group in made_up_groups(3)], step=1)
    rows = micro_batch(groups, "padded")
    found = PolicyModule(policy, temperature=1.0, impl="torch")(rows)[0]
    torch.testing.assert_close(rows.tokens.sampler, found.detach(), rtol=0, atol=1e-5)


def test_reward_rises_with_adapters_alone():
    model = tiny_qwen2(initializer_range=0.15)  # of weights that are nearly 0, adapters could make nothing
    lora.add_adapters(model, LoraConfig(rank=8, alpha=16))
    means, _ = mean_rewards({"share": Reward(share_of_w7, 1.0)}, model=model)
    assert sum(means[:3]) / 3 < 0.06 and sum(means[-3:]) / 3 > 0.5


# --- files ---


@pytest.mark.parametrize("shape, settings", [({}, {}), SAVED], ids=["adapters", "modules_to_save"])
def test_merged_equals_adapted(shape, settings):
    model = adapted(tiny_qwen2(**shape), **settings)
    expected = logits(model)
    lora.merge(model)
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in tiny_qwen2(**shape).named_parameters()
    }
    assert not any(isinstance(module, lora.LoraLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(tiny_qwen2(**shape)), expected, atol=0.1)


def peft_or_skip():
    return pytest.importorskip("peft", reason="peft is not installed: pip install -c constraints.txt -e .[dev]")


@pytest.mark.parametrize("shape, settings", [({}, {}), SAVED], ids=["adapters", "modules_to_save"])
def test_peft_opens_our_files_with_equal_logits(shape, settings, tmp_path):
    peft = peft_or_skip()
    settings = LoraConfig(rank=4, alpha=8.0, **settings)
    model = adapted(tiny_qwen2(**shape), **{name: getattr(settings, name) for name in ("modules_to_save", "rslora")})
    if settings.modules_to_save:
        model.lm_head.weight.data.add_(0.3)
    policy = lora.AdaptedPolicy(model, word_tokenizer(), "fp32", settings=settings, base="somewhere")
    policy.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_qwen2(**shape), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(tiny_qwen2(**shape)), logits(model), atol=0.1)


@pytest.mark.parametrize("shape, settings", [({}, {}), SAVED], ids=["adapters", "modules_to_save"])
def test_we_open_the_files_of_peft_with_equal_logits(shape, settings, tmp_path):
    peft = peft_or_skip()
    base = tmp_path / "base"
    tiny_qwen2(**shape).save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    renamed = {
        "use_rslora": settings.get("rslora", False),
        "modules_to_save": list(settings.get("modules_to_save", ())),
    }
    targets = ["q_proj", "v_proj", "self_attn.o_proj", "down_proj"]
    wanted = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **renamed)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), wanted)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = lora.load(str(tmp_path / "adapter"), precision="fp32", device=CPU)
    torch.testing.assert_close(logits(ours.model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base)), logits(ours.model), atol=0.01)


def saved(base, **changes):
    """A folder of adapters on `base`, with changes to its config."""
    folder = base.parent / "adapter"
    folder.mkdir()
    lora.load(str(base), LoraConfig(rank=2), precision="fp32", device=CPU).save(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "asks for {'use_dora': True}, which is not supported here"),
        ({"bias": "all"}, "asks for {'bias': 'all'}"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"target_modules": ".*_proj"}, "asks for {'target_modules': '.*_proj'}"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path=None is not a model; correct it there"),
        ({"base_model_name_or_path": "/nowhere"}, "base_model_name_or_path='/nowhere' is not a model"),
        ({"r": 3}, r"does not fit its config and base; first differences: .*lora_A.weight"),
    ],
)
def test_an_adapter_that_we_cannot_open_is_refused_with_the_reason(base, changes, message):
    folder = saved(base, **changes)
    with pytest.raises(ValueError, match=message):
        lora.load(str(folder), precision="fp32", device=CPU)


def test_an_adapter_may_lack_what_peft_may_leave_out_have_its_own_tokenizer_and_is_merged_in_its_bases_dtype(base):
    """modules_to_save is null in PEFT's files, and a file of safetensors need not say what wrote it."""
    tiny_qwen2().bfloat16().save_pretrained(base)
    folder = saved(base, modules_to_save=None)
    save_file(load_file(folder / lora.WEIGHTS), folder / lora.WEIGHTS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "its own"
    tokenizer.save_pretrained(folder)
    load = lambda: lora.load(str(folder), precision="fp32", device=CPU)
    assert load().settings == LoraConfig(rank=2) and load().tokenizer.chat_template == "its own"
    (folder / "tokenizer_config.json").unlink()
    assert load().tokenizer.chat_template is None
    out = base.parent / "out"
    out.mkdir()  # a folder that is there may be filled where it is empty
    lora.write_merged(str(folder), str(out))
    assert load_model_config(str(out)).dtype == torch.bfloat16, "as the base has it"
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(merged), logits(load().model)), "B is 0"


def test_what_is_saved_is_the_state_that_was_copied_not_what_the_adapters_are_by_then(base, tmp_path):
    policy = lora.load(str(base), LoraConfig(rank=2), precision="fp32", device=CPU)
    state = copy.deepcopy(policy.state_dict())
    with torch.no_grad():
        for parameter in policy.trained:
            parameter.add_(1.0)
    policy.save(tmp_path, state)
    found = load_file(tmp_path / lora.WEIGHTS)["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    assert torch.equal(found, state["masters"]["model.layers.0.mlp.up_proj.lora_A"])


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_equal_adapters_are_equal_files(quantize, tmp_path):
    """safetensors writes metadata in random order, and for nf4 there are two entries: the chance that 20 files are
    equal is 1 in 500,000."""
    settings, files = LoraConfig(rank=2, quantize=quantize), set()
    policy = lora.AdaptedPolicy(adapted(tiny_qwen2()), word_tokenizer(), "fp32", settings=settings, base="somewhere")
    for _ in range(20):
        policy.save(tmp_path)
        files.add((tmp_path / lora.WEIGHTS).read_bytes())
    assert len(files) == 1 and lora.read_config(tmp_path)[0].quantize == quantize
    found = load_file(tmp_path / lora.WEIGHTS)
    assert all(torch.equal(found[lora._peft_name(name)], own) for name, own in policy.state_dict()["masters"].items())


def test_an_adapter_is_no_base_to_train(base):
    with pytest.raises(ValueError, match="holds an adapter; first: python -m grpo.lora merge"):
        load_model_config(str(saved(base)))


def test_merging_what_has_no_adapters_or_into_a_full_folder_is_refused(base, capsys):
    assert lora.main(["merge", str(base), str(base.parent / "out")]) == 2
    assert f"nothing to merge: it is a whole model already; load {base}" in capsys.readouterr().err
    assert lora.main(["merge", str(base.parent), str(base.parent / "out")]) == 2
    assert "has no adapter_config.json: nothing to merge" in capsys.readouterr().err
    assert lora.main(["merge", "runs/none", "out"]) == 2
    assert "there is no folder runs/none; name a run" in capsys.readouterr().err
    assert lora.main(["merge", str(saved(base)), str(base)]) == 2
    assert "is not empty; name another folder" in capsys.readouterr().err


def test_adapters_depend_on_the_seed_alone(base):
    draw = lambda seed: lora.load(str(base), LoraConfig(rank=2), precision="fp32", device=CPU, seed=seed)
    first, again, other = (draw(seed).state_dict()["masters"] for seed in (0, 0, 1))
    name = "model.layers.0.mlp.up_proj.lora_A"
    assert all(torch.equal(first[name], again[name]) for name in first) and not torch.equal(first[name], other[name])


# --- a whole run ---

LENGTH = f"--rewards.functions={ROOT / 'tests' / 'reward_functions.py'}:length_of"  # which even this base can vary
RUN = ["--lora.rank=4", "--optim.lr=1e-2", "--rewards.no-require-finish", LENGTH]


DROPOUT = ["--lora.dropout=0.2", "--batch.layout=padded"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole small run on the embedded base, in a working directory of its own."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("lora"))
    assert train.main([*DEMO, *RUN, "--run-dir", "whole"]) == 0
    yield Path("whole").resolve()
    os.chdir(before)


def test_a_checkpoint_holds_the_adapters_the_tokenizer_and_the_state(finished):
    folder = finished / "checkpoints" / "step_4"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "state"} <= names
    assert [path.name for path in folder.rglob("*.safetensors")] == ["adapter_model.safetensors"]
    assert "config.json" not in names
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 16.0, "LORA")
    assert (Path(config["base_model_name_or_path"]) / "base.json").is_file()
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 2 * 7 * 2  # A and B of seven projections in two layers
    masters = torch.load(folder / "state" / "state.pt", weights_only=True)["policy"]["masters"]
    assert all(name.endswith(("lora_A", "lora_B")) for name in masters)
    assert all(row["grad_norm"] > 0 for row in read_metrics(finished))


@pytest.mark.parametrize("options", [[], DROPOUT], ids=["packed", "dropout"])
def test_a_resumed_run_repeats_the_lost_steps_bit_for_bit(finished, options):
    if options:
        assert train.main([*DEMO, *RUN, *options, "--run-dir", "dropout"]) == 0
        without, finished = rows_without_clock(finished), Path("dropout")
        assert without[0]["reward"] == rows_without_clock(finished)[0]["reward"]
        assert without[-1]["reward"] != rows_without_clock(finished)[-1]["reward"]
    shutil.rmtree("resumed", ignore_errors=True)
    shutil.copytree(finished, "resumed")
    shutil.rmtree("resumed/checkpoints/step_4")
    assert train.main(["--resume", "resumed"]) == 0
    assert rows_without_clock(Path("resumed")) == rows_without_clock(finished)
    ours, theirs = (
        (run / "checkpoints" / "step_4" / "adapter_model.safetensors").read_bytes()
        for run in (Path("resumed"), finished)
    )
    assert ours == theirs


def test_eval_gives_the_run_the_checkpoint_and_the_merged_model_one_accuracy(finished):
    checkpoint = json.loads((finished / "checkpoints" / "best.json").read_text())
    assert lora.main(["merge", str(finished), "merged"]) == 0
    models = [str(finished), str(finished / "checkpoints" / f"step_{checkpoint['step']}"), "merged"]
    named = [argument for model in models for argument in ("--model", model)]
    assert evaluation.main([*named, "--limit", "20", "--output", "result.json"]) == 0
    results = json.loads(Path("result.json").read_text())["models"]
    assert results[models[0]] == results[models[1]] == results["merged"]
    of_the_run = json.loads((finished / "summary.json").read_text())["results"]
    assert results["merged"]["0"] == of_the_run["after"] != of_the_run["before"]
