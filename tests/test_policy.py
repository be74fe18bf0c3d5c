"""Two precisions of one policy: fp32 masters, one bf16 working copy at fixed addresses."""

from __future__ import annotations

import json

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo import layers, lora
from grpo.batch import LAYOUTS, pack, padded_rows, weigh
from grpo.config import LoraConfig, OptimConfig
from grpo.distributed import World
from grpo.logprobs import LogprobModel, PolicyModule, frozen_logprobs
from grpo.objectives import resolve
from grpo.policy import MovingReference, Policy, choose_precision, load_policy, load_reference, refuse_unsupported
from grpo.update import Updater, make_optimizer, update_policy
from tests.rollout_helpers import byte_tokenizer, tiny_model
from tests.tiny import made_up_groups, tiny_qwen2, word_tokenizer

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def train_three_steps(precision: str) -> tuple[Policy, float]:
    """Three optimizer steps; returns the policy and how far its masters moved."""
    policy = Policy(tiny_qwen2(initializer_range=0.05), word_tokenizer(), precision)
    module = PolicyModule(policy, temperature=1.0, impl="torch")
    start = torch.cat([parameter.detach().flatten().clone() for parameter in policy.masters.parameters()])
    optimizer = make_optimizer(list(module.parameters()), OptimConfig(lr=1e-3))
    updater = Updater(module, optimizer, resolve("dr_grpo"), ALONE, 1.0, policy.refresh)
    advantages = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        batch = pack(
            made_up_groups(4),
            minibatches=1,
            passes=1,
            tokens_per_micro_batch=64,
            max_over_ranks=ALONE.max,
            device=ALONE.device,
        )
        weigh(
            batch,
            advantages,
            torch.ones(4, 4, dtype=torch.bool),
            aggregation="constant",
            max_new_tokens=12,
            sum_over_ranks=ALONE.sum,
        )
        update_policy(updater, batch, step=step, lr=1e-3)
    end = torch.cat([parameter.detach().flatten() for parameter in policy.masters.parameters()])
    return policy, (end - start).norm().item()


