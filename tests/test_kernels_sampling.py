"""sample_token, reference and Triton kernel (interpreted on CPU), against hand-worked numbers; the dispatch table."""

import logging
import math
import os

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

import kernels  # noqa: E402
from kernels.sample_token import kernel  # noqa: E402
from kernels.sample_token.reference import truncate  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
IMPLS = pytest.mark.parametrize("impl", ["torch", "triton"])


def sample(logits, uniforms, *, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, impl="auto"):
    logits, uniforms = logits.to(DEVICE), torch.as_tensor(uniforms, dtype=torch.float64, device=DEVICE)
    options = dict(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    drawn = kernels.sample_token(logits, uniforms, **options, impl=impl)
    return drawn[0].cpu(), drawn[1].cpu()


@triton.jit
def call_first_above(weights, threshold, index, before, SIZE: tl.constexpr):
    found, running = kernel._first_above(tl.load(weights + tl.arange(0, SIZE)), tl.load(threshold), SIZE)
    tl.store(index, found)
    tl.store(before, running)


def draw(probs, uniforms, **options):
    """Tokens and log-probs for one distribution and many uniforms."""
    token, logprob = sample(torch.tensor(probs).log().expand(len(uniforms), -1), uniforms, **options)
    return token.tolist(), logprob.tolist()


@IMPLS
def test_a_uniform_picks_the_token_whose_share_of_the_cdf_it_falls_into(impl):
    token, logprob = draw([0.1, 0.2, 0.3, 0.4], [0.05, 0.25, 0.35, 0.59, 0.61, 0.999], impl=impl)
    assert token == [0, 1, 2, 2, 3, 3]
    assert logprob == pytest.approx([math.log(p) for p in (0.1, 0.2, 0.3, 0.3, 0.4, 0.4)], abs=1e-6)
    assert draw([0.5, 0.5], [0.5 - 1e-12, 0.5], impl=impl)[0] == [0, 1]  # the border belongs to the token above it


@IMPLS
def test_temperature_one_half_squares_the_odds_and_the_log_prob_says_so(impl):
    # p = [1/4, 3/4] at T = 1/2 becomes [1, 9] / 10.
    token, logprob = draw([0.25, 0.75], [0.09, 0.11], temperature=0.5, impl=impl)
    assert token == [0, 1]
    assert logprob == pytest.approx([math.log(0.1), math.log(0.9)], abs=1e-6)


def test_top_k_keeps_the_k_most_likely_and_log_probs_are_renormalised():
    token, logprob = draw([0.1, 0.2, 0.3, 0.4], [0.01, 0.42, 0.44], top_k=2)  # 3/7, 4/7
    assert token == [2, 2, 3]
    assert logprob == pytest.approx([math.log(3 / 7), math.log(3 / 7), math.log(4 / 7)], abs=1e-6)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probs = [0.05, 0.5, 0.15, 0.3]
    token, logprob = draw(probs, [0.0001, 0.62, 0.63, 0.9999], top_p=0.75)  # 0.5 + 0.3: 5/8, 3/8
    assert token == [1, 1, 3, 3]
    assert logprob == pytest.approx([math.log(5 / 8)] * 2 + [math.log(3 / 8)] * 2, abs=1e-6)
    assert set(draw(probs, [0.01, 0.3, 0.6, 0.99], top_p=0.85)[0]) == {1, 2, 3}
    assert set(draw(probs, [0.01, 0.3, 0.6, 0.99], top_p=0.01)[0]) == {1}


def test_top_p_applies_to_what_top_k_left():
    # top_k=2 leaves 4/7 and 3/7; 4/7 alone reaches 0.5, though 0.4 of the whole does not.
    assert set(draw([0.1, 0.2, 0.3, 0.4], [0.01, 0.5, 0.99], top_k=2, top_p=0.5)[0]) == {3}


def test_min_p_keeps_what_is_at_least_that_share_of_the_most_likely():
    token, logprob = draw([0.1, 0.21, 0.29, 0.4], [0.01, 0.23, 0.25, 0.55, 0.56, 0.99], min_p=0.5)  # 0.21, 0.29, 0.4
    assert token == [1, 1, 2, 2, 3, 3]
    assert logprob == pytest.approx([math.log(p / 0.9) for p in (0.21, 0.21, 0.29, 0.29, 0.4, 0.4)], abs=1e-6)
    assert set(draw([0.1, 0.2, 0.3, 0.4], [0.01, 0.5, 0.99], min_p=1.0)[0]) == {3}


def test_min_p_looks_at_tempered_probabilities_and_after_top_k_and_top_p():
    # At T = 2 the square roots of 0.04, 0.32, 0.64 count: 0.2 / 0.8 = 0.25 stays, though 0.04 / 0.64 would not.
    assert set(draw([0.04, 0.32, 0.64], [0.01, 0.4, 0.99], temperature=2.0, min_p=0.24)[0]) == {0, 1, 2}
    assert set(draw([0.04, 0.32, 0.64], [0.01, 0.4, 0.99], temperature=2.0, min_p=0.24, top_k=2)[0]) == {1, 2}


def test_equal_logits_never_make_top_k_keep_more_than_k():
    kept = truncate(torch.zeros(1, 7), top_p=1.0, top_k=3).isfinite()
    assert kept.tolist() == [[True] * 3 + [False] * 4]


@IMPLS
def test_greedy_takes_the_argmax_and_its_log_prob_under_the_whole_untempered_distribution(impl):
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.6, 0.2, 0.1, 0.1]]).log()
    token, logprob = sample(logits, [0.3, 0.9], temperature=0.0, top_p=0.1, top_k=1, impl=impl)
    assert token.tolist() == [3, 0]
    assert logprob.tolist() == pytest.approx([math.log(0.4), math.log(0.6)], abs=1e-6)


