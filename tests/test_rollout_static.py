"""The decode step as CUDA graphs run it: fixed addresses, rows in buckets, recorded once and replayed."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from grpo import layers
from grpo.rollout import engine, graphs, loop
from grpo.rollout.schedule import assign_seats, bucket, ladder
from grpo.rollout.slab import KVSlab
from tests import recorded_graph
from tests.rollout_helpers import EOS, ids_of, problems, sampler, tiny_model

LENGTHS = (17, 30, 1, 5, 22)
COMPILED = torch._dynamo.utils.counters["stats"]


@pytest.fixture(scope="module")
def model():
    """A Qwen2 where 24 of 260 ids end a sequence, so that lengths are ragged."""
    return ragged("qwen2")


def ragged(family):
    model = tiny_model(family)
    model.generation_config.eos_token_id = [EOS, *range(0, 230, 10)]
    return model


@pytest.fixture
def captured(monkeypatch):
    """Graphs of a device that keeps its slab; returns the number of rows of every capture."""
    sizes = []

    class Counted(graphs.Graphs):
        def _capture(self, size, layout):
            sizes.append(size)
            super()._capture(size, layout)

    monkeypatch.setattr(graphs, "are_usable", lambda device: True)
    monkeypatch.setattr(graphs, "on_side_stream", lambda run: run())
    monkeypatch.setattr(graphs, "capture", recorded_graph.capture)
    monkeypatch.setattr(engine, "Graphs", Counted)
    monkeypatch.setattr(engine, "is_kept", lambda num_bytes, device: True)
    monkeypatch.setattr(loop, "STEPS_BETWEEN_LOOKS", {"cpu": 4})
    return sizes


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama3 rope", "mistral, window 12", "gemma2, window 8"])
def test_replayed_steps_draw_what_eager_steps_draw(family, captured):
    model, made = ragged(family), problems(*LENGTHS)
    limits = dict(max_new_tokens=40, group_size=5)
    expected = sampler(model, cuda_graph=False, **limits).generate(made, step=1)
    found = sampler(model, **limits).generate(made, step=1)
    assert ids_of(found) == ids_of(expected)
    assert captured[0] == 32 and captured == sorted(captured, reverse=True) and len(captured) > 1
    for group, other in zip(found, expected, strict=True):
        for completion, twin in zip(group.completions, other.completions, strict=True):
            assert completion.logprobs == pytest.approx(twin.logprobs, abs=1e-4)


@pytest.mark.parametrize("max_sequences", [3, 7, 9])
def test_rows_take_turns_in_a_replayed_step_and_stale_storage_is_never_read(
    model, captured, max_sequences, monkeypatch
):
    class Poisoned(KVSlab):
        def move(self, groups, rows, to, longest_suffix):
            super().move(groups, rows, to, longest_suffix)
            free = torch.ones(self.plan.num_rows, dtype=torch.bool)
            free[to] = False
            for layer in self.layers.values():
                for prefix, suffix in (layer[::2], layer[1::2]):
                    prefix[len(groups) :] = float("nan")
                    suffix[free] = float("nan")

    made = problems(*LENGTHS)
    expected = ids_of(sampler(model, cuda_graph=False).generate(made, step=1))
    monkeypatch.setattr(engine, "KVSlab", Poisoned)
    assert ids_of(sampler(model, max_sequences=max_sequences).generate(made, step=1)) == expected
    assert captured


def test_weights_changed_in_place_need_no_new_graph_and_moved_ones_do(captured):
    model, made = ragged("qwen2"), problems(*LENGTHS)
    warm = sampler(model)
    before = ids_of(warm.generate(made, step=1))
    count = len(captured)
    assert count
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    after = ids_of(warm.generate(made, step=1))
    assert after != before and after == ids_of(sampler(model, cuda_graph=False).generate(made, step=1))
    assert len(captured) == count
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    moved = ids_of(warm.generate(made, step=1))
    assert moved != after and moved == ids_of(sampler(model, cuda_graph=False).generate(made, step=1))
    assert len(captured) == 2 * count
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 3  # a buffer, which is no parameter
    turned = ids_of(warm.generate(made, step=1))
    assert turned != moved and turned == ids_of(sampler(model, cuda_graph=False).generate(made, step=1))
    again = len(captured)
    assert again > 2 * count and ids_of(warm.generate(made, step=1)) == turned and len(captured) == again


def test_a_size_runs_twice_before_it_is_recorded_and_all_share_a_pool_until_a_weight_moves(monkeypatch):
    seen = []

    class Step:
        model = torch.nn.Linear(1, 1)

        def __call__(self, layout):
            seen.append("run")

    def capture(run, pool):
        seen.append(pool)
        return lambda: seen.append("replay"), "pool"

    monkeypatch.setattr(graphs, "on_side_stream", lambda run: (seen.append("aside"), run()))
    monkeypatch.setattr(graphs, "capture", capture)
    steps = graphs.Graphs(Step())
    for rows in (8, 8, 8, 8, 4, 4, 4):
        steps(SimpleNamespace(seat_index=range(rows)))
    twice = ["aside", "run"] * 2
    assert seen == [*twice, None, "replay", "replay", *twice, "pool", "replay"]
    Step.model.weight = torch.nn.Parameter(torch.ones(1, 1))
    steps.check()
    steps(SimpleNamespace(seat_index=range(8)))
    assert seen[-2:] == [None, "replay"]


def test_warm_ups_and_captures_share_a_stream_that_waits_for_the_work_before_and_holds_up_the_work_after(monkeypatch):
    """On CPU there is no race to lose, so this is the order itself."""
    done = []

    class Stream:
        def __init__(self, name="aside"):
            self.name = name

        def wait_stream(self, other):
            done.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(kind, **options):
        done.append(options or kind.name)
        yield

    for name, value in (("Stream", Stream), ("stream", within), ("graph", within), ("CUDAGraph", recorded_graph.Graph)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
    graphs.side_stream.cache_clear()
    try:
        graphs.on_side_stream(lambda: done.append("run"))
        assert done == ["aside waits for current", "aside", "run", "current waits for aside"]
        graphs.capture(lambda: None, (0, 7))
        assert done[4:] == [{"pool": (0, 7), "stream": graphs.side_stream(), "capture_error_mode": "thread_local"}]
    finally:
        graphs.side_stream.cache_clear()


def test_a_longer_prompt_than_ever_makes_a_larger_slab_and_new_graphs(model, captured):
    warm = sampler(model)
    for lengths in (LENGTHS, (100, 3), LENGTHS):
        made = problems(*lengths)
        assert ids_of(warm.generate(made, step=1)) == ids_of(sampler(model, cuda_graph=False).generate(made, step=1))
        assert warm.plan.num_problems == 5, "of the calls before, too"
    assert warm.plan.prefix_size == 128 and warm.plan.num_problems == 5


def test_the_plan_of_a_run_without_graphs_is_replaced_where_rows_come_in_buckets(model, captured):
    made, eager, warm = problems(*LENGTHS), sampler(model, cuda_graph=False), sampler(model)
    expected = ids_of(eager.generate(made, step=1))
    warm.load_state_dict(eager.state_dict())
    assert ids_of(warm.generate(made, step=1)) == expected
    assert (eager.plan.num_rows, warm.plan.num_rows) == (15, 16)


def test_a_step_that_waits_for_the_device_is_run_eagerly_and_the_reason_is_said_once(model, captured, monkeypatch):
    made = problems(*LENGTHS)
    expected = ids_of(sampler(model, cuda_graph=False).generate(made, step=1))
    original = engine.kernels.sample_token

    def waiting(logits, *args, **options):
        float(logits.sum())
        return original(logits, *args, **options)

    monkeypatch.setattr(engine.kernels, "sample_token", waiting)
    warm = sampler(model)
    with pytest.warns(UserWarning, match="without CUDA graphs, which is slower: operation not permitted") as said:
        assert ids_of(warm.generate(made, step=1)) == expected
        assert ids_of(warm.generate(made, step=1)) == expected
    assert len(said) == 1 == len(captured)


def test_a_call_that_raises_leaves_a_sampler_that_can_go_on(model, captured, monkeypatch):
    made, warm = problems(*LENGTHS), sampler(model)
    expected = ids_of(warm.generate(made, step=1))
    monkeypatch.setattr(warm, "progress", lambda done, total: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        warm.generate(made, step=2)
    monkeypatch.setattr(warm, "progress", lambda done, total: None)
    assert ids_of(warm.generate(made, step=1)) == expected


def test_compiled_layers_draw_the_same_and_no_layer_and_no_number_of_rows_is_compiled_again(captured, monkeypatch):
    monkeypatch.setattr(layers, "BACKEND", "eager")  # traces as inductor does, and compiles nothing for a minute
    counts = []
    for depth in (2, 3):
        model = tiny_model("qwen2", num_hidden_layers=depth)
        model.generation_config.eos_token_id = [EOS, *range(0, 230, 10)]
        made, limits = problems(*LENGTHS), dict(max_new_tokens=20, group_size=8)
        expected = ids_of(sampler(model, cuda_graph=False, **limits).generate(made, step=1))
        torch._dynamo.reset()
        before, captured[:] = COMPILED["unique_graphs"], []
        for _ in range(2):
            assert ids_of(sampler(model, compile=True, **limits).generate(made, step=1)) == expected
        counts.append(COMPILED["unique_graphs"] - before)
        assert len(set(captured)) > 2
        assert not any("forward" in vars(layer) for layer in model.base_model.layers)
    assert 0 < counts[0] == counts[1] <= 6  # pieces of a layer, before and after its attention


def test_what_cannot_be_compiled_is_run_as_it_is_and_said(model, monkeypatch, caplog):
    monkeypatch.setattr(layers, "BACKEND", lambda graph, inputs: 1 / 0)
    torch._dynamo.reset()
    made = problems(*LENGTHS)
    expected = ids_of(sampler(model).generate(made, step=1))
    assert ids_of(sampler(model, compile=True).generate(made, step=1)) == expected
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1024, [1024, 768, 576, 448, 352, 288, 224, 192, 160, 128, 96, 64, 32, 16, 8]),
        (96, [96, 64, 32, 16, 8]),
        (16, [16, 8]),
        (8, [8]),
    ],
)
def test_a_step_is_prepared_for_few_numbers_of_rows_a_quarter_apart(most, sizes):
    assert ladder(most) == sizes == [bucket(size) for size in sizes]


def test_buckets_are_8_16_and_multiples_of_32():
    assert [bucket(rows) for rows in (1, 8, 9, 16, 17, 32, 33, 64, 65, 97)] == [8, 8, 16, 16, 32, 32, 64, 64, 96, 128]


def test_rows_without_an_owner_take_empty_seats_and_seat_indices_go_on_increasing():
    group = torch.tensor([0, 0, 2, 2, 2])  # of three groups with three seats: 0 1 _  _ _ _  6 7 8
    seat_index, row = assign_seats(group, 3, 7)
    assert seat_index.tolist() == [0, 1, 2, 3, 6, 7, 8] and row.tolist() == [0, 1, 4, 5, 6]
    assert [x.tolist() for x in assign_seats(group, 3, 5)] == [[0, 1, 6, 7, 8], [0, 1, 2, 3, 4]]
    assert assign_seats(group, 3, 9)[0].tolist() == list(range(9))
