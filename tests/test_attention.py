"""Packed rows equal padded rows, against a dense mask as oracle and through whole models, values and gradients."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MambaConfig, MixtralConfig, Qwen3Config

from grpo import attention, first_batch
from grpo.attention import (
    SHARED_PREFIX,
    attention_mode,
    choose_layout,
    flex,
    gathered,
    merged_parts,
    shared_prefix_attention,
)
from grpo.batch import LAYOUTS, lay_out, packed_row, padded_rows
from grpo.first_batch import Yardstick, check_first_batch, check_packing, check_sampler, make_yardstick
from grpo.logprobs import LogprobModel, PolicyModule
from grpo.policy import Policy
from grpo.records import Completion, Group, Problem, SharedPrefix
from tests.test_update import distance
from tests.tiny import VOCABULARY, made_up_groups, tiny_qwen2, use_fp64_rms_norm, word_tokenizer

CPU = torch.device("cpu")
WINDOWS = [None, 1, 3, 6]
COMMON = [0, 4]
EXACT_CALLS = attention._attention_calls


def ragged_layout(scale: int = 1, common: int = 0) -> SharedPrefix:
    """Three groups: ragged completions, one of them of a single token; a one-token prompt; a group without any. Before
    them `common` rows that all see."""
    spans, at = [], common * scale
    for prompt, *completions in [(5, 4, 0, 7), (1, 1, 3), (2,)]:
        stops = [at := at + length * scale for length in (prompt, *completions)]
        starts = [stops[0] - prompt * scale, *stops]
        slices = [slice(start, stop) for start, stop in zip(starts, stops, strict=False)]
        spans.append((slices[0], slices[1:]))
    return lay_out(spans, slice(0, common * scale))


def heads(layout: SharedPrefix, dtype=torch.float64, size: int = 8, device=CPU) -> list[torch.Tensor]:
    """Query of 4 heads, key and value of 2, as a transformers layer hands them over: [1, heads, L, D]."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randn(1, len(layout.group), count, size, generator=generator).transpose(1, 2)
    return [draw(count).to(device, dtype).requires_grad_() for count in (4, 2, 2)]


def dense(query, key, value, layout: SharedPrefix, scale: float, window: int | None) -> torch.Tensor:
    """The oracle: one softmax per row under a mask written as the definition reads."""
    length = len(layout.group)
    mask = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(q + 1):
            in_prompt_or_own = layout.completion[k] == 0 or layout.completion[k] == layout.completion[q]
            near = window is None or layout.position[q] - layout.position[k] < window
            in_group = layout.group[q] == layout.group[k] and in_prompt_or_own
            mask[q, k] = (in_group or layout.group[k] == -1) and near
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~mask.to(query.device), -math.inf)
    return scores.softmax(-1) @ value


def value_and_gradients(function, tensors, layout, window) -> list[torch.Tensor]:
    output = function(*tensors, layout, 0.3, window)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad((output * weights).sum(), tensors)]


