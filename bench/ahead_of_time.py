"""Compiles the kernels without a GPU: records every launch of a run, and compiles it as the launch itself would.

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

from bench.machine_code import Loop, loops, parsed
from vmf_kernels.backends.triton import launch

MULTIPROCESSORS = {80: 108, 86: 84, 90: 132, 100: 148}
SHARED_MEMORY = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448}  # bytes a block may have
TENSOR_MEMORY = 512  # columns a multiprocessor has
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
    """The compiler's figures for one kernel; sizes in bytes."""

    registers: int
    spills: int  # loads from and stores to local memory
    shared: int
    tensor_memory: int  # columns that a program's sums take from sm_100 on
    matrix: int  # tensor-core instructions
    bulk_copies: int  # TMA loads
    asynchronous_copies: int  # cp.async loads
    loops: tuple[Loop, ...]  # those with tensor-core instructions


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Launches go to the list instead of a device, tuned for ``arch`` (compute capability times 10)."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        names = list(kernel.arg_names)
        by_name = {name: value for name, value in options.items() if name not in OPTIONS}
        given = [*names[: len(args)], *(f"positional {i}" for i in range(len(names), len(args))), *by_name]
        wrong = {name for name in {*names, *given} if (name in names) + given.count(name) != 2}
        assert not wrong, f"{kernel.__name__} is launched with wrong arguments: {sorted(wrong)}"
        values = dict(zip(names, args, strict=False)) | by_name
        launches.append(Launch(kernel, grid, values, {k: v for k, v in options.items() if k in OPTIONS}))

    target = launch.Target(arch, MULTIPROCESSORS[arch])
    with (
        mock.patch.object(launch, "run", record),
        mock.patch.object(launch, "target_of", return_value=target),
        mock.patch.object(launch, "unsupported_device", return_value=None),
    ):
        yield launches


def compile_launch(recorded: Launch, arch: int) -> Compiled:
    """Compile one recorded launch for ``arch``, by Triton's own launcher, which specialises it as it would on the device."""
    from triton.runtime import driver

    pretended = _PretendedDevice(arch)
    with mock.patch.object(driver, "_active", pretended):
        built = recorded.kernel.warmup(grid=recorded.grid, **recorded.arguments, **recorded.options)
    return _report(built)


class _PretendedDevice:
    """What Triton asks its driver when it compiles a launch; nothing can be loaded or run through it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        """NVIDIA, of the capability."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """A number for each capability: Triton caches what it compiles by device."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0


def tool(name: str) -> Path:
    """A program that Triton's package ships."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _report(built: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _output([str(tool("cuobjdump")), "--dump-resource-usage", file.name])
        # without the analysis of data flow: a third of its time, and branches show their targets without it
        code = parsed(_output([str(tool("nvdisasm")), "-c", "-ndf", file.name]))
    registers = re.findall(r"REG:(\d+)", usage)

    def count(*prefixes: str) -> int:
        return sum(each.operation.startswith(prefixes) for each in code.instructions)

    return Compiled(
        registers=max(int(number) for number in registers),
        spills=count("LDL", "STL"),
        shared=built.metadata.shared,
        tensor_memory=getattr(built.metadata, "tmem_size", None) or 0,
        matrix=sum(each.is_product for each in code.instructions),
        bulk_copies=count("UTMALDG"),
        asynchronous_copies=count("LDGSTS"),
        loops=loops(code),
    )


def _output(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": "/usr/bin:/bin"}
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout
