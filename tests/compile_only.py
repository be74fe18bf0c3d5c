"""Compile Triton kernels for GPUs that are not here, and read off what the assembler made of them.

No driver and no CUDA toolkit are needed: triton carries ptxas, cuobjdump and nvdisasm. One process cannot both
interpret and compile kernels, so tests describe what they want as plain `Kernel` rows and `build` hands all of them
to one child process (this file, run as a program: rows in as JSON on stdin, reports out on stdout).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

# Compute capability -> bytes that a block may have. An A100 has 163 KiB; the cards of workstations and desktops (86, 89
# and 120: A10G, L4, RTX), for which the same code is made as for it, have 99.
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")  # mma.sync, Hopper's wgmma, Blackwell's tcgen05


@dataclass(frozen=True)
class Kernel:
    """A jitted function and one specialisation of it."""

    path: str  # "kernels.sample_token.kernel:pick"
    types: dict[str, str]  # run-time arguments: "i32", "fp32", "*bf16"; with ":16" where known to be a multiple of 16
    constants: dict[str, int | float | bool | None]  # every tl.constexpr argument
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Report:
    """What one kernel needs on one GPU. Spills are local loads and stores in the machine code."""

    registers: int
    stack: int  # bytes per thread
    shared: int  # bytes per block; the compiler does not check it against the GPU's limit
    spills: int
    tensor: dict[str, int]  # tensor-core instructions by name


def build(kernels: list[Kernel]) -> dict[int, list[Report]]:
    """A report per kernel for each GPU of SHARED_MEMORY. RuntimeError with the compiler's words if one fails."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    child = subprocess.run(
        [sys.executable, "-m", "tests.compile_only"],
        cwd=Path(__file__).parents[1],
        env=environment,
        input=json.dumps([asdict(kernel) for kernel in kernels]),
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(f"a kernel does not compile:\n{child.stderr[-4000:]}")
    reports = json.loads(child.stdout.splitlines()[-1])
    return {int(capability): [Report(**report) for report in row] for capability, row in reports.items()}


def faults(report: Report, capability: int) -> list[str]:
    """What forbids running this: empty when all is well. 255 registers without a spill are no fault."""
    limit = SHARED_MEMORY[capability]
    return [
        f"{name}={value} > {most}"
        for name, value, most in [
            ("stack", report.stack, 0),
            ("spills", report.spills, 0),
            ("shared", report.shared, limit),
        ]
        if value > most
    ]


def _compile(kernel: Kernel, capability: int) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel.path.split(":")
    function = getattr(importlib.import_module(module), name)
    unknown = (kernel.types.keys() | kernel.constants.keys()) ^ set(function.arg_names)
    if unknown:
        raise ValueError(f"{kernel.path}: {sorted(unknown)} must be arguments of the kernel and have a type or a value")
    types = {name: kernel.types.get(name, "constexpr") for name in function.arg_names}
    # The launcher finds these properties by itself; without them a slower kernel is compiled than the one that runs.
    aligned = {(i,): [["tt.divisibility", 16]] for i, type in enumerate(types.values()) if type.endswith(":16")}
    source = ASTSource(
        fn=function,
        signature={name: type.removesuffix(":16") for name, type in types.items()},
        constexprs=kernel.constants,
        attrs=aligned,
    )
    options = dict(num_warps=kernel.num_warps, num_stages=kernel.num_stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, code = _disassemble(compiled.asm["cubin"])
    resources = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    instructions = Counter(re.findall(rf"\b({'|'.join(TENSOR_CORES)}|STL|LDL)\b", code))
    return Report(
        registers=int(resources["REG"]),
        stack=int(resources["STACK"]),
        shared=compiled.metadata.shared,
        spills=instructions["STL"] + instructions["LDL"],
        tensor={name: count for name, count in instructions.items() if name in TENSOR_CORES},
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """The resource line of cuobjdump and the machine code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        return next(line for line in usage.splitlines() if "REG:" in line), run(tools / "nvdisasm", "-c", file.name)


if __name__ == "__main__":
    rows = [Kernel(**row) for row in json.load(sys.stdin)]
    print(json.dumps({gpu: [asdict(_compile(row, gpu)) for row in rows] for gpu in SHARED_MEMORY}))
