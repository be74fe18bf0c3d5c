"""The layouts that benchmarks/train_step.py times against each other compute the same thing."""

from __future__ import annotations

import torch

from benchmarks.train_step import forward_backward, gradient, make_group, make_model, make_variants


def test_every_layout_gives_the_same_log_probs_and_gradient():
    model = make_model(torch.device("cpu"))
    variants = make_variants(model, make_group(20, 3, model.config.vocab_size, 4, 9), torch.device("cpu"))
    expected, expected_gradient = forward_backward(model, variants.pop("padded")), gradient(model)
    assert len(variants) == 3
    for work in variants.values():
        assert torch.allclose(forward_backward(model, work), expected, rtol=0, atol=2e-5)
        assert (gradient(model) - expected_gradient).norm() < 5e-6 * expected_gradient.norm()
