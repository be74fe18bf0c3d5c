"""On one CUDA device (`make gpu`): replayed decode steps, kept slabs, and memory as planned."""

import pytest
import torch

from tests.rollout_helpers import EOS, ids_of, problems, sampler, syllable_tokenizer, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
LENGTHS = (17, 30, 1, 5, 22, 9, 14, 3)
MIB = 2**20


@pytest.fixture
def model():
    """A Qwen2 on CUDA in fp32 where 24 of 260 ids end a sequence, so that lengths are ragged."""
    model = tiny_model("qwen2", num_hidden_layers=3, hidden_size=64, head_dim=16).to("cuda")
    model.generation_config.eos_token_id = [EOS, *range(0, 230, 10)]
    return model


@pytest.mark.parametrize("limits", [{}, {"max_sequences": 9}, {"impl": "torch"}])
def test_graphs_draw_what_eager_steps_draw(model, limits):
    made, sizes = problems(*LENGTHS), dict(group_size=8, max_new_tokens=40)
    expected = sampler(model, cuda_graph=False, **sizes, **limits).generate(made, step=1)
    found = sampler(model, **sizes, **limits).generate(made, step=1)
    assert ids_of(found) == ids_of(expected)
    for group, other in zip(found, expected, strict=True):
        for completion, twin in zip(group.completions, other.completions, strict=True):
            assert completion.logprobs == pytest.approx(twin.logprobs, abs=1e-4)


def test_rows_stop_where_their_text_does_and_their_neighbours_draw_on(model):
    made, options = problems(*LENGTHS), dict(tokenizer=syllable_tokenizer(), max_new_tokens=100, group_size=8)
    free = sampler(model, **options).generate(made, step=1)
    texts = [completion.text for group in free for completion in group.completions]
    stopped = sampler(model, **options, stop=tuple(text[3:6] for text in texts[::8] if len(text) > 5))
    finishes = set()
    for before, after in zip(free, stopped.generate(made, step=1), strict=True):
        for long, short in zip(before.completions, after.completions, strict=True):
            assert short.ids == long.ids[: len(short.ids)] and long.text.startswith(short.text)
            assert short.logprobs == pytest.approx(long.logprobs[: len(short.ids)], abs=1e-4)
            finishes.add(short.finish)
    assert {"stop", "eos"} <= finishes


def test_cpu_and_cuda_draw_the_same_tokens(model):
    made = problems(*LENGTHS)
    found = ids_of(sampler(model, max_new_tokens=12).generate(made, step=1))
    expected = ids_of(sampler(model.to("cpu"), max_new_tokens=12).generate(made, step=1))
    pairs = list(zip(sum(found, []), sum(expected, []), strict=True))
    assert sum(ids != twin for ids, twin in pairs) <= 1  # a draw at the very border of two tokens may fall either way


def test_graphs_are_captured_and_outlive_an_optimizer_step_that_writes_in_place(model):
    made, warm = problems(*LENGTHS), sampler(model, max_new_tokens=40)
    before = ids_of(warm.generate(made, step=1))
    graphs = warm._kept[1]
    assert graphs.can_capture and graphs.replays
    captured = dict(graphs.replays)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    after = ids_of(warm.generate(made, step=1))
    assert after != before
    assert after == ids_of(sampler(model, cuda_graph=False, max_new_tokens=40).generate(made, step=1))
    assert captured.items() <= graphs.replays.items()


def test_released_memory_is_returned_and_the_slab_is_no_larger_than_planned(model):
    made, warm = problems(*LENGTHS), sampler(model, group_size=32, max_new_tokens=200, cuda_graph=False)
    warm.generate(made, step=0)  # cuBLAS takes its workspace, which stays
    warm.release()
    before = torch.cuda.memory_allocated()
    warm.generate(made, step=1)
    held = torch.cuda.memory_allocated() - before
    assert warm.planned_bytes() <= held <= warm.planned_bytes() + 8 * MIB  # and the buffers of the step
    warm.release()
    assert torch.cuda.memory_allocated() - before < MIB


def test_a_compiled_forward_draws_the_same(model):
    made = problems(*LENGTHS)
    expected = ids_of(sampler(model, cuda_graph=False).generate(made, step=1))
    assert ids_of(sampler(model, compile=True).generate(made, step=1)) == expected