def test_in_bf16_the_fp32_masters_move_as_far_as_in_fp32():
    _, distance_fp32 = train_three_steps("fp32")
    policy, distance_bf16 = train_three_steps("bf16")
    assert distance_bf16 == pytest.approx(distance_fp32, rel=0.1)
    pairs = zip(policy.model.parameters(), policy.masters.parameters(), strict=True)
    assert all(torch.equal(working, master.bfloat16()) for working, master in pairs), "what samples has moved too"
    assert all(parameter.dtype == torch.float32 for parameter in policy.masters.parameters())
    assert all(parameter.grad.dtype == torch.float32 for parameter in policy.masters.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradient_checkpointing_changes_no_gradient(precision, tied):
    def gradients(checkpointing):
        policy = Policy(tiny_qwen2(tie_word_embeddings=tied), word_tokenizer(), precision)
        policy.model.train()
        module = PolicyModule(policy, temperature=1.0, impl="torch", checkpointing=checkpointing)
        batch = pack(
            made_up_groups(2),
            minibatches=1,
            passes=1,
            tokens_per_micro_batch=10_000,
            max_over_ranks=ALONE.max,
            device=ALONE.device,
        )
        module(batch.micro_batches[0])[0].sum().backward()
        return [parameter.grad for parameter in module.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert plain.norm() > 0 and torch.equal(plain, checkpointed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_layers_change_no_log_prob_and_no_gradient_and_rollout_does_not_see_them(layout, monkeypatch):
    monkeypatch.setattr(layers, "BACKEND", "eager")  # traces as inductor does, and compiles nothing for a minute
    compiled_calls = torch._dynamo.utils.counters["stats"]

    def values(compile):
        policy = Policy(tiny_qwen2(), word_tokenizer(), "bf16")
        module = PolicyModule(policy, temperature=1.0, impl="torch", compile=compile)
        found, graphs = [], []
        for groups in (made_up_groups(2), made_up_groups(3, seed=1)):  # another number of them, and another length
            options = {"minibatches": 1, "passes": 1, "tokens_per_micro_batch": 10_000, "layout": layout}
            batch = pack(groups, **options, max_over_ranks=ALONE.max, device=ALONE.device)
            output = module(batch.micro_batches[0])[0]
            output.sum().backward()
            found.append(output.detach())
            graphs.append(compiled_calls["unique_graphs"])
        reference = LogprobModel(load_reference(policy), temperature=1.0, impl="torch", compile=compile)
        for model in (module, reference):
            with torch.no_grad():
                found.append(model(batch.micro_batches[0])[0])
            graphs.append(compiled_calls["unique_graphs"])
        assert graphs[0] == graphs[1] and graphs[3] - graphs[2] <= 1  # a reference has its own that asks if it trains
        assert not any("forward" in vars(layer) for layer in policy.model.base_model.layers)
        return [*found, *(parameter.grad for parameter in module.parameters())]

    plain, before = values(False), compiled_calls["unique_graphs"]
    for ours, theirs in zip(values(True), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert compiled_calls["unique_graphs"] > before


def test_layers_that_a_family_names_otherwise_are_compiled_and_computed_in_fp32(monkeypatch):
    monkeypatch.setattr(layers, "BACKEND", "eager")
    graphs, options = torch._dynamo.utils.counters["stats"], {"temperature": 1.0, "impl": "torch"}
    policy = Policy(tiny_model("gpt2"), byte_tokenizer(), "bf16")
    rows = padded_rows(made_up_groups(1), [(0, 0), (0, 1), (0, 2)], ALONE.device)
    with torch.no_grad(), layers.in_fp32(policy.model):
        truth = LogprobModel(policy.model, **options)(rows)[0]
    plain, before = PolicyModule(policy, **options)(rows)[0], graphs["unique_graphs"]
    assert not torch.equal(plain, truth) and torch.allclose(plain, truth, atol=0.1)
    assert torch.equal(PolicyModule(policy, **options, compile=True)(rows)[0], plain)
    assert graphs["unique_graphs"] > before


def test_a_model_gets_its_own_weights_and_layers_back_also_after_an_error():
    model = tiny_qwen2()
    layer, weight = model.model.layers[0], model.lm_head.weight
    other, forward = {"model.embed_tokens.weight": weight.detach().clone()}, lambda hidden: hidden
    with pytest.raises(RuntimeError), layers.using_weights(model, other), layers.using_forwards({layer: forward}):
        assert model.lm_head.weight is model.model.embed_tokens.weight is not weight  # tied, as before
        assert layer.forward is forward
        raise RuntimeError
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight and "forward" not in vars(layer)


def test_a_layer_whose_backward_pass_cannot_be_compiled_is_run_as_it_is_and_it_is_said(monkeypatch, caplog):
    class Layer(GradientCheckpointingLayer):
        def forward(self, hidden):
            return (hidden * self.weight).tanh()

    as_it_is = lambda graph, inputs: make_boxed_func(graph.forward)
    monkeypatch.setattr(layers, "BACKEND", aot_autograd(fw_compiler=as_it_is, bw_compiler=lambda graph, inputs: 1 / 0))
    layer, hidden = Layer(), torch.arange(6.0).view(2, 3)
    layer.weight = torch.nn.Parameter(torch.full((3,), 0.1))
    with layers.using_forwards(layers.compiled_layers(torch.nn.Sequential(layer))):
        output = layer(hidden)
    output.sum().backward()
    torch.testing.assert_close(layer.weight.grad, (hidden * (1 - output**2)).sum(0))
    assert "ZeroDivisionError" in caplog.text


def test_the_working_copy_follows_the_masters_at_the_same_addresses():
    policy = Policy(tiny_qwen2(), word_tokenizer(), "bf16")
    addresses = [parameter.data_ptr() for parameter in policy.model.parameters()]
    with torch.no_grad():
        for parameter in policy.masters.parameters():
            parameter.add_(0.5)
    policy.refresh()
    assert addresses == [parameter.data_ptr() for parameter in policy.model.parameters()]
    for working, master in zip(policy.model.parameters(), policy.masters.parameters(), strict=True):
        assert working.dtype == torch.bfloat16 and torch.equal(working, master.to(torch.bfloat16))


def test_the_bf16_copy_keeps_its_rotary_frequencies_in_fp32():
    policy = Policy(tiny_qwen2(), word_tokenizer(), "bf16")
    assert torch.equal(policy.model.model.rotary_emb.inv_freq, policy.masters.model.rotary_emb.inv_freq)


def test_in_fp32_the_working_copy_is_the_masters():
    policy = Policy(tiny_qwen2(), word_tokenizer(), "fp32")
    assert policy.model is policy.masters


def test_auto_precision_is_bf16_on_cuda_and_fp32_elsewhere_and_what_is_asked_for_stays():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (choose_precision("auto", cuda), choose_precision("auto", cpu)) == ("bf16", "fp32")
    assert (choose_precision("fp32", cuda), choose_precision("bf16", cpu)) == ("fp32", "bf16")


def test_saved_in_hugging_face_layout_and_state_restores_masters_bit_for_bit(tmp_path):
    policy = Policy(tiny_qwen2(), word_tokenizer(), "bf16")
    policy.save(tmp_path)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reopened.model.embed_tokens.weight, policy.model.model.embed_tokens.weight.to(reopened.dtype))
    other = load_policy(str(tmp_path), precision="bf16", device=torch.device("cpu"))
    other.load_state_dict(policy.state_dict())
    for a, b in zip(other.masters.parameters(), policy.masters.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("settings", [None, LoraConfig(rank=2)])
def test_the_tokenizer_is_saved_as_it_was_loaded_without_padding_too(tmp_path, settings):
    """Who trains on with padding equal to the end of sequence masks the ends away."""
    tiny_model("llama3 rope").save_pretrained(tmp_path / "base")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    policy = lora.load(str(tmp_path / "base"), settings, precision="fp32", device=torch.device("cpu"))
    (tmp_path / "saved").mkdir()
    policy.save(tmp_path / "saved")
    reopened = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (reopened.pad_token, reopened.eos_token) == (None, "<eos>")


@pytest.mark.parametrize("asked", [{"do_sample": True, "temperature": 0.6}, {"do_sample": False, "temperature": 0.6}])
def test_sampling_settings_are_saved_again_unless_transformers_would_refuse_to_write_them(tmp_path, asked):
    """It reads a temperature without do_sample; what it refuses would fail at the first checkpoint."""
    tiny_qwen2().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4], **asked}))
    word_tokenizer().save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), precision="fp32", device=torch.device("cpu"))
    assert policy.model.generation_config.eos_token_id == [1, 4]
    policy.model.generation_config.eos_token_id = [1, 4, 5]  # as a run does
    policy.model.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.eos_token_id, saved.temperature) == ([1, 4, 5], 0.6 if asked["do_sample"] else None)