def test_evenly_spaced_uniforms_reproduce_the_distribution():
    probs = torch.softmax(torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2, 0)
    count = 20_000
    token, _ = draw(probs.tolist(), ((torch.arange(count) + 0.5) / count).tolist())
    share = torch.bincount(torch.tensor(token), minlength=50) / count
    assert (share - probs).abs().max() <= 1.5 / count  # each border lies between two neighbours of the grid


@IMPLS
def test_tokens_of_probability_zero_are_never_drawn(impl):
    token, _ = draw([0.0, 0.5, 0.0, 0.5, 0.0], [1e-16, 0.4999999, 0.5000001, 1 - 2.0**-53], impl=impl)
    assert token == [1, 1, 3, 3]


@IMPLS
def test_the_tail_of_a_large_vocabulary_is_reached_token_by_token(impl):
    # 149,999 tokens share 1e-4. Each adds 7e-10 to a sum near 1, where fp32 numbers lie 6e-8 apart.
    logits = torch.full((1, 150_000), math.log(1e-4 / 149_999))
    logits[:, 0] = math.log(1 - 1e-4)
    uniforms = 1 - 5e-5 + torch.arange(12, dtype=torch.float64) * 1e-4 / 149_999
    token, _ = sample(logits.expand(12, -1), uniforms, impl=impl)
    assert token.diff().tolist() == [1] * 11
    assert abs(token[0].item() - 75_000) < 200  # fp32 weights themselves move borders by about 1e-7


def borders(logits, token, temperature):
    """The cumulative distribution in fp64 before and after each token: [B], [B]."""
    cdf = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    after = cdf.gather(-1, token[:, None])[:, 0]
    return torch.where(token > 0, cdf.gather(-1, (token - 1).clamp_min(0)[:, None])[:, 0], 0.0), after


@pytest.mark.parametrize(
    "vocabulary, temperature", [(1, 1.0), (17, 0.7), (127, 1.0), (129, 1.3), (4097, 0.7), (9000, 1.0)]
)
def test_the_kernel_draws_the_references_tokens(vocabulary, temperature):
    rows = 40
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    uniforms = torch.rand(rows, generator=generator, dtype=torch.float64)
    token, logprob = sample(logits, uniforms, temperature=temperature, impl="triton")
    expected, expected_logprob = sample(logits, uniforms, temperature=temperature, impl="torch")
    before, after = borders(logits, token, temperature)
    assert (before - 1e-6 < uniforms).all() and (uniforms < after + 1e-6).all()
    # On CPU the seeds leave every uniform farther from a border than rounding reaches; another exp rounds elsewhere.
    assert (token != expected).sum() <= (DEVICE == "cuda")
    logprob, expected_logprob = logprob[token == expected], expected_logprob[token == expected]
    assert (logprob - expected_logprob).abs().max() < 3e-6


def test_the_kernel_reads_half_precision_and_rows_of_a_wider_tensor():
    logits = torch.randn(5, 3, 300, generator=torch.Generator().manual_seed(1)).half()[:, -1, :290]
    uniforms = torch.linspace(0.05, 0.95, 5, dtype=torch.float64)
    token, logprob = sample(logits, uniforms, impl="triton")
    expected, expected_logprob = sample(logits.float(), uniforms, impl="torch")
    assert torch.equal(token, expected)
    assert (logprob - expected_logprob).abs().max() < 3e-6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_barred_with_minus_infinity_may_fill_whole_tiles_of_the_kernel(temperature):
    logits = torch.full((3, 9000), -math.inf)
    logits[0, 5000], logits[1, 8999], logits[2, 0] = 1.0, -40.0, 0.0
    token, logprob = sample(logits, [1e-17, 0.5, 1 - 2.0**-53], temperature=temperature, impl="triton")
    assert token.tolist() == [5000, 8999, 0]
    assert logprob.abs().max() < 1e-6


