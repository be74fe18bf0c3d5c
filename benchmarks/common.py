"""What the benchmarks share: the device, the option parser, and what the last line says of where they ran."""

from __future__ import annotations

import argparse

import torch

from grpo.metrics import machine
from kernels.measure import device_name

CPU = torch.device("cpu")


def qwen_shape(layers: int, width: int, mlp_width: int, heads: int, vocabulary: int) -> dict[str, int]:
    """Config of a Qwen2 with two key-value heads, by transformers' names."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
    }


QWEN_HALF_B = qwen_shape(24, 896, 4864, 14, 151_936)


def default_device() -> torch.device:
    """CUDA where there is any."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows a module's docstring as it is."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def measured_on(device: torch.device = CPU) -> dict[str, object]:
    """Hardware, versions and commit."""
    facts = {"device": device_name(device), **machine()}
    if device.type == "cuda":
        facts["memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    return facts
