"""What a rollout promises whatever the model: independence, restoration, storage, endings, errors."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.layers import checkpoint_layers
from grpo.rollout import engine, loop
from grpo.rollout.schedule import prefill_chunks
from tests.rollout_helpers import (
    EOS,
    PAD,
    VOCAB,
    byte_tokenizer,
    ids_of,
    problems,
    sampler,
    syllable_tokenizer,
    tiny_model,
)

LENGTHS = (17, 30, 1, 5, 22)


@pytest.fixture(scope="module")
def model():
    """A Qwen2 where 24 of 260 ids end a sequence, so that lengths are ragged."""
    model = tiny_model("qwen2")
    model.generation_config.eos_token_id = [EOS, *range(0, 230, 10)]
    return model


def test_groups_come_back_whole_in_order_and_with_their_step(model):
    made = problems(*LENGTHS)
    groups = sampler(model).generate(made, step=4)
    assert [group.problem for group in groups] == made
    assert all(group.step == 4 and [c.sample for c in group.completions] == [0, 1, 2] for group in groups)
    assert sampler(model).generate([], step=4) == []


def test_tokens_depend_neither_on_company_nor_order_nor_on_how_many_run_at_a_time(model):
    made = problems(*LENGTHS)
    together = ids_of(sampler(model).generate(made, step=1))
    assert len({len(ids) for group in together for ids in group}) > 3  # ragged: rows leave one by one
    assert ids_of(sampler(model).generate(made[::-1], step=1))[::-1] == together
    assert [ids_of(sampler(model).generate([problem], step=1))[0] for problem in made] == together
    for limits in ({"max_sequences": 3}, {"max_sequences": 7}, {"prefill_tokens": 1}):
        assert ids_of(sampler(model, **limits).generate(made, step=1)) == together


def test_looking_at_finished_rows_only_now_and_then_as_on_cuda_changes_nothing(model, monkeypatch):
    made = problems(*LENGTHS)
    expected = sampler(model, max_sequences=6).generate(made, step=1)
    monkeypatch.setattr(loop, "STEPS_BETWEEN_LOOKS", {"cpu": 8})
    found = sampler(model, max_sequences=6).generate(made, step=1)
    assert [[(c.ids, c.text, c.finish) for c in group.completions] for group in found] == [
        [(c.ids, c.text, c.finish) for c in group.completions] for group in expected
    ]


def test_a_smaller_group_draws_the_same_first_samples(model):
    made = problems(*LENGTHS)
    large, small = (ids_of(sampler(model, group_size=size).generate(made, step=1)) for size in (5, 2))
    assert [group[:2] for group in large] == small


def test_other_neighbours_of_the_same_shape_leave_log_probs_equal_to_the_bit():
    model = tiny_model("qwen2")
    first, *others = problems(17, 17, 17, 17, 17)
    left, right = (sampler(model).generate([first, *pair], step=0) for pair in (others[:2], others[2:]))
    assert all(completion.finish == "length" for group in left + right for completion in group.completions)
    assert left[0] == right[0]


@pytest.mark.parametrize("change", [{"seed": 8}, {"stream": 1}])
def test_seed_step_and_stream_change_the_tokens_and_the_same_call_repeats_them(model, change):
    made = problems(*LENGTHS)
    base = ids_of(sampler(model).generate(made, step=1))
    assert ids_of(sampler(model).generate(made, step=1)) == base
    assert ids_of(sampler(model).generate(made, step=2)) != base
    assert ids_of(sampler(model, **change).generate(made, step=1)) != base


def test_the_models_own_parameters_are_used_and_none_is_copied(model):
    shapes = {tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim == 2}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    copies = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(tensor, torch.Tensor) and {tuple(tensor.shape), tuple(tensor.shape)[::-1]} & shapes:
                    copies.extend([func] * (tensor.untyped_storage().data_ptr() not in own))
            return output

    with Watch():
        sampler(model).generate(problems(21), step=0)  # 20 and 3, 2, 1 rows of activations: no parameter's shape
        assert not copies
        _ = model.lm_head.weight * 1  # the watch would have seen one
        assert copies


def snapshot(model):
    modes = [module.training for module in model.modules()]
    return modes, model.config._attn_implementation, torch.get_rng_state().tolist(), torch.is_grad_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_modes_attention_and_random_state_come_back_also_after_an_exception(model, fails, monkeypatch):
    training = tiny_model("qwen2")
    training.generation_config.eos_token_id = model.generation_config.eos_token_id
    training.train()
    checkpoint_layers(training)
    training.model.layers[1].eval()  # modes need not be the same everywhere
    before, made = snapshot(training), problems(*LENGTHS)
    if fails:
        original = engine.kernels.sample_token

        def failing(logits, *args, **kwargs):
            torch.rand(3)
            raise KeyboardInterrupt

        monkeypatch.setattr(engine.kernels, "sample_token", failing)
        with pytest.raises(KeyboardInterrupt):
            sampler(training).generate(made, step=1)
        monkeypatch.setattr(engine.kernels, "sample_token", original)
    else:
        assert ids_of(sampler(training).generate(made, step=1)) == ids_of(sampler(model).generate(made, step=1))
    assert snapshot(training) == before
    assert training.model.layers[0].gradient_checkpointing
    training(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()  # and it trains on


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs on CPU; see test_rollout_gpu")
@pytest.mark.parametrize("has_fixed_shapes", [False, True])
def test_the_kernels_draw_what_their_definitions_draw(has_fixed_shapes, monkeypatch):
    model, made = tiny_model("qwen2", head_dim=16, num_hidden_layers=1), problems(17, 1)
    model.generation_config.eos_token_id = [EOS, *range(0, 230, 3)]  # some rows end at once
    expected = ids_of(sampler(model, max_new_tokens=5).generate(made, step=1))
    interpreted = sampler(model, max_new_tokens=5, impl="triton")
    # Rows without an owner, and bounds of the slab.
    monkeypatch.setattr(interpreted, "has_fixed_shapes", has_fixed_shapes)
    assert ids_of(interpreted.generate(made, step=1)) == expected


def test_every_completion_has_exactly_the_ending_that_its_finish_reason_says(model):
    model_eos, seen = set(model.generation_config.eos_token_id), set()
    texts = sampler(model, tokenizer=syllable_tokenizer(), stop=("ab", "cde"), group_size=8, max_new_tokens=30)
    for group in texts.generate(problems(*LENGTHS), step=0):
        for completion in group.completions:
            seen.add(completion.finish)
            assert len(completion.logprobs) == len(completion.ids) <= 30
            assert not model_eos & set(completion.ids[:-1])
            assert (completion.finish == "eos") == (completion.ids[-1] in model_eos)
            assert completion.finish != "length" or len(completion.ids) == 30
            assert "ab" not in completion.text and "cde" not in completion.text
    assert seen == {"eos", "stop", "length"}


def test_the_end_of_sequence_token_is_in_the_ids_not_in_the_text_and_may_be_the_pad_token(model):
    tokenizer = syllable_tokenizer()
    expected = ids_of(sampler(model, tokenizer=tokenizer).generate(problems(*LENGTHS), step=0))
    tokenizer.pad_token = tokenizer.eos_token
    groups = sampler(model, tokenizer=tokenizer).generate(problems(*LENGTHS), step=0)
    assert ids_of(groups) == expected
    ended = [completion for group in groups for completion in group.completions if completion.finish == "eos"]
    assert ended
    for completion in ended:
        assert completion.text == tokenizer.decode(completion.ids[:-1], skip_special_tokens=True)


def test_progress_counts_up_to_all_sequences(model):
    calls = []
    sampler(model, max_sequences=6, progress=lambda *call: calls.append(call)).generate(problems(*LENGTHS), 0)
    done, totals = zip(*calls, strict=True)
    assert list(done) == sorted(done) and done[-1] == 15 and set(totals) == {15}


def test_prefill_chunks_hold_similar_lengths_within_the_budget_and_lose_none():
    lengths = [5, 40, 1, 7, 100, 6]
    chunks = prefill_chunks(lengths, max_tokens=21)
    assert chunks == [[2, 0, 5], [3], [1], [4]]  # 3 * 6 = 18; 4 * 7 = 28 is too much; 100 alone exceeds the budget


@pytest.mark.parametrize(
    "lengths, change, message",
    [
        ((3, 0), {}, "problem 'p1' has an empty prompt"),
        ((3,), {"seed": 2**32}, "seed=4294967296 must be from 0 to 4294967295"),
        ((3, 250), {}, r"'p1': 250 prompt tokens \+ max_new_tokens=12 exceed the model's context of 256"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_before_any_work(model, lengths, change, message, monkeypatch):
    made, engine_ = problems(*lengths), sampler(model, **change)
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=message):
        engine_.generate(made, step=0)


def test_a_prompt_with_a_token_that_the_model_does_not_know_is_refused(model):
    """As of a tokenizer that got tokens which the model was not resized for."""
    asked = replace(problems(3)[0], prompt_ids=(5, VOCAB, 7))
    with pytest.raises(
        ValueError, match=f"'p0': token id {VOCAB} of its prompt has no embedding: the model has {VOCAB};"
    ):
        sampler(model).generate([asked], step=0)


def test_a_prompt_that_just_fits_is_served(model):
    groups = sampler(model).generate(problems(256 - 12), step=0)
    assert all(completion.ids for completion in groups[0].completions)


def test_a_model_that_names_no_context_is_served(monkeypatch):
    model = tiny_model("qwen2")
    del model.config.max_position_embeddings
    monkeypatch.delattr(type(model.config), "max_position_embeddings", raising=False)  # its default
    assert not hasattr(model.config, "max_position_embeddings"), "as of BLOOM"
    assert sampler(model).generate(problems(3), step=0)


def test_settings_that_cannot_work_are_refused(model, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="Triton kernels need a CUDA device, not cpu"):
        sampler(model, impl="triton")
    with pytest.raises(ValueError, match=r"stop strings \['<eos>'\] contain a special token"):
        sampler(model, stop=("<eos>",))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)  # without a role such as eos_token
    with pytest.raises(ValueError, match=r"stop strings \['<\|end\|>'\] contain a special token"):
        sampler(model, tokenizer=tokenizer, stop=("<|end|>",))
    ownerless, tokenizer = tiny_model("qwen2", eos_token_id=None), byte_tokenizer()
    ownerless.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-sequence token; set eos_token"):
        sampler(ownerless, tokenizer=tokenizer)


def test_weights_that_are_not_finite_stop_the_run_and_name_step_problem_and_sample():
    model = tiny_model("qwen2")
    model.model.embed_tokens.weight.data[problems(4)[0].prompt_ids[-1]] = float("nan")
    with pytest.raises(FloatingPointError, match="step 3: log-prob nan at token 0 of sample 0 of problem 'p0'"):
        sampler(model).generate(problems(4), step=3)


def test_every_source_of_end_of_sequence_ids_counts():
    model = tiny_model("qwen2")
    model.config.eos_token_id, model.generation_config.eos_token_id = 3, [5, PAD]
    assert sampler(model).ending.eos == {EOS, 3, 5, PAD}
