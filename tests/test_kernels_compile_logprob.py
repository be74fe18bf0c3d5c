"""The log-prob kernels compile for GPUs that are not here: no spill, within shared memory, on tensor cores."""

import pytest

pytest.importorskip("triton")

from kernels.linear_logprob import kernel  # noqa: E402
from tests.compile_only import Kernel, build, faults  # noqa: E402

V, D = 151_936, 896
TILE = {name: value for name, value in kernel.TILE.items() if name.startswith("BLOCK")}
SCALARS = {"inverse_temperature": "fp32", "softcap": "fp32"}
KEPT = {"kept": "*fp16:16", "offsets": "*fp32:16"}
ROWS = {name: "*fp32:16" for name in ("tops", "totals", "entropy", "logprobs")} | {"target": "*i64:16"}


def forward(**options: bool) -> Kernel:
    pointers = {name: "*bf16:16" for name in ("hidden", "weight", "bias")}
    return Kernel(
        "kernels.linear_logprob.kernel:forward_spans",
        {**pointers, "target": "*i64:16", "partial": "*fp32:16", **KEPT, "num_rows": "i32", **SCALARS},
        {
            "V": V,
            "D": D,
            "HAS_BIAS": False,
            "HAS_CAP": False,
            "KEEP_LOGITS": False,
            "UPCAST": False,
            "COLUMNS": kernel.SPAN,
            **TILE,
            **options,
        },
        num_warps=kernel.TILE["num_warps"],
        num_stages=kernel.TILE["num_stages"],
    )


def merge() -> Kernel:
    constants = {"V": V, "SPANS": 75, "BLOCK": 128}
    types = {"partial": "*fp32:16", **ROWS, "num_rows": "i32"}
    return Kernel("kernels.linear_logprob.kernel:merge_spans", types, constants)


def statistics(has_cap: bool) -> Kernel:
    return Kernel(
        "kernels.linear_logprob.kernel:row_statistics",
        {"logits": "*fp32:16", **ROWS, **SCALARS},
        {"V": V, "HAS_CAP": has_cap, "BLOCK": kernel.ROW_BLOCK["BLOCK"]},
        num_warps=kernel.ROW_BLOCK["num_warps"],
    )


def gradients(logits: str, **options: bool | int) -> Kernel:
    pointers = {name: "*fp32:16" for name in ("offsets", "logprob_gradients", "entropy_gradients")}
    pointers |= {"logits": f"*{logits}:16", "gradients": "*bf16:16"}
    constants = {"V": V, "TILES": 0, "COLUMNS": kernel.TILE["BLOCK_COLUMNS"], "BLOCK": kernel.ROW_BLOCK["BLOCK"]}
    return Kernel(
        "kernels.linear_logprob.kernel:row_gradients",
        {**pointers, **ROWS, "stride": "i32:16", **SCALARS},
        {**constants, "HAS_CAP": False, "HAS_ENTROPY": False, **options},
        num_warps=kernel.ROW_BLOCK["num_warps"],
    )


KERNELS = {
    "forward, bias and cap": forward(HAS_BIAS=True, HAS_CAP=True),
    "forward, keeping": forward(KEEP_LOGITS=True),
    "forward, keeping, bias and cap": forward(KEEP_LOGITS=True, HAS_BIAS=True, HAS_CAP=True),
    "merge": merge(),
    "statistics, cap": statistics(True),
    "gradients, entropy and cap": gradients("fp32", HAS_ENTROPY=True, HAS_CAP=True),
    "gradients of what was kept, entropy and cap": gradients("fp16", HAS_ENTROPY=True, HAS_CAP=True, TILES=1200),
}


def test_every_kernel_fits_each_gpu_and_the_matmul_runs_on_tensor_cores():
    for capability, reports in build(list(KERNELS.values())).items():
        found = dict(zip(KERNELS, reports, strict=True))
        assert {name: faults(report, capability) for name, report in found.items()} == {name: [] for name in KERNELS}
        instruction = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[capability]
        assert all(found[name].tensor.get(instruction, 0) > 0 for name in KERNELS if name.startswith("forward"))