@IMPLS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_give_a_token_that_exists_and_a_log_prob_that_tells(impl, temperature, bad):
    logits = torch.zeros(2, 4500)
    logits[0, 3] = bad
    token, logprob = sample(logits, [0.5, 0.5], temperature=temperature, impl=impl)
    assert 0 <= token[0] < 4500 and not logprob[0].isfinite()
    assert logprob[1].item() == pytest.approx(-math.log(4500), abs=1e-5)


def test_the_kernel_takes_the_first_of_equal_maxima():
    logits = torch.zeros(1, 5000)
    logits[0, [4100, 4200]] = 1.0
    assert sample(logits, [0.9], temperature=0.0, impl="triton")[0].tolist() == [4100]


@pytest.mark.parametrize(
    "threshold, found, before",
    [(0.0, 1, 0.0), (0.25, 3, 0.25), (0.9, 3, 0.25), (-1e-18, 1, 0.0), (1.0, 3, 0.25), (1.0 + 1e-9, 3, 0.25)],
)
def test_where_rounding_leaves_the_sums_the_kernel_still_finds_a_token_that_has_a_weight(threshold, found, before):
    weights = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64, device=DEVICE)
    thresholds = torch.tensor([threshold], dtype=torch.float64, device=DEVICE)
    index, running = torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.zeros_like(thresholds)
    call_first_above[(1,)](weights, thresholds, index, running, SIZE=8)
    assert (index.item(), running.item()) == (found, before)


def test_the_kernel_names_what_it_cannot_read_or_cut():
    off = dict(temperature=1.0, top_p=1.0, top_k=0)
    logits = torch.zeros(4, 5)
    assert kernel.obstacle(logits, **off) is None and kernel.obstacle(logits, **off | {"top_k": 5}) is None
    assert kernel.obstacle(logits, **off | {"top_k": 4, "temperature": 0.0}) is None
    assert "top_k=4" in kernel.obstacle(logits, **off | {"top_k": 4})
    assert kernel.obstacle(logits.double(), **off) == "the kernel does not support logits of torch.float64"
    assert "must be contiguous" in kernel.obstacle(logits.T, **off)


def test_auto_resolves_to_torch_on_a_cpu_and_says_why():
    table = kernels.dispatch_table("auto", "cpu")
    assert set(table) == set(kernels.OPS)
    assert all(choice.impl == "torch" and "Triton" in choice.why for choice in table.values())


def test_triton_on_a_cpu_is_refused_unless_interpreted(monkeypatch):
    assert kernels.resolve("sample_token", "torch", "cpu").why == "asked for"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.resolve("sample_token", "triton", "cpu").impl == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="impl=triton: Triton kernels need a CUDA device, not cpu; use impl=auto"):
        kernels.resolve("sample_token", "triton", "cpu")
    with pytest.raises(ValueError, match="impl='cuda' is not one of auto, torch, triton"):
        kernels.resolve("sample_token", "cuda", "cpu")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"gcc": None, "clang": None}, "need a C compiler, and none was found: install gcc, or set CC to one"),
        ({"include": "/nowhere"}, "need Python.h, which is not in /nowhere: install python3-dev"),
        ({"include": "/nowhere", "CPATH": "/somewhere"}, None),
        ({"gcc": None, "clang": None, "CC": "/opt/cc"}, None),
    ],
)
def test_where_no_launcher_can_be_built_a_device_gets_torch_and_a_word(found, message, monkeypatch, caplog, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(kernels.shutil, "which", lambda name: found.get(name, f"/usr/bin/{name}"))
    monkeypatch.setattr(kernels.sysconfig, "get_path", lambda *_: found.get("include", str(tmp_path)))
    monkeypatch.setattr(kernels.torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.setitem(os.environ, name, found.get(name, ""))
    for function in (kernels.missing_to_launch, kernels._log_once):
        function.cache_clear()
    choices = [kernels.resolve(op, "auto", "cuda") for op in kernels.OPS]
    kernels.missing_to_launch.cache_clear()
    assert {choice.impl for choice in choices} == {"torch" if message else "triton"}
    expected = [f"kernels run in torch, which is slower: Triton kernels {message}"] if message else []
    assert [record.message for record in caplog.records] == expected


def test_truncation_goes_to_torch_and_is_said_once_or_refused(monkeypatch, caplog):
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    with pytest.raises(ValueError, match="impl=triton: sample_token: top_p=1.0, top_k=2.* kernel does not support"):
        sample(logits, [0.42], top_k=2, impl="triton")
    monkeypatch.setattr(kernels, "_obstacle", lambda op, impl, device: None)  # as on a CUDA device
    with caplog.at_level(logging.WARNING):
        tokens = [sample(logits, [0.42], top_k=2, impl="auto")[0].item() for _ in range(2)]
    assert tokens == [2, 2]
    assert [record.message for record in caplog.records] == [
        "sample_token runs in torch: top_p=1.0, top_k=2, min_p=0.0: the kernel does not support top-k, top-p and min-p"
    ]
