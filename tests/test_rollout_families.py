"""Every family, unmodified: greedy equals `generate`, log-probs equal a plain forward pass."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.first_batch import check_sampler, make_yardstick
from grpo.logprobs import PolicyModule
from grpo.policy import Policy
from grpo.rollout import attention, loop
from tests.rollout_helpers import FAMILIES, PAD, problems, sampler, tiny_model
from tests.tiny import adapted

CAUSAL = attention._causal
LENGTHS = (17, 30, 1, 5)  # ragged, across the sliding windows, and a prompt with nothing to prefill


def greedy(model, problem, new_tokens):
    prompt = torch.tensor([problem.prompt_ids])
    output = model.generate(prompt, do_sample=False, max_new_tokens=new_tokens, pad_token_id=PAD)
    return output[0, prompt.shape[1] :].tolist()


@torch.no_grad()
def teacher_forced(model, problem, completion, temperature):
    """Log-prob of each sampled id by one plain forward pass over prompt and completion."""
    ids = torch.tensor([[*problem.prompt_ids, *completion.ids]])
    logits = model(input_ids=ids).logits[0, len(problem.prompt_ids) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]


def assert_greedy_equals_generate(model, common=0):
    """common: tokens that all prompts begin with."""
    beginning = problems(common, first_index=50)[0].prompt_ids
    made = [replace(problem, prompt_ids=beginning + problem.prompt_ids) for problem in problems(*LENGTHS)]
    groups = sampler(model, group_size=2, max_new_tokens=20, temperature=0.0).generate(made, step=0)
    for problem, group in zip(made, groups, strict=True):
        expected = greedy(model, problem, 20)
        assert [completion.ids for completion in group.completions] == [expected, expected]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_on_ragged_prompts(family):
    assert_greedy_equals_generate(tiny_model(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_on_prompts_whose_beginning_is_read_once(family, monkeypatch):
    lengths, read = [], loop.RolloutLoop._read_prompts

    def noted(self, texts, groups, *, start):
        lengths.append((start, *map(len, texts)))
        read(self, texts, groups, start=start)

    monkeypatch.setattr(loop.RolloutLoop, "_read_prompts", noted)
    assert_greedy_equals_generate(tiny_model(family), common=40)
    assert lengths == [(0, 40), (40, 0, 4, 16), (40, 29)]  # all prompts but their last tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_log_probs_are_those_of_a_plain_forward_pass(family):
    model, made, temperature = tiny_model(family), problems(*LENGTHS), 1.3
    for problem, group in zip(made, sampler(model, temperature=temperature).generate(made, step=0), strict=True):
        assert len({tuple(completion.ids) for completion in group.completions}) == 3  # they are samples
        for completion in group.completions:
            expected = teacher_forced(model, problem, completion, temperature)
            assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-4


def test_a_model_with_adapters_samples_as_it_generates():
    plain = greedy(tiny_model("qwen2"), problems(17)[0], 20)
    model = adapted(tiny_model("qwen2"))
    assert greedy(model, problems(17)[0], 20) != plain
    assert_greedy_equals_generate(model)


def test_bf16_samples_and_its_log_probs_are_near_a_plain_bf16_forward_pass():
    model, made = tiny_model("qwen2").to(torch.bfloat16), problems(*LENGTHS)
    for problem, group in zip(made, sampler(model).generate(made, step=0), strict=True):
        for completion in group.completions:
            difference = torch.tensor(completion.logprobs) - teacher_forced(model, problem, completion, 1.0)
            assert difference.abs().mean() < 0.1  # measured 0.06 for an untrained model of this kind


@pytest.mark.parametrize(
    "family, overrides, message",
    [
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type dynamic"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_by_name(family, overrides, message):
    model = tiny_model(family)
    for name, value in overrides.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=f"Qwen2ForCausalLM.*{message}"):
        sampler(model)


def test_a_model_with_a_layer_that_has_no_attention_is_refused():
    model = tiny_model("qwen2")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **others: (hidden_states, None)
    with pytest.raises(ValueError, match="only 1 of 2 layers of Qwen2ForCausalLM use attention that rollout can"):
        sampler(model).generate(problems(3), step=0)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


@pytest.mark.parametrize(
    "family, settings, message",
    [
        ("stablelm", {}, r"StableLmAttention does not receive the model's keyword arguments \(slab\)"),
        # transformers 5.5: the second
        ("diffllama", {}, "layer 0 attends twice in one forward pass|attention be replaced"),
        ("doge", {"keep_window_size": 8}, "DogeAttention passes a mask of its own"),
        (
            "qwen2_moe",
            MOE | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
            "does not pass its sliding_window=6 to",
        ),
    ],
)
def test_attention_that_does_what_rollout_cannot_see_is_refused(family, settings, message):
    small = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 256, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small, **settings))
    with pytest.raises(ValueError, match=message):
        sampler(model).generate(problems(5), step=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_batch_check_passes_the_sampler_and_stops_one_that_computes_otherwise(precision, monkeypatch):
    policy = Policy(tiny_model("mistral, window 12").train(), None, precision)
    module = PolicyModule(policy, temperature=1.0, impl="torch")
    draw_groups = lambda: sampler(policy.model, group_size=4, max_new_tokens=12).generate(problems(30, 25, 28), step=0)
    drawn = make_yardstick(module, draw_groups(), policy.model.device)
    assert check_sampler(module, drawn) < (1e-5 if precision == "fp32" else 0.1)
    blind = lambda *tensors: CAUSAL(*tensors[:-1], None)
    monkeypatch.setattr(attention, "_causal", blind)  # prompts are read without the window
    with pytest.raises(ValueError, match="differ by .* rollout does not compute what MistralForCausalLM computes"):
        check_sampler(module, make_yardstick(module, draw_groups(), policy.model.device))


def test_a_model_without_attention_in_every_layer_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=260, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        sampler(model).generate(problems(5), step=0)
