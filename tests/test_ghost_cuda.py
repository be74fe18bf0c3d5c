"""The whole program on a CUDA device played by the CPU (tests/ghost_cuda.py): its devices, dtypes, graphs and waits.

What only a device can show (speed, memory, its own rounding) is `make gpu`'s.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import varlen

import eval as evaluation
import train
from grpo import distributed
from grpo.attention import VARLEN_OPTIONS
from grpo.config import RolloutConfig
from grpo.metrics import read_metrics
from grpo.records import Problem
from grpo.rollout import Sampler, engine
from grpo.rollout.graphs import Graphs
from grpo.rollout.loop import RolloutLoop
from tests.ghost_cuda import CUDA, Ghost, ghost_cuda
from tests.rollout_helpers import problems, sampler, syllable_tokenizer, tiny_model
from tests.tiny import save_tiny_model, tiny_qwen2, word_tokenizer, write_gsm8k_files
from tests.trainee import rows_without_clock

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a real CUDA device")


@pytest.fixture
def device():
    with ghost_cuda() as device:
        yield device


# The ghost itself -----------------------------------------------------------------------------------------------------


def test_operations_compute_where_all_tensors_are(device):
    layer = torch.nn.Linear(3, 2).to("cuda")
    assert isinstance(layer.weight, Ghost) and isinstance(layer.weight, torch.nn.Parameter)
    layer(torch.ones(4, 3, device=CUDA)).sum().backward()
    assert layer.weight.grad.device == CUDA and layer.weight.grad.tolist() == [[4.0] * 3] * 2
    with pytest.raises(RuntimeError, match="same device"):
        layer(torch.ones(4, 3))
    with pytest.raises(TypeError, match="numpy"):
        layer.bias.detach().numpy()
    with pytest.raises(RuntimeError, match="one dtype"):
        layer.weight @ torch.ones(3, 1, device=CUDA, dtype=torch.bfloat16)


def test_parameters_that_are_one_stay_one(device):
    model = tiny_qwen2().to("cuda")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight.device == CUDA


def test_a_graph_is_recorded_and_not_run_and_sees_new_values_at_old_addresses(device):
    total, step = torch.zeros(3, device=CUDA), torch.ones(3, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = 2 * step
        total += doubled
    assert total.tolist() == [0.0] * 3 and doubled.isnan().all()
    graph.replay()
    step.copy_(torch.tensor([1.0, 2.0, 3.0]))
    graph.replay()
    assert total.tolist() == [4.0, 6.0, 8.0]
    for wait in (
        lambda: total.sum().item(),
        lambda: total[total > 0],
        lambda: total + torch.tensor([1.0], device=CUDA),
    ):
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            wait()


@pytest.mark.parametrize("window", [(-1, 0), (2, 0), (-1, -1)])
def test_its_flash_attention_is_the_attention_of_each_sequence(device, window):
    generator = torch.Generator().manual_seed(0)
    draw = lambda rows, heads: torch.randn(rows, heads, 8, generator=generator).bfloat16()
    rows, keys = [(0, 3), (3, 4)], [(0, 5), (5, 9)]
    leaves = [draw(4, 4), draw(9, 2), draw(9, 2)]
    ghosts = [leaf.to(CUDA).requires_grad_() for leaf in leaves]
    starts = [torch.tensor(x, dtype=torch.int32, device=CUDA) for x in ([0, 3, 4], [0, 5, 9])]
    many_heads = {"enable_gqa": True} if "enable_gqa" in VARLEN_OPTIONS else {}
    output = varlen.varlen_attn(*ghosts, *starts, 3, 5, scale=0.5, window_size=window, **many_heads)
    (output.float() * torch.arange(8.0, device=CUDA)).sum().backward()

    exact = [leaf.float().requires_grad_() for leaf in leaves]
    parts = []
    for (a, b), (c, d) in zip(rows, keys, strict=True):
        age = (torch.arange(b - a) + (d - c) - (b - a))[:, None] - torch.arange(d - c)
        visible = (age >= 0) | (window[1] < 0)
        visible &= (age <= window[0]) | (window[0] < 0)
        query, key, value = (x.transpose(0, 1) for x in (exact[0][a:b], exact[1][c:d], exact[2][c:d]))
        part = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=0.5, enable_gqa=True)
        parts.append(part.transpose(0, 1))
    (torch.cat(parts) * torch.arange(8.0)).sum().backward()
    assert torch.allclose(output.cpu().float(), torch.cat(parts), atol=2e-2)
    for ghost, leaf in zip(ghosts, exact, strict=True):
        assert (ghost.grad.cpu().float() - leaf.grad).norm() < 1e-2 * leaf.grad.norm()


def test_attention_is_not_left_to_cudnn_which_plans_for_every_shape(device):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        assert distributed.start().device == CUDA and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# The program on it ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A working directory with a tiny model and questions in GSM8K's layout."""
    folder, before = tmp_path_factory.mktemp("ghost"), Path.cwd()
    os.chdir(folder)
    save_tiny_model(folder / "model", context=1024)
    write_gsm8k_files(folder / "data")
    yield folder
    os.chdir(before)


