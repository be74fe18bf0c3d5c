"""The candidate of benchmarks/attention.py, with flash attention as tests/ghost_cuda.py plays it."""

import pytest
import torch

from benchmarks import attention
from grpo.attention import merged_parts
from tests import ghost_cuda

CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [(40, 2, 8, 3, 20), (0, 3, 9, 4, 7), (33, 1, 5, 2, 5), (0, 1, 3, 1, 1)])
@pytest.mark.parametrize("rows_together", [4096, 16])
def test_the_cascade_is_the_attention_of_packed_rows_forward_and_backward(sizes, rows_together, monkeypatch):
    monkeypatch.setattr(attention, "flash_forward", ghost_cuda._flash_forward)
    monkeypatch.setattr(attention, "flash_backward", ghost_cuda._flash_backward)
    monkeypatch.setattr(attention, "ROWS_TOGETHER", rows_together)
    layout = attention.make_layout(*sizes, CPU)
    torch.manual_seed(0)
    draw = lambda heads: torch.randn(1, heads, len(layout.group), 16, dtype=torch.bfloat16)
    tensors, gradient = [draw(heads).requires_grad_() for heads in (4, 2, 2)], draw(4)
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    truth = attention.run_once(merged_parts, exact, gradient.float(), layout)
    rounded = attention.errors(attention.run_once(merged_parts, tensors, gradient, layout), truth)
    found = attention.errors(attention.run_once(attention.cascade, tensors, gradient, layout), truth)
    assert all(error < 2 * other + 2e-3 for error, other in zip(found, rounded, strict=True)), (found, rounded)
    assert max(found) < 1e-2