@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize("window", WINDOWS)
def test_merged_parts_equal_the_dense_mask_with_its_gradients(window, common):
    layout = ragged_layout(common=common)
    tensors = heads(layout)
    expected = value_and_gradients(dense, tensors, layout, window)
    for ours, theirs in zip(value_and_gradients(merged_parts, tensors, layout, window), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize("window", WINDOWS[1:])
def test_a_sliding_window_in_blocks_of_rows_equals_the_dense_mask(window, common, rows, monkeypatch):
    monkeypatch.setattr(attention, "WINDOW_ROWS", rows)
    layout = ragged_layout(common=common)
    tensors = heads(layout)
    expected = value_and_gradients(dense, tensors, layout, window)
    for ours, theirs in zip(value_and_gradients(merged_parts, tensors, layout, window), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_masks_of_a_sliding_window_grow_with_the_length_and_not_with_its_square():
    def elements(length: int, window: int) -> int:
        at = [0, 100, 100 + length, 100 + 2 * length]
        layout = lay_out([(slice(*at[:2]), [slice(*at[1:3]), slice(*at[2:])])])
        return sum(mask.numel() for *_, mask in EXACT_CALLS(layout, window, torch.float32) if mask is not None)

    assert elements(8000, 64) < 2.2 * elements(4000, 64) < 4.4 * 4000 * 2 * (attention.WINDOW_ROWS + 64)
    assert elements(8000, 10_000) == 0  # a window that hides nothing needs none


@pytest.mark.parametrize("window", [None, 3])
def test_merged_parts_pass_gradcheck(window):
    spans = [(slice(2, 5), [slice(5, 7), slice(7, 7), slice(7, 10)]), (slice(10, 11), [slice(11, 12)])]
    layout = lay_out(spans, slice(0, 2))
    assert torch.autograd.gradcheck(lambda *qkv: merged_parts(*qkv, layout, 0.3, window), heads(layout, size=2))


@pytest.mark.parametrize("has_gqa", [True, False], ids=["told", "untold"])
@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize("window", WINDOWS)
def test_gathered_keys_equal_the_dense_mask(window, common, has_gqa, monkeypatch):
    """The plan of the CUDA path; its kernel is played by a loop with flash attention's own conventions."""

    def loop(query, key, value, query_starts, key_starts, longest_query, longest_key, *, scale, window_size, **options):
        assert options == ({"enable_gqa": True} if has_gqa else {})
        key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
        outputs = []
        for i in range(len(query_starts) - 1):
            rows, keys = (slice(int(starts[i]), int(starts[i + 1])) for starts in (query_starts, key_starts))
            num_rows, num_keys = rows.stop - rows.start, keys.stop - keys.start
            assert num_rows <= longest_query and num_keys <= longest_key
            age = (
                torch.arange(num_rows)[:, None] + num_keys - num_rows - torch.arange(num_keys)
            )  # from the bottom right
            left, right = window_size
            assert left >= -1  # which is no limit
            visible = (age >= -right) & ((age <= left) if left >= 0 else torch.tensor(True))
            q, k, v = (tensor.transpose(0, 1) for tensor in (query[rows], key[keys], value[keys]))
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale).transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(attention.varlen, "varlen_attn", loop)
    monkeypatch.setattr(attention, "VARLEN_OPTIONS", {"scale", "window_size", *(["enable_gqa"] if has_gqa else [])})
    layout = ragged_layout(common=common)
    tensors = heads(layout)
    expected = value_and_gradients(dense, tensors, layout, window)
    for ours, theirs in zip(value_and_gradients(gathered, tensors, layout, window), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)


def test_the_gradient_of_a_key_that_many_sequences_share_is_rounded_once():
    torch.manual_seed(0)
    rows = torch.arange(10).repeat(100)  # as common keys are gathered: once for each of a hundred sequences
    gradient = torch.randn(1000, 2, 8).bfloat16() + 0.5
    truth = torch.zeros(10, 2, 8, dtype=torch.float64).index_add_(0, rows, gradient.double())

    def error(gather):
        keys = torch.randn(10, 2, 8).bfloat16().requires_grad_()
        (found,) = torch.autograd.grad(gather(keys, rows), keys, gradient)
        return ((found.double() - truth).abs() / truth.abs()).max().item()

    assert error(attention._GatherRows.apply) <= 2**-8  # bf16 keeps eight bits
    assert error(lambda keys, rows: keys[rows]) > 2**-7


@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize("window", [None, 3])
@torch.no_grad()
def test_flex_attention_with_the_layouts_blocks_equals_the_dense_mask(window, common):
    layout = ragged_layout(scale=9, common=common)  # more than one block of 128
    tensors = [tensor.detach() for tensor in heads(layout, torch.float32, size=16)]  # no backward on CPU
    expected = dense(*tensors, layout, 0.3, window)
    assert torch.allclose(flex(*tensors, layout, 0.3, window), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "width, dtype, chosen",
    [(64, "bfloat16", gathered), (25, "bfloat16", flex), (264, "bfloat16", flex), (64, "float32", flex)],
)
def test_on_cuda_flash_attention_serves_what_its_kernel_takes(width, dtype, chosen):
    query = SimpleNamespace(device=torch.device("cuda"), dtype=getattr(torch, dtype), shape=(1, 4, 128, width))
    assert attention.backend(query) is chosen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("size, common", [(64, 0), (128, 0), (64, 70)])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("function, dtype", [(gathered, torch.bfloat16), (flex, torch.bfloat16), (flex, torch.float32)])
def test_on_cuda_both_backends_equal_the_dense_mask_with_their_gradients(function, dtype, window, size, common):
    if function is gathered and not {"scale", "window_size"} <= attention.VARLEN_OPTIONS:
        pytest.skip("varlen_attn of this torch has no window_size; flex serves instead")
    spans = [(slice(common, 100), [slice(100, 150), slice(150, 150), slice(150, 213)]), (slice(213, 256), [])]
    layout = lay_out(spans, slice(0, common)).to("cuda")
    exact = [tensor.detach().double().requires_grad_() for tensor in heads(layout, dtype, size, "cuda")]
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    expected = value_and_gradients(dense, exact, layout, window)
    for ours, theirs in zip(value_and_gradients(function, tensors, layout, window), expected, strict=True):
        error = ((ours.double() - theirs).norm() / theirs.norm()).item()
        assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3), error