def test_the_reference_stays_where_the_policy_was():
    policy = Policy(tiny_qwen2(), word_tokenizer(), "fp32")
    reference = load_reference(policy)
    before = reference.model.embed_tokens.weight.clone()
    with torch.no_grad():
        policy.masters.model.embed_tokens.weight.add_(1.0)
    assert torch.equal(reference.model.embed_tokens.weight, before)
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def all_set_to(value, policy):
    with torch.no_grad():
        for parameter in policy.masters.parameters():
            parameter.fill_(value)
    policy.refresh()


def test_a_moving_reference_is_as_precise_as_its_policy_where_that_samples_from_a_copy():
    policy = Policy(tiny_qwen2(), word_tokenizer(), "fp32")
    policy.sample_from_copy()  # under FSDP
    assert MovingReference(policy).model.dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_moving_reference_copies_or_averages_and_never_moves_the_policy(precision):
    policy = Policy(tiny_qwen2(), word_tokenizer(), precision)
    all_set_to(1.0, policy)
    reference = MovingReference(policy)
    all_set_to(3.0, policy)
    values = lambda model: {value for parameter in model.parameters() for value in parameter.unique().tolist()}
    assert values(reference.model) == {1.0}
    for expected in (1.5, 1.875):  # a quarter of the way: 1 + 2/4, then 1.5 + 1.5/4
        reference.follow(policy, 0.25)
        assert values(reference.model) == {expected} and values(policy.model) == {3.0}
    all_set_to(0.1, policy)  # no float has this value: a copy must not round it
    reference.follow(policy, 1.0)
    assert values(reference.masters) == values(policy.masters) and values(reference.model) == values(policy.model)
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())


def test_moves_below_the_precision_of_bf16_add_up():
    policy = Policy(tiny_qwen2(), word_tokenizer(), "bf16")
    all_set_to(1.0, policy)
    reference = MovingReference(policy)
    all_set_to(2.0, policy)
    for _ in range(10):  # 1/512 is half of what bf16 can add to 1
        reference.follow(policy, 1 / 512)
    assert reference.model.model.norm.weight[0].item() == 1.015625  # 2 - (511/512)^10 = 1.0194, in steps of 1/128
    again = MovingReference(policy)
    again.load_state_dict(reference.state_dict())
    assert torch.equal(again.masters.model.norm.weight, reference.masters.model.norm.weight)


def test_a_checkpoint_of_another_size_is_refused_by_name_and_shape():
    policy = Policy(tiny_qwen2(), word_tokenizer(), "fp32")
    with pytest.raises(ValueError, match=r"does not fit this model.*model\.embed_tokens\.weight"):
        policy.load_state_dict(Policy(tiny_qwen2(vocab_size=70), word_tokenizer(), "fp32").state_dict())