def run(name: str, *changes: str, config: str = "gsm8k", steps: int = 2) -> list[dict]:
    """The metrics of a whole run of train.py, which must not fall back from CUDA graphs."""
    small = [
        *("--config", str(ROOT / "configs" / f"{config}.yaml"), "--model.path", "model", "--data.path", "data"),
        *("--prompt.shots=0", "--rollout.prompts-per-step=4", "--rollout.group-size=3", "--rollout.max-new-tokens=14"),
        *("--eval.every=1", "--eval.validation-problems=2", "--eval.test-problems=2", "--seed=1", "--save-every=1"),
        "--model.compile=False",  # torch.compile makes code for a device, and there is none
        *("--optim.warmup=0", "--optim.lr=1e-3", "--rewards.no-require-finish", "--rewards.workers=1"),
        *("--rewards.functions", f"{ROOT}/tests/reward_functions.py:length_of"),  # it differs within a group
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rollout decodes without CUDA graphs")
        assert train.main([*small, *changes, f"--num-steps={steps}", "--run-dir", name]) == 0
    rows = read_metrics(Path(name))
    assert len(rows) == steps and all(row["skipped_steps"] == 0 for row in rows)
    return rows


def assert_close(ours: list[dict], theirs: list[dict]) -> None:
    """But for rounding, which Adam makes large where a gradient is nearly 0: the second step's weights differ by it."""
    for our, their, tolerance in zip(ours, theirs, (1e-4, 0.05), strict=False):
        assert their["grad_norm"] > 0.1 and their["mismatch"] < 1e-4
        for name in ("reward", "loss", "kl", "entropy", "grad_norm", "completion_length", "mismatch_max"):
            assert our[name] == pytest.approx(their[name], rel=tolerance, abs=1e-5), name


def test_in_fp32_it_is_the_run_on_the_cpu(workplace):
    options = ("--model.precision=fp32", "--batch.layout=padded", "--impl=torch")
    expected = run("cpu", *options)
    with ghost_cuda() as device:
        found = run("cuda", *options)
    assert device.waits["a copy between devices"] > 0
    assert_close(found, expected)
    before_ampere = {"get_device_capability": lambda *args: (7, 5), "is_bf16_supported": lambda **options: False}
    with ghost_cuda(), mock.patch.multiple(torch.cuda, **before_ampere):
        assert_close(run("old"), expected)  # which takes the same options by itself


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(("--prompt.shots=2",), id="default"),  # with which all prompts begin alike
        pytest.param(
            ("--model.reference-offload", "--model.gradient-checkpointing", "--batch.tokens-per-micro-batch=128"),
            id="little memory",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--batch.layout=padded", "--objective.entropy-bonus=0.01", "--objective.ref-refresh-every=1"),
            id="padded",
            marks=pytest.mark.slow,
        ),
        pytest.param(("--objective.preset=gspo", "--batch.minibatches=2", "--batch.passes=2"), id="whole sequences"),
        pytest.param(("--rollout.max-sequences=6", "--rollout.kv-gib=0.001", "--deterministic"), id="turns"),
    ],
)
def test_in_bf16_the_sampler_and_the_training_forward_agree(workplace, request, changes):
    name = request.node.callspec.id.replace(" ", "_")
    try:
        with ghost_cuda() as device:
            rows = run(name, "--impl=torch", *changes)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(row["mismatch"] < 0.02 and row["grad_norm"] > 0.1 for row in rows)
    # Decoding 14 tokens asks once in 8 steps which rows live: no token waits for the device.
    assert device.waits["_local_scalar_dense"] < 20 * len(rows)


