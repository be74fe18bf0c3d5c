"""The public ops and the one place that chooses how each is computed.

Every op is a folder: `reference.py` is its definition in plain PyTorch; a Triton kernel, where there is one, sits
beside it and is imported here only, once it is needed. `impl` travels as an argument: auto, torch or triton.
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.decode_attention import cpu as decode_attention_cpu
from kernels.decode_attention import reference as decode_attention_reference
from kernels.linear_logprob import modes
from kernels.linear_logprob.rows import TORCH, LogitTransform
from kernels.sample_token import reference as sample_token_reference

IMPLS = ("auto", "torch", "triton")
TRITON = {  # op: what its kernel leaves to torch
    "linear_logprob": "fp64 in torch",
    "decode_attention": "head widths other than 16, 32, 64, 128 and 256 in torch",
    "sample_token": "top-k, top-p and min-p in torch",
}
OPS = tuple(TRITON)

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """How an op will be computed (`torch` or `triton`) and why."""

    impl: str
    why: str


def resolve(op: str, impl: str, device: torch.device | str) -> Choice:
    """The implementation of `op` for `impl` on `device`. ValueError for an unknown impl, and if triton cannot run."""
    assert op in OPS, f"unknown op {op!r}; the ops are {OPS}"
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(IMPLS)}")
    if impl == "torch":
        return Choice("torch", "asked for")
    obstacle = _obstacle(op, impl, torch.device(device))
    if obstacle is None:
        return Choice("triton", TRITON[op])
    if impl == "triton":
        raise ValueError(f"impl=triton: {obstacle}; use impl=auto or impl=torch")
    if torch.device(device).type == "cuda":
        _log_once(f"kernels run in torch, which is slower: {obstacle}")
    return Choice("torch", obstacle)


def _obstacle(op: str, impl: str, device: torch.device) -> str | None:
    """Why no Triton kernel can compute `op` on `device`, or None."""
    if not _has_triton():
        return "triton is not installed"
    if device.type == "cpu" and impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # tests: Triton's interpreter, far slower than torch
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {device.type}"
    if missing := missing_to_launch():
        return missing
    return (
        old := old_capability(device)
    ) and f"Triton kernels need compute capability 8.0 or higher; this GPU has {old}"


def old_capability(device: torch.device) -> str | None:
    """The compute capability of a GPU older than Ampere (T4, V100), else None. Those have no bf16, and neither flash
    attention nor Triton's bf16 code runs on them."""
    has_one = device.type == "cuda" and torch.cuda.is_available()
    capability = torch.cuda.get_device_capability(device) if has_one else (8, 0)
    return None if capability >= (8, 0) else ".".join(map(str, capability))


@cache  # the search takes as long as a small op, and every call of an op asks
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def missing_to_launch() -> str | None:
    """What Triton, and so torch.compile, lacks to build the small C extensions that launch its kernels, or None."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton kernels need a C compiler, and none was found: install gcc, or set CC to one"
    scheme = sysconfig.get_default_scheme()  # Debian's default says where pip installs, not where Python's headers are
    folder = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    elsewhere = os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")
    if not (Path(folder, "Python.h").is_file() or elsewhere):
        return f"Triton kernels need Python.h, which is not in {folder}: install python3-dev"
    return None


def _is_supported(op: str, impl: str, obstacle: str | None) -> bool:
    """Whether the kernel of `op` can serve this call. If not: ValueError for triton; for auto False, logged once."""
    if obstacle is None:
        return True
    if impl == "triton":
        raise ValueError(f"impl=triton: {op}: {obstacle}; use impl=auto or impl=torch")
    _log_once(f"{op} runs in torch: {obstacle}")
    return False


@cache
def _log_once(message: str) -> None:
    logger.warning(message)


def dispatch_table(impl: str, device: torch.device | str) -> dict[str, Choice]:
    """What every op resolves to: printed by train.py and stored with the run."""
    return {op: resolve(op, impl, device) for op in OPS}


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    impl: str,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target under softmax(cap(hidden weight^T + bias) / temperature), and that softmax's entropy.

    kernels/linear_logprob/reference.py is the definition.  hidden: [T, D]; weight: [V, D]; bias: [V]; target: [T]
    int64.  Returns ([T], [T]), natural log, fp32 (fp64 for fp64). The log-prob carries gradients to hidden, weight
    and bias, whatever the loss; the entropy only with entropy_gradient. ValueError for shapes, dtypes or targets that
    do not fit together. On a GPU targets are not checked, as that would wait for it: one out of range gives NaN in
    Triton, a device-side assert in torch.
    """
    head = _log_prob_head(hidden, weight, target, bias, LogitTransform(temperature, softcap), impl)
    return modes.logprobs_and_entropy(head, hidden, target, entropy_gradient=entropy_gradient)


def linear_logprob_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_loss: modes.TokenLoss,
    *,
    temperature: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    impl: str,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of token_loss(log-probs, entropy, rows) over all rows; and log-probs and entropy, [T] each, detached.

    As `linear_logprob`, but a quarter cheaper: the logits are computed only once, because each chunk's loss is computed
    while its logits are still in memory. token_loss is called with the log-probs and entropy, [R], of a chunk and the
    slice of its rows. It returns a loss per row, [R], which depends on no other row and passes gradients to these two
    arguments only. A loss over whole sequences needs `linear_logprob`.
    """
    head = _log_prob_head(hidden, weight, target, bias, LogitTransform(temperature, softcap), impl)
    return modes.folded_loss(head, hidden, target, token_loss, entropy_gradient=entropy_gradient)


def _log_prob_head(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, transform: LogitTransform, impl: str
) -> modes.Head:
    modes.check(hidden, weight, target, bias)
    ops = TORCH
    if resolve("linear_logprob", impl, hidden.device).impl == "triton":
        from kernels.linear_logprob import kernel

        if _is_supported("linear_logprob", impl, kernel.obstacle(hidden)):
            ops = kernel.ops_for(weight)
    return modes.Head(weight, bias, transform, ops, modes.rows_per_chunk(len(weight), hidden.device.type))


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix: tuple, suffix: tuple, *, impl: str, **layout
) -> Tensor:
    """Store each row's newest key and value, then attend to its group's prefix and its own suffix.

    See kernels/decode_attention/reference.py.
    """
    if resolve("decode_attention", impl, query.device).impl == "triton":
        from kernels.decode_attention import kernel

        if _is_supported("decode_attention", impl, kernel.obstacle(query, key, value, prefix, suffix)):
            return kernel.decode_attention(query, key, value, prefix, suffix, **layout)
    how = decode_attention_cpu.attend if decode_attention_cpu.supports(query, prefix, suffix, **layout) else None
    return decode_attention_reference.decode_attention(query, key, value, prefix, suffix, how=how, **layout)


def sample_token(logits: Tensor, uniforms: Tensor, *, impl: str, **options) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob; see kernels/sample_token/reference.py."""
    if resolve("sample_token", impl, logits.device).impl == "triton":
        from kernels.sample_token import kernel

        if _is_supported("sample_token", impl, kernel.obstacle(logits, **options)):
            return kernel.sample_token(logits, uniforms, temperature=options["temperature"])
    return sample_token_reference.sample_token(logits, uniforms, **options)
