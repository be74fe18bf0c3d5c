"""The lines that run on CUDA only, run here: bf16 matmuls that leave fp32 behind, their transposes and places.

On a device `make gpu` tests the same with the real ones.
"""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

import kernels
from kernels.decode_attention.reference import attend
from kernels.linear_logprob import modes
from tests.ghost_cuda import matmul_to
from tests.test_linear_logprob import naive

MATMULS = (torch.mm, torch.bmm, torch.addmm)


class AsOnCuda(TorchFunctionMode):
    """Tensors call themselves CUDA's; a matmul with `out_dtype`, which CUDA alone has, obeys CUDA's rules."""

    calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function in MATMULS and "out_dtype" in kwargs:
            self.calls += 1
            return matmul_to(function, *args, kwargs.pop("out_dtype"), **kwargs)
        return function(*args, **kwargs)


@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("is_folded", [True, False], ids=["folded", "any loss"])
def test_the_head_in_bf16_is_as_exact_as_its_operands_allow(is_folded, is_frozen, monkeypatch):
    monkeypatch.setattr(modes, "CHUNK_ELEMENTS", {"cpu": 3 * 129})  # the last chunk is smaller
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 24, generator=generator).bfloat16() for size in (7, 129))
    target, scale = torch.randint(0, 129, (7,), generator=generator), torch.linspace(-1, 1, 7)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_(not is_frozen)]
    expected = naive(*exact, target, temperature=0.7)
    (scale * expected[0].exp()).sum().backward()

    leaves = [hidden.requires_grad_(), weight.requires_grad_(not is_frozen)]
    with AsOnCuda() as cuda:
        if is_folded:
            loss_of = lambda logprobs, entropy, rows: scale[rows] * logprobs.exp()
            loss, *found = kernels.linear_logprob_loss(*leaves, target, loss_of, temperature=0.7, impl="torch")
        else:
            found = kernels.linear_logprob(*leaves, target, temperature=0.7, impl="torch")
            loss = (scale * found[0].exp()).sum()
        loss.backward()
    assert cuda.calls >= 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).abs().max() < 1e-5  # fp32 logits
    for leaf, double in zip(leaves, exact, strict=True):
        assert (leaf.grad is None) == (double.grad is None)
        if leaf.grad is not None:
            assert (leaf.grad - double.grad).norm() < 5e-3 * double.grad.norm()


def test_the_scores_of_decoding_are_fp32_whatever_the_keys_are():
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    tensors = [
        4 * normal(4, 4, 16),
        (normal(2, 2, 9, 16), normal(2, 2, 9, 16)),
        (normal(4, 2, 5, 16), normal(4, 2, 5, 16)),
    ]
    rounded = [tensors[0].bfloat16(), *(tuple(x.bfloat16() for x in pair) for pair in tensors[1:])]
    wide = [rounded[0].double(), *(tuple(x.double() for x in pair) for pair in rounded[1:])]
    lengths = {"prefix_lengths": torch.tensor([9, 9, 3, 3]), "suffix_lengths": torch.tensor([5, 1, 2, 5])}
    options = {"seats": 2, "seat_index": torch.arange(4), "scale": 0.5, **lengths}
    with AsOnCuda() as cuda:
        found = attend(*rounded, **options)
    assert cuda.calls == 2 and found.dtype == torch.bfloat16
    assert (found - attend(*wide, **options)).abs().max() < 0.02
