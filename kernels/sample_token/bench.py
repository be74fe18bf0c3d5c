"""Drawing a token for every row: python -m kernels.sample_token.bench

The reference, the Triton kernels (on CUDA) and torch.multinomial with log-probs, which does not invert the cumulative
distribution exactly and cannot be given the random number.
"""

from __future__ import annotations

import torch
from torch import Tensor

import kernels
from kernels.measure import alternate, run_bench, show

SHAPES = {"cpu": [(32, 8_192), (8, 151_936)], "cuda": [(256, 151_936), (64, 151_936), (8, 151_936)]}  # rows, vocabulary


def multinomial(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = torch.log_softmax(logits.float(), -1)
    token = torch.multinomial(log_probs.exp(), 1)
    return token[:, 0], log_probs.gather(1, token)[:, 0]


def measure(shape: tuple[int, int], device: torch.device, repeats: int) -> dict[str, object]:
    """Times of every contender, printed and returned, and the share of tokens that equal the reference's."""
    rows, vocabulary = shape
    logits = torch.randn(rows, vocabulary, device=device) * 3
    logits = logits.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    uniforms = torch.rand(rows, dtype=torch.float64, device=device)
    options = dict(temperature=1.0, top_p=1.0, top_k=0)
    ours = lambda impl: lambda: kernels.sample_token(logits, uniforms, impl=impl, **options)
    contenders = {"reference": ours("torch"), "multinomial": lambda: multinomial(logits)}
    same = {}
    if device.type == "cuda":
        contenders["triton"] = ours("triton")
        same["triton"] = (ours("triton")()[0] == ours("torch")()[0]).float().mean().item()
    taken = alternate(contenders, device, repeats)
    show(f"{rows} rows, {vocabulary:,} tokens", taken, logits.nbytes)
    sizes = {"rows": rows, "vocabulary": vocabulary}
    return {"shape": sizes, "bytes": logits.nbytes, "milliseconds": taken, "same_tokens": same}


if __name__ == "__main__":
    run_bench(__doc__, "sample_token", SHAPES, measure)