def test_adapters_go_on_from_their_checkpoint_with_the_same_bits(workplace):
    with ghost_cuda():
        run("whole", "--impl=torch", "--save-every=1", config="gsm8k_lora", steps=2)
        shutil.copytree("whole", "half")
        shutil.rmtree("half/checkpoints/step_2")
        assert train.main(["--resume", "half", "--num-steps=2"]) == 0
    ours, theirs = (rows_without_clock(Path(name)) for name in ("half", "whole"))
    assert len(ours) == 2 and ours == theirs


def test_the_sampler_captures_triton_kernels_and_draws_the_same(device):
    model = tiny_qwen2(hidden_size=64).to(
        CUDA
    )  # heads of 16: the least of the kernels; fp32: interpreted, bf16 is garbage
    rollout = RolloutConfig(group_size=2, max_new_tokens=5, max_sequences=4, prefill_tokens=64)
    problems = [Problem(id=str(i), question="", answer="", index=i, prompt_ids=(2 + i, 3, 4)) for i in range(2)]
    drawn = {}
    for impl in ("torch", "triton"):
        sampler = Sampler(model, word_tokenizer(), rollout, stop=(), seed=0, impl=impl)
        drawn[impl] = [completion for group in sampler.generate(problems, 0) for completion in group.completions]
        assert sampler._kept[1].replays  # it ran by its graph
    assert {"attend_prefix", "attend_suffix", "weigh_tiles", "pick"} == set(device.launches)
    for ours, theirs in zip(drawn["triton"], drawn["torch"], strict=True):
        assert ours.ids == theirs.ids and ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_rows_stop_while_the_device_is_kept_busy(device, monkeypatch):
    """Except where rows are rescheduled, the host waits only for copies that were asked for eight steps ago."""
    model, made = tiny_model("qwen2"), problems(9, 20, 4)
    options = dict(tokenizer=syllable_tokenizer(), max_new_tokens=40, group_size=1)
    free = sampler(model, **options).generate(made, step=0)
    options["stop"] = tuple(group.completions[0].text[4:7] for group in free)  # three letters: never one token
    expected = [group.completions for group in sampler(model, **options).generate(made, step=0)]
    steps, begun, applied, waits = [], [], [], Counter()

    class Watched(RolloutLoop):
        def _look(self, steps_before):
            begun.append(len(steps))
            return super()._look(steps_before)

        def _apply_look(self, look):
            applied.append(len(steps))
            before = Counter(device.waits)
            live = super()._apply_look(look)
            waits.update(device.waits - before)
            return live

    monkeypatch.setattr(engine, "RolloutLoop", Watched)
    on_device = sampler(tiny_model("qwen2").to(CUDA), **options)
    on_device.generate(made[:1], step=0)  # its graph is there from here on
    run = Graphs.__call__
    monkeypatch.setattr(Graphs, "__call__", lambda graphs, layout: (steps.append(1), run(graphs, layout))[1])
    begun.clear(), applied.clear(), waits.clear()
    found = [group.completions for group in on_device.generate(made, step=0)]
    assert [[c.ids for c in group] for group in found] == [[c.ids for c in group] for group in expected]
    assert {c.finish for group in found for c in group} == {"stop"}
    assert waits == {"synchronize": len(applied)} and applied[0] == begun[0] + 8
    assert len(steps) == 16  # three letters that begin at the fifth are there at the first look, applied at the second


@pytest.mark.slow
def test_a_run_by_triton_kernels_is_the_run_without_them(workplace):
    save_tiny_model(workplace / "wide", context=1024, hidden_size=64)
    small = ("--model.path=wide", "--rollout.prompts-per-step=1", "--rollout.max-new-tokens=3", "--eval.every=9")
    fp32 = ("--model.precision=fp32", "--batch.layout=padded", "--eval.test-problems=1", "--rollout.group-size=2")
    with ghost_cuda():
        expected = run("torch", *small, *fp32, "--impl=torch", steps=1)
    with ghost_cuda() as device:
        found = run("triton", *small, *fp32, steps=1)
    assert_close(found, expected)
    sampling = {"attend_prefix", "attend_suffix", "weigh_tiles", "pick"}
    assert set(device.launches) == sampling | {"row_statistics", "row_gradients"}


def test_eval_scores_a_checkpoint_on_it(workplace):
    with ghost_cuda():
        arguments = ["--model", "model", "--task", "gsm8k", "--data", "data", "--shots", "0", "2", "--limit", "2"]
        arguments += ["--max-new-tokens", "8"]
        assert evaluation.main([*arguments, "--output", "scores.json"]) == 0
    assert (workplace / "scores.json").is_file()