# --- whole models -----------------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


class LowRank(nn.Module):
    """A frozen linear layer and a trained low-rank one beside it."""

    def __init__(self, base: nn.Linear, rank: int = 3):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / 3)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) / 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base(inputs) + inputs @ self.down.T @ self.up.T


def with_low_rank(model: nn.Module) -> nn.Module:
    """Low-rank layers beside every projection of the decoder; everything else frozen."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, LowRank(child))
    return model


def from_config(config, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}  # one full layer, one sliding
MODELS = {
    "qwen2 fp64": lambda: tiny_qwen2().double(),
    "qwen2 sliding fp64": lambda: tiny_qwen2(**SLIDING).double(),
    "qwen2 low rank fp64": lambda: with_low_rank(tiny_qwen2()).double(),
    "qwen2": tiny_qwen2,
    "qwen3": lambda: from_config(Qwen3Config(**TINY, head_dim=16)),
    "llama": lambda: from_config(LlamaConfig(**TINY)),
}


def beginning_alike(group: Group, common: int) -> Group:
    prompt = tuple(2 + i % (VOCABULARY - 2) for i in range(common)) + group.prompt_ids
    return replace(group, problem=replace(group.problem, prompt_ids=prompt))


def gradients_in(layout: str, policy: Policy, checkpointing: bool, parts: int, common: int = 0) -> tuple[dict, dict]:
    """Log-probs by (group, sample) and gradients of a loss over six groups, split over `parts` micro-batches. All
    prompts begin with the same `common` tokens."""
    groups = [beginning_alike(group, common) for group in made_up_groups(6, 4)]
    members = [(g, s) for g in range(6) for s in range(4)]
    module = PolicyModule(policy, temperature=0.9, impl="torch", checkpointing=checkpointing)
    policy.model.train()
    policy.masters.zero_grad()
    logprobs = {}
    for part in range(parts):
        micro_batch = LAYOUTS[layout][1](groups, members[part::parts], CPU)  # every group is split where parts > 1
        assert layout == "padded" or micro_batch.shared_prefix.common.stop == common
        coefficient = torch.sin(micro_batch.tokens.target.to(torch.float64))
        loss, found, _ = module(micro_batch, lambda logprobs, entropy, rows, c=coefficient: c[rows] * logprobs)
        loss.backward()
        for row, member in enumerate(micro_batch.sequences):
            logprobs[member] = found[micro_batch.tokens.sequence == row]
    return dict(sorted(logprobs.items())), {
        name: p.grad for name, p in policy.masters.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("common", [0, 40])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_log_probs_and_gradients_equal_padded_ones(name, checkpointing, common, monkeypatch):
    is_fp64 = name.endswith("fp64")
    if is_fp64:
        use_fp64_rms_norm(monkeypatch)
    policy = Policy(MODELS[name](), word_tokenizer(), "fp32")
    expected, gradients = gradients_in("padded", policy, False, 1, common)
    for parts in (1, 3):
        logprobs, packed = gradients_in("packed", policy, checkpointing, parts, common)
        assert distance(packed, gradients) < (1e-10 if is_fp64 else 5e-6)
        assert distance(logprobs, expected) < (1e-10 if is_fp64 else 5e-6)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_in_bf16_packed_rows_are_no_further_from_fp32_than_padded_rows(checkpointing):
    exact = gradients_in("padded", Policy(tiny_qwen2(), word_tokenizer(), "fp32"), False, 1)
    errors = {}
    for layout in LAYOUTS:
        found = gradients_in(layout, Policy(tiny_qwen2(), word_tokenizer(), "bf16"), checkpointing, 1)
        assert all(gradient.dtype == torch.float32 for gradient in found[1].values())
        errors[layout] = [distance(ours, theirs) for ours, theirs in zip(found, exact, strict=True)]
    assert all(ours < 1.5 * theirs for ours, theirs in zip(errors["packed"], errors["padded"], strict=True)), errors
    assert max(errors["packed"]) < 0.05


def test_one_token_prompts_and_completions_are_finite_with_their_gradients():
    policy = Policy(tiny_qwen2(), word_tokenizer(), "fp32")
    groups = [group for group in made_up_groups(40, 4) if len(group.prompt_ids) == 1]
    assert len(groups) > 2 and any(len(completion.ids) == 1 for group in groups for completion in group.completions)
    module = PolicyModule(policy, temperature=1.0, impl="torch")
    logprobs, entropy = module(packed_row(groups, [(g, s) for g in range(len(groups)) for s in range(4)], CPU))
    logprobs.sum().backward()
    assert logprobs.isfinite().all() and entropy.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_the_reference_goes_the_same_way():
    groups, members = made_up_groups(1), [(0, 0), (0, 2)]
    reference = LogprobModel(tiny_qwen2(seed=1).eval(), temperature=0.9, impl="torch")
    with torch.no_grad():
        packed, padded = (reference(build(groups, members, CPU))[0] for build in (packed_row, padded_rows))
    assert torch.allclose(packed, padded, rtol=0, atol=1e-5)


# --- switching, refusing, checking ------------------------------------------------------------------------------------


def test_the_model_gets_its_own_attention_back_also_after_an_error():
    model = tiny_qwen2()
    with pytest.raises(RuntimeError), attention_mode(model, SHARED_PREFIX):
        assert model.config._attn_implementation == SHARED_PREFIX
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("named, scale", [({"scaling": 0.3}, 0.3), ({}, 8**-0.5)])
def test_scores_are_scaled_as_the_layer_says_or_by_the_root_of_the_width(named, scale):
    tensors = heads(layout := ragged_layout())
    output, _ = shared_prefix_attention(nn.Identity(), *tensors, None, shared_prefix=layout, **named)
    assert torch.allclose(output.transpose(1, 2), dense(*tensors, layout, scale, None), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "name, value", [("softcap", 30.0), ("s_aux", torch.zeros(4)), ("position_bias", torch.zeros(4)), ("dropout", 0.1)]
)
def test_what_packed_rows_cannot_do_is_refused_by_name(name, value):
    layout = ragged_layout()
    with pytest.raises(ValueError, match=f"passes {name} to its attention.*batch.layout=padded"):
        shared_prefix_attention(nn.Identity(), *heads(layout), None, shared_prefix=layout, **{name: value})


REFUSED = {
    "hybrid": (lambda: tiny_qwen2(layer_types=["full_attention", "linear_attention"]), "state cannot be forked"),
    "gemma2": (lambda: from_config(Gemma2Config(**TINY, head_dim=8), "eager"), "caps its attention scores"),
    "mamba": (
        lambda: from_config(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1), "eager"),
        "state cannot be forked|support a custom attention function",
    ),
    "router loss": (
        lambda: from_config(MixtralConfig(**TINY, num_local_experts=2, output_router_logits=True)),
        "router loss",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_packed_falls_back_to_padded_rows_with_the_reason(name):
    make, reason = REFUSED[name]
    with torch.device("meta"):
        model = make()
    layout, why = choose_layout("auto", model)
    assert layout == "padded" and re.search(reason, why)
    with pytest.raises(ValueError, match=reason):
        choose_layout("packed", model)
    assert choose_layout("padded", model) == ("padded", "asked for")


def test_what_can_be_packed_is_packed():
    assert choose_layout("auto", tiny_qwen2())[0] == "packed"
    assert choose_layout("padded", tiny_qwen2())[0] == "padded"


def see_other_completions(layout, window, dtype):
    for prompt, completions in layout.groups:
        whole = slice(prompt.start, max(span.stop for span in (prompt, *completions)))
        yield whole, whole, True, None


def miss_the_prompt(layout, window, dtype):
    for prompt, completions in layout.groups:
        yield from ((span, span, True, None) for span in (prompt, *completions) if span.stop > span.start)


def miss_what_is_common(layout, window, dtype):
    yield from (part for part in EXACT_CALLS(layout, window, dtype) if part[1] != layout.common)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("leak", [see_other_completions, miss_the_prompt, miss_what_is_common])
def test_the_first_batch_check_passes_exact_packing_and_stops_on_a_planted_leak(leak, precision, monkeypatch):
    """Also on a model at the usual initialisation, whose log-probs hardly depend on what it sees."""
    for scale in (0.2, 0.02):
        policy = Policy(tiny_qwen2(initializer_range=scale), word_tokenizer(), precision)
        module = PolicyModule(policy, temperature=1.25, impl="torch")
        groups = [beginning_alike(group, 40 if leak is miss_what_is_common else 0) for group in made_up_groups()]
        mean, _ = check_packing(module, make_yardstick(module, groups, CPU))  # the largest it bounds itself
        assert mean < 0.02
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"differ by [\d.]+ nats on average"):
            patch.setattr(attention, "_attention_calls", leak)
            check_packing(module, make_yardstick(module, groups, CPU))


def test_packing_is_checked_where_rows_are_packed_and_the_sampler_always(monkeypatch):
    module, groups = PolicyModule(Policy(tiny_qwen2(), word_tokenizer(), "fp32"), temperature=1.0, impl="torch"), []
    for group in made_up_groups(2):
        exact = module(padded_rows([group], [(0, s) for s in range(4)], CPU))[0].tolist()
        logprobs = iter(exact)
        drawn = [replace(c, logprobs=[next(logprobs) for _ in c.ids]) for c in group.completions]
        groups.append(replace(group, completions=drawn))
    assert re.search(
        r"the sampler differs by .* nats, packed rows by", check_first_batch(module, groups, CPU, "packed")
    )
    assert "packed" not in check_first_batch(module, groups, CPU, "padded")
    monkeypatch.setattr(attention, "_attention_calls", see_other_completions)
    with pytest.raises(ValueError, match="packed log-probs of groups"):
        check_first_batch(module, groups, CPU, "packed")
    assert "packed" not in check_first_batch(module, groups, CPU, "padded")
    with pytest.raises(ValueError, match="the sampler's log-probs differ"):
        check_first_batch(module, made_up_groups(2), CPU, "padded")


def test_the_yardstick_is_the_smallest_group_whose_completions_differ_and_the_next_smallest():
    def group(index, *ids):
        completions = [Completion(list(row), [-1.0] * len(row), "", "eos", s) for s, row in enumerate(ids)]
        return Group(Problem("", "", "", index=index, prompt_ids=(2, 3)), completions, 0)

    groups = [
        group(0, [5] * 9, [6] * 9),
        group(1, [5], [5]),
        group(2, [5, 5], [5, 5], [6], [7], [8]),
        group(3, [4] * 30),
    ]
    module = PolicyModule(Policy(tiny_qwen2(), word_tokenizer(), "fp32"), temperature=1.0, impl="torch")
    found = make_yardstick(module, groups, CPU)
    assert [group.index for group in found.groups] == [2, 1]
    assert found.rows.sequences == [(0, 0), (0, 2), (0, 3), (1, 0), (1, 1)]
    found = make_yardstick(module, [groups[2], group(4, [5], [6])], CPU)
    assert [group.index for group in found.groups] == [4, 2]
    assert found.rows.sequences == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(("dtype", "little"), [(torch.float32, 0.01), (torch.bfloat16, 0.1)])
def test_four_times_the_rounding_and_a_little_is_allowed_and_no_more(dtype, little):
    groups, members = made_up_groups(1), [(0, 0), (0, 1), (0, 2)]
    rows = padded_rows(groups, members, CPU)
    rounding = torch.full_like(rows.tokens.sampler, 0.01)
    rounding[3] = 0.05
    yardstick = Yardstick(groups, rows, logprobs=-rounding, logprobs_fp32=torch.zeros_like(rounding))
    everywhere, somewhere = torch.ones_like(rounding), torch.eye(len(rounding))[0]
    mean = 4 * rounding.mean().item()
    packed = lambda error: check_packing(lambda rows: (error, None), yardstick)
    sampled = lambda error: check_sampler(
        SimpleNamespace(working=torch.empty(0, dtype=dtype)),
        yardstick._replace(rows=replace(rows, tokens=replace(rows.tokens, sampler=error))),
    )
    for check, error in (
        (packed, (mean + 1e-3) * everywhere),
        (packed, (4 * 0.05 + 2e-2) * somewhere),
        (sampled, (mean + little) * everywhere),
    ):
        check(0.99 * error)
        with pytest.raises(ValueError, match="; rounding explains at most"):
            check(1.01 * error)


def test_of_long_completions_the_beginnings_are_compared(monkeypatch):
    """Scores of padded rows in fp32 may take memory by the square of their length."""
    monkeypatch.setattr(first_batch, "YARDSTICK_LENGTH", 5)
    module = PolicyModule(Policy(tiny_qwen2(), word_tokenizer(), "fp32"), temperature=1.0, impl="torch")
    ids = [[7, 7, 7, 7, 7, 8, 9], [7, 7, 7, 7, 7, 3], [4, 4]]
    completions = [Completion(row, [-float(i) for i, _ in enumerate(row)], "", "eos", s) for s, row in enumerate(ids)]
    found = make_yardstick(module, [Group(Problem("", "", "", prompt_ids=(2, 3)), completions, 0)], CPU)
    assert found.rows.sequences == [(0, 0), (0, 2)]  # the second differs from the first later only
    assert found.rows.tokens.target.tolist() == [7, 7, 7, 7, 7, 4, 4]
    assert found.rows.tokens.sampler.tolist() == [0, -1, -2, -3, -4, 0, -1]


def test_a_nan_stops_the_check():
    policy = Policy(tiny_qwen2(), word_tokenizer(), "fp32")
    with torch.no_grad():
        policy.masters.model.norm.weight[0] = math.nan
    module = PolicyModule(policy, temperature=1.0, impl="torch")
    with pytest.raises(ValueError, match="differ by nan nats"):
        check_packing(module, make_yardstick(module, made_up_groups(), CPU))