def test_dropout_is_refused_with_its_name_and_value():
    with pytest.raises(ValueError, match="'attention_dropout': 0.1"):
        refuse_unsupported(tiny_qwen2(attention_dropout=0.1))


def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked_about_it(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "their_own", "auto_map": names}))
    with pytest.raises(ValueError, match=r"could not load model .* contains custom code"):
        load_policy(str(tmp_path), precision="fp32", device=torch.device("cpu"))


def test_weights_that_git_has_not_fetched_are_an_error_in_words(tmp_path):
    tiny_qwen2().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")
    with pytest.raises(ValueError, match="could not load model .*header"):
        load_policy(str(tmp_path), precision="fp32", device=torch.device("cpu"))


def test_dropout_of_a_head_that_classifies_is_none_of_ours():
    """Pythia's config.json has classifier_dropout 0.1."""
    refuse_unsupported(tiny_qwen2(classifier_dropout=0.1, summary_first_dropout=0.1))


def test_a_model_for_images_and_text_is_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3", text_config={**sizes, "vocab_size": 61}, vision_config=sizes)
    with pytest.raises(
        ValueError, match="Gemma3ForConditionalGeneration is multimodal; only text models are supported"
    ):
        refuse_unsupported(AutoModelForCausalLM.from_config(config))


def test_a_missing_folder_or_unreachable_hub_says_how_to_pass_a_folder(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is not a folder; pass a folder"):
        load_policy(str(tmp_path / "nowhere"), precision="fp32", device=torch.device("cpu"))
    with pytest.raises(ValueError, match="no such model or cannot be reached; pass a folder that holds it .We"):
        load_policy("nobody/no-such-model", precision="fp32", device=torch.device("cpu"))
    tiny_qwen2().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"could not load model '.*': Error no file named model.safetensors.*\.$"):
        load_policy(str(tmp_path), precision="fp32", device=torch.device("cpu"))


@pytest.mark.parametrize(
    "saved, config, message",
    [
        (
            {"tie_word_embeddings": True},
            {"tie_word_embeddings": False},
            r"lack 1 of .* another shape: \['lm_head.weight'\];",
        ),
        ({}, {"vocab_size": 70}, r"lack 1 of .* another shape: \['model.embed_tokens.weight'\];"),
        ({}, {"num_hidden_layers": 3}, r"lack 12 of .* shape: \['model.layers.2"),
    ],
)
@pytest.mark.parametrize("settings", [None, LoraConfig(rank=2)])
def test_weights_that_the_files_lack_are_not_drawn_at_random(tmp_path, settings, saved, config, message):
    tiny_qwen2(**saved).save_pretrained(tmp_path)
    tiny_qwen2(**{**saved, **config}).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        lora.load(str(tmp_path), settings, precision="fp32", device=torch.device("cpu"))


def test_weights_under_other_names_are_named(tmp_path):
    model = tiny_qwen2()
    model.save_pretrained(tmp_path, state_dict={f"_orig_mod.{key}": value for key, value in model.state_dict().items()})
    with pytest.raises(ValueError, match=r"lack 27 of .* have instead \['_orig_mod.*\]; fix config.json or save"):
        load_policy(str(tmp_path), precision="fp32", device=torch.device("cpu"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_reference_on_the_cpu_gives_the_same_log_probs_and_waits_where_it_was(precision):
    """On a CPU `weights_loaded` copies too, so all but the other device is seen."""
    policy = Policy(tiny_qwen2(), word_tokenizer(), precision)
    reference = LogprobModel(load_reference(policy), temperature=1.0, impl="torch")
    module = PolicyModule(policy, temperature=1.0, impl="torch")

    def logprobs():
        layout = {"minibatches": 1, "passes": 1, "tokens_per_micro_batch": 60, "device": ALONE.device}
        batch = pack(made_up_groups(3), **layout, max_over_ranks=ALONE.max)
        frozen_logprobs(batch, module, reference)
        return torch.cat([micro_batch.tokens.ref for micro_batch in batch.micro_batches])

    expected = logprobs()
    reference.keep_on_cpu()
    waiting = [parameter.data_ptr() for parameter in reference.parameters()]
    with reference.weights_loaded(ALONE.device):
        assert not set(waiting) & {parameter.data_ptr() for parameter in reference.parameters()}
    assert torch.equal(logprobs(), expected)
    assert waiting == [parameter.data_ptr() for parameter in reference.parameters()]


def test_capped_attention_scores_are_refused_where_the_attention_leaves_the_cap_out():
    model = tiny_qwen2()
    model.config.attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match="caps its attention scores, which SDPA leaves out"):
        Policy(model, None, "fp32")
    model.set_attn_implementation("eager")
    Policy(model, None, "fp32")
