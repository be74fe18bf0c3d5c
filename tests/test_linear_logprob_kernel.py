"""The Triton head against fp64: compiled where there is a GPU, interpreted elsewhere.

The interpreter multiplies the bit patterns of bf16, so bf16 is for the GPU; its matmul of fp32 would be TF32, so fp32
is for the interpreter.
"""

import pytest
import torch

pytest.importorskip("triton")

import kernels  # noqa: E402
from kernels.linear_logprob import kernel, modes  # noqa: E402
from kernels.linear_logprob.rows import TORCH, LogitTransform, RowOps  # noqa: E402
from tests.test_linear_logprob import naive  # noqa: E402

HAS_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if HAS_GPU else []
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = [torch.bfloat16, torch.float16] if HAS_GPU else [torch.float32, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of a gradient stored in it, relative
TRITON = RowOps(kernel.statistics, kernel.gradients)
# rows, width, vocabulary: off every block edge; the last needs two spans
SHAPES = [(1, 17, 129), (127, 96, 127), (129, 64, kernel.SPAN + 1)]
TRANSFORMS = [LogitTransform(1.0), LogitTransform(0.7, softcap=5.0)]
# A GPU compiles for each of them, and has two minutes for all its tests; logits are kept of 16-bit heads alone.
KEPT_SHAPES, KEPT_DTYPES = (SHAPES[-1:], DTYPES[:1]) if HAS_GPU else (SHAPES, DTYPES[1:])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def targets(num_rows, vocabulary):
    """Random, with both ends of the vocabulary."""
    target = torch.randint(0, vocabulary, (num_rows,), generator=torch.Generator().manual_seed(1))
    target[0], target[-1] = 0, vocabulary - 1
    return target.to(DEVICE)


def new_buffer(num_rows, vocabulary):
    """For logits to be kept; what nobody writes must not matter."""
    return torch.full((num_rows, vocabulary), torch.nan, dtype=torch.float16, device=DEVICE)


def worst(found, exact):
    return (found.double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "transform, has_bias", [(TRANSFORMS[0], False), (TRANSFORMS[1], True)], ids=["plain", "cap and bias"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fused_forward_is_as_exact_as_fp32(shape, transform, has_bias, dtype):
    num_rows, width, vocabulary = shape
    hidden, weight = random(num_rows, width, dtype=dtype), 0.3 * random(vocabulary, width, seed=1, dtype=dtype)
    bias = random(vocabulary, seed=2, dtype=dtype) if has_bias else None
    target = targets(num_rows, vocabulary)
    double, single = (
        naive(
            hidden.to(to),
            weight.to(to),
            target,
            temperature=transform.temperature,
            softcap=transform.softcap,
            bias=bias if bias is None else bias.to(to),
        )
        for to in (torch.float64, torch.float32)
    )
    found = kernel.fused(hidden, weight, bias, target, transform, None)
    for ours, exact, of_torch in zip(found[:2], double, single, strict=True):
        assert worst(ours, exact) <= worst(of_torch, exact) + 4e-6


def test_a_row_is_the_same_to_the_bit_alone_in_company_and_where_its_logits_are_kept():
    dtype = DTYPES[1]
    hidden, weight, target = random(129, 64, dtype=dtype), random(kernel.SPAN + 1, 64, dtype=dtype), targets(129, 300)
    together = kernel.fused(hidden, weight, None, target, TRANSFORMS[0], None)[:2]
    again = kernel.fused(hidden, weight, None, target, TRANSFORMS[0], new_buffer(129, len(weight)))[:2]
    alone = kernel.fused(hidden[128:], weight, None, target[128:], TRANSFORMS[0], None)[:2]
    for a, b, c in zip(together, again, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[128:], c)


@pytest.mark.parametrize("dtype", KEPT_DTYPES, ids=str)
@pytest.mark.parametrize("has_entropy", [False, True], ids=["log-prob", "and entropy"])
@pytest.mark.parametrize(
    "transform, has_bias, offset",  # a cap leaves no logit large
    [(TRANSFORMS[0], False, 0.0), (TRANSFORMS[0], False, 900.0), (TRANSFORMS[1], True, 0.0)],
    ids=["plain", "large", "cap and bias"],
)
@pytest.mark.parametrize("shape", KEPT_SHAPES, ids=str)
def test_the_fused_forward_keeps_what_makes_the_logit_gradients(shape, offset, transform, has_bias, has_entropy, dtype):
    """As exact as their own dtype, also where all logits are large: fp16 would tell 900 from 900.5, but no nearer."""
    num_rows, width, vocabulary = shape
    hidden, weight = random(num_rows, width, dtype=dtype), 0.5 * random(vocabulary, width, seed=1, dtype=dtype)
    hidden[:, 0], weight[:, 0] = offset / 30, 30  # the same for every token
    bias = random(vocabulary, seed=2, dtype=dtype) if has_bias else None
    target, (by_logprob, by_entropy) = targets(num_rows, vocabulary), random(2, num_rows, seed=3)
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    exact = logits.requires_grad_()
    eye = torch.eye(vocabulary, device=DEVICE, dtype=torch.float64)
    logprobs, entropy = naive(exact, eye, target, **transform._asdict())
    loss = by_logprob * logprobs + (by_entropy * entropy if has_entropy else 0)
    (expected,) = torch.autograd.grad(loss.sum(), exact)

    found = kernel.fused(hidden, weight, bias, target, transform, new_buffer(num_rows, vocabulary))
    gradient = kernel.gradients(found, target, transform, by_logprob, by_entropy if has_entropy else None, dtype)
    assert gradient.dtype == dtype and gradient.data_ptr() == found.saved[0].data_ptr()
    assert worst(gradient, expected) <= 2 * ROUNDING[dtype] * expected.abs().max().item() + 1e-6
    # At its target a gradient may nearly cancel, g (1 - p): there it must be right in itself. A cap's slope is not.
    if not (has_entropy or transform.softcap):
        rows = torch.arange(num_rows, device=DEVICE)
        ours, theirs = gradient[rows, target].double(), expected[rows, target]
        assert ((ours - theirs).abs() <= 2 * ROUNDING[dtype] * theirs.abs() + 1e-5).all()


@pytest.mark.parametrize("implementation", [TRITON, TORCH], ids=["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, DTYPES[1]], ids=str)
@pytest.mark.parametrize("has_entropy", [False, True], ids=["log-prob", "and entropy"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "cap"])
@pytest.mark.parametrize("vocabulary", [1, 129, kernel.ROW_BLOCK["BLOCK"] + 3])
def test_rows_give_values_and_logit_gradients(vocabulary, transform, has_entropy, dtype, implementation):
    num_rows = 5
    logits, target = 3 * random(num_rows, vocabulary), targets(num_rows, vocabulary)
    by_logprob, by_entropy = random(2, num_rows, seed=3)
    exact = logits.double().requires_grad_()
    logprobs, entropy = naive(
        exact, torch.eye(vocabulary, device=DEVICE, dtype=torch.float64), target, **transform._asdict()
    )
    loss = by_logprob * logprobs + (by_entropy * entropy if has_entropy else 0)
    (expected,) = torch.autograd.grad(loss.sum(), exact)

    found = implementation.statistics(logits, target, transform)
    assert worst(found.logprobs, logprobs) < 5e-6 and worst(found.entropy, entropy) < 5e-6
    coefficients = by_logprob, by_entropy if has_entropy else None
    gradient = implementation.gradients(found, target, transform, *coefficients, dtype)
    assert gradient.dtype == dtype
    assert worst(gradient, expected) <= ROUNDING[dtype] * expected.abs().max().item() + 1e-6


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_large_and_very_negative_logits_keep_their_precision(offset):
    logits = torch.tensor([[0.5, 1.0, -2.0], [0.0, 0.0, 0.0], [-1e4, 0.0, 1e4]], device=DEVICE)
    logits[:2] += offset
    target = torch.tensor([1, 2, 0], device=DEVICE)
    exact = torch.log_softmax(logits.double(), -1)
    found = kernel.statistics(logits.clone(), target, TRANSFORMS[0])
    # logits are scaled by log2(e) in fp32: 1e4 keeps 2e-3 of absolute precision
    assert worst(found.logprobs[:2], exact[[0, 1], [1, 2]]) < (1e-6 if offset == 0 else 2e-3)
    assert found.logprobs[2].item() == pytest.approx(-2e4, rel=1e-6)
    assert worst(found.entropy, -(exact.exp() * exact).sum(-1)) < (1e-6 if offset == 0 else 2e-3)
    gradient = kernel.gradients(found, target, TRANSFORMS[0], torch.ones(3, device=DEVICE), None, torch.float32)
    assert gradient.isfinite().all() and gradient[2].tolist() == [1.0, 0.0, -1.0]


def test_a_target_outside_the_vocabulary_or_a_nan_logit_gives_nan_in_its_row_only():
    dtype = DTYPES[1]
    hidden, weight = random(4, 16, dtype=dtype), random(40, 16, dtype=dtype)
    hidden[2, 3] = float("nan")
    target = torch.tensor([0, 40, 5, 39], device=DEVICE)
    logits = hidden.float() @ weight.float().T
    for logprobs in (
        kernel.fused(hidden, weight, None, target, TRANSFORMS[0], None).logprobs,
        kernel.statistics(logits, target, TRANSFORMS[0]).logprobs,
    ):
        assert logprobs.isnan().tolist() == [False, True, True, False]


def test_tokens_barred_with_minus_infinity_may_fill_whole_tiles_of_the_kernel():
    dtype, columns = KEPT_DTYPES[0], kernel.TILE["BLOCK_COLUMNS"]
    hidden, weight = random(3, 16, dtype=dtype), random(4 * columns, 16, seed=1, dtype=dtype)
    target = torch.tensor([2 * columns - 1, 300, 300], device=DEVICE)
    bias = torch.zeros(4 * columns, dtype=dtype, device=DEVICE)
    bias[: 2 * columns - 1] = bias[-5:] = -torch.inf
    exact = torch.log_softmax(hidden.double() @ weight.double().T + bias.double(), -1)
    found = kernel.fused(hidden, weight, bias, target, TRANSFORMS[0], new_buffer(3, 4 * columns))
    assert worst(found.logprobs, exact[[0, 1, 2], target]) < 5e-6
    expected = torch.nn.functional.one_hot(target, 4 * columns) - exact.exp()
    gradient = kernel.gradients(found, target, TRANSFORMS[0], torch.ones(3, device=DEVICE), None, dtype)
    assert worst(gradient, expected) <= 2 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES[:1] if HAS_GPU else DTYPES, ids=str)
@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "trained"])
def test_every_mode_gives_what_torch_gives(is_frozen, dtype, monkeypatch):
    """A, B or D, and C: the same autograd functions over the other rows; all agree on a log-prob, in fp16 too."""
    monkeypatch.setattr(modes, "CHUNK_ELEMENTS", {DEVICE.type: 3 * 129})
    monkeypatch.setattr(modes, "CHUNK_MULTIPLE", {DEVICE.type: 1})
    hidden, weight, target = random(7, 24, dtype=dtype), random(129, 24, seed=1, dtype=dtype), targets(7, 129)
    parameters = [hidden.requires_grad_()] + ([] if is_frozen else [weight.requires_grad_()])
    scale = torch.linspace(-1, 1, 7, device=DEVICE)

    def all_modes(impl):
        options = {"temperature": 0.7, "impl": impl}
        with torch.no_grad():
            results = [*kernels.linear_logprob(hidden, weight, target, **options)]
        logprobs, entropy = kernels.linear_logprob(hidden, weight, target, **options)
        results += [logprobs, entropy, *torch.autograd.grad((scale * logprobs.exp()).sum(), parameters)]
        logprobs, entropy = kernels.linear_logprob(hidden, weight, target, entropy_gradient=True, **options)
        results += torch.autograd.grad((scale * logprobs.exp() * entropy).sum(), parameters)
        loss_of = lambda logprobs, entropy, rows: scale[rows] * logprobs.exp() * entropy
        loss, *columns = kernels.linear_logprob_loss(hidden, weight, target, loss_of, entropy_gradient=True, **options)
        assert all(worst(results[i], mode[i].double()) < 2e-6 for mode in (results[2:], columns) for i in (0, 1))
        return [*results, loss, *columns, *torch.autograd.grad(loss, parameters)]

    for ours, of_torch in zip(all_modes("triton"), all_modes("torch"), strict=True):
        torch.testing.assert_close(ours, of_torch, rtol=10 * ROUNDING[dtype], atol=2 * ROUNDING[dtype])


def test_the_dispatch_names_what_it_chose_and_why():
    choice = kernels.resolve("linear_logprob", "auto", DEVICE)
    assert choice.impl == ("triton" if HAS_GPU else "torch")
    assert HAS_GPU or "CUDA" in choice.why
    assert kernel.obstacle(torch.zeros(1, dtype=torch.float64)) == "no kernel for torch.float64"
    with pytest.raises(ValueError, match="no kernel for torch.float64"):
        kernels.linear_logprob(
            random(2, 4, dtype=torch.float64),
            random(5, 4, dtype=torch.float64),
            targets(2, 5),
            temperature=1.0,
            impl="triton",
        )
