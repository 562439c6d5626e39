"""Compiling the kernels without a GPU: every launch of a run is recorded, and compiled as the launch itself would be.

A launch is recorded with its real arguments (on CPU tensors of the real sizes, whose memory is never touched), so that dtypes,
divisibility by 16 and compile-time constants are those that the device would see.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vmf_kernels.backends.triton import launch

MULTIPROCESSORS = {80: 108, 86: 84, 90: 132, 100: 148}
SHARED_MEMORY = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448}  # bytes a block may have
MATRIX_INSTRUCTIONS = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTC.MMA"}
DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Compiled:
    """What the compiler says about one kernel; bytes."""

    registers: int
    spills: int  # loads from and stores to local memory
    shared: int
    matrix: int  # tensor-core instructions
    bulk_copies: int  # TMA loads
    asynchronous_copies: int  # cp.async loads


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Launches go to the list instead of a device, tuned for ``arch`` (compute capability times 10)."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k not in OPTIONS}
        missing = set(names) ^ set(values)
        assert not missing, f"{kernel.__name__} is launched with wrong arguments: {sorted(missing)}"
        launches.append(Launch(kernel, grid, values, {k: v for k, v in options.items() if k in OPTIONS}))

    target = launch.Target(arch, MULTIPROCESSORS[arch])
    with (
        mock.patch.object(launch, "run", record),
        mock.patch.object(launch, "target_of", return_value=target),
        mock.patch.object(launch, "unsupported_device", return_value=None),
    ):
        yield launches


def compile_launch(recorded: Launch, arch: int) -> Compiled:
    """Compile one recorded launch for ``arch``.

    Raises:
        RuntimeError: the compiler refuses the kernel; says why.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(recorded.kernel.params):
        value = recorded.arguments[parameter.name]
        kind = "constexpr" if parameter.is_constexpr else _type_of(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif _divisible(value):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(recorded.kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(recorded.options))
    return _report(built, arch)


def tool(name: str) -> Path:
    """A program that Triton's package ships."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{DTYPES[value.dtype]}"
    if isinstance(value, int):
        if value == 1:
            return "constexpr"  # as the launcher specialises it
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    block = ", ".join(str(size) for size in value.block_shape)
    return f"tensordesc<{DTYPES[value.base.dtype]}[{block}]>"


def _divisible(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _report(built: Any, arch: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _output([str(tool("cuobjdump")), "--dump-resource-usage", file.name])
        code = _output([str(tool("nvdisasm")), "-c", file.name])
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code, re.MULTILINE)
    registers = re.findall(r"REG:(\d+)", usage)

    def count(*prefixes: str) -> int:
        return sum(instruction.startswith(prefixes) for instruction in instructions)

    return Compiled(
        registers=max(int(number) for number in registers),
        spills=count("LDL", "STL"),
        shared=built.metadata.shared,
        matrix=count("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA", "QGMMA", "IMMA"),
        bulk_copies=count("UTMALDG"),
        asynchronous_copies=count("LDGSTS"),
    )


def _output(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": "/usr/bin:/bin"}
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout
