"""nvcc and the tools that read its output: the compiled kernels of a source file.

The disassembler is Triton's, since a CUDA toolkit need not have one.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from bench.ahead_of_time import tool
from bench.machine_code import Loop, loops, parsed

TARGETS = {80: "80", 86: "86", 90: "90a", 100: "100"}  # with its own instructions where those are used
FLAGS = ("-O3", "-std=c++17", "-lineinfo")  # setup.py's: they decide what is compiled
REMARKS = re.compile(r"warning|setmaxnreg|serializ|performance loss", re.IGNORECASE)
NAMESPACES = ("vmf::cuda::", "(anonymous namespace)::")


class MissingToolError(RuntimeError):
    """A program is not on this machine; says which and where it was looked for."""


@dataclass(frozen=True)
class Kernel:
    """One kernel in machine code; bytes."""

    symbol: str  # mangled
    registers: int  # a thread, at its launch
    static_shared: int
    most_threads: int | None  # of its launch bounds
    spills: int  # loads from and stores to local memory
    matrix: int  # tensor-core instructions
    bulk_copies: int  # TMA loads
    multicast_copies: int  # of these, into several blocks
    asynchronous_copies: int  # cp.async loads
    loops: tuple[Loop, ...]  # those with tensor-core instructions
    given_back: tuple[int, ...]  # registers that warpgroups keep after setmaxnreg.dec
    taken: tuple[int, ...]  # registers that warpgroups have after setmaxnreg.inc
    remarks: tuple[str, ...]  # of the assembler

    @property
    def name(self) -> str:
        """As it is written, without namespaces, result and arguments."""
        return readable(self.symbol)


@dataclass(frozen=True)
class Built:
    """The compiled kernels of one source file."""

    source: Path
    object: Path  # with the launchers
    kernels: tuple[Kernel, ...]


def find_nvcc() -> Path:
    """In CUDA_HOME, on PATH, in /usr/local/cuda, or of the nvidia-cuda-nvcc package beside this Python's others.

    Raises:
        MissingToolError: it is in none of them.
    """
    folders = [Path(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    packages = Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin")
    found = next((hit for folder in (None, *folders, *packages) if (hit := shutil.which("nvcc", path=folder))), None)
    if found is None:
        raise MissingToolError(
            "nvcc was not found on PATH, in CUDA_HOME, in /usr/local/cuda or among Python's packages"
        )
    return Path(found)


def nvcc_version() -> str:
    """For example "13.0.88"."""
    printed = run([str(find_nvcc()), "--version"])
    version: str = re.findall(r"V(\d+(?:\.\d+)+)", printed)[-1]
    return version


def build(source: Path, arch: int, folder: Path, *flags: str) -> Built:
    """Compile a file for ``arch`` (compute capability times 10) in ``folder``, which keeps what nvcc writes on its way.

    Raises:
        RuntimeError: the file does not compile; with the compiler's words.
    """
    target, output = TARGETS[arch], folder / f"{source.stem}.o"
    command = [str(find_nvcc()), *FLAGS, "-gencode", f"arch=compute_{target},code=sm_{target}", "-Xptxas", "-v"]
    command += [*flags, "--keep", "--keep-dir", str(folder), "-o", str(output), "-c", str(source)]
    log = run(command)
    code, ptx = output.with_suffix(".cubin"), output.with_suffix(".ptx").read_text()
    return Built(source, output, tuple(kernels(code, log, ptx)))


def kernels(code: Path, log: str = "", ptx: str = "") -> list[Kernel]:
    """The kernels in a cubin; ``log`` is what ptxas -v said, ``ptx`` what it read, where they are known."""
    usage = run([str(tool("cuobjdump")), "--dump-resource-usage", str(code)])
    registers = {name: int(number) for name, number in re.findall(r"Function (\w+):\s+REG:(\d+)", usage)}
    # without the analysis of data flow: branches show their targets without it
    disassembly = run([str(tool("nvdisasm")), "-c", "-ndf", str(code)])
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+),.*$", disassembly, flags=re.MULTILINE)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    said = _by_kernel(log)
    return [
        _kernel(name, registers[name], bodies[name], said.get(name, ""), _remarks(log, name), ptx)
        for name in sorted(registers)
        if name in bodies
    ]


def _kernel(name: str, registers: int, body: str, said: str, remarks: tuple[str, ...], ptx: str) -> Kernel:
    code = parsed(body)

    def count(*prefixes: str) -> int:
        return sum(each.operation.startswith(prefixes) for each in code.instructions)

    def moved(way: str) -> tuple[int, ...]:
        wanted = [each.operands for each in code.instructions if each.operation.startswith(f"USETMAXREG.{way}")]
        return tuple(int(re.findall(r"0x[0-9a-f]+|\b\d+\b", operands)[-1], 0) for operands in wanted)

    static = re.search(r"(\d+) bytes smem", said)
    header = re.search(rf"\.entry {name}\b[^{{]*", ptx)
    bounds = re.search(r"\.(?:maxntid|reqntid) (\d+)(?:, (\d+), (\d+))?", header[0] if header else "")
    sides = [int(side) for side in bounds.groups(default="1")] if bounds else []
    return Kernel(
        symbol=name,
        registers=registers,
        static_shared=int(static[1]) if static else 0,
        most_threads=sides[0] * sides[1] * sides[2] if sides else None,
        spills=count("LDL", "STL"),
        matrix=sum(each.is_product for each in code.instructions),
        bulk_copies=count("UTMALDG"),
        multicast_copies=sum("MULTICAST" in each.operation for each in code.instructions),
        asynchronous_copies=count("LDGSTS"),
        loops=loops(code),
        given_back=moved("DEALLOC"),
        taken=moved("TRY_ALLOC"),
        remarks=remarks,
    )


def _by_kernel(log: str) -> dict[str, str]:
    """What ptxas says of each kernel's resources."""
    parts = re.split(r"^ptxas info\s+: Compiling entry function '(\w+)'.*$", log, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _remarks(log: str, name: str) -> tuple[str, ...]:
    """Lines of the log that warn of this kernel, or of no kernel in particular; without file names and symbols."""
    said = [line for line in log.splitlines() if line.startswith("ptxas") and REMARKS.search(line)]
    lines = [line for line in said if name in line or "_Z" not in line]
    return tuple(dict.fromkeys(re.sub(r"^ptxas \S+, line \d+; ", "ptxas ", line).replace(name, "it") for line in lines))


def readable(symbol: str) -> str:
    """A mangled name as it is written, without namespaces, result and arguments."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_char_p  # the few bytes are never freed
    library.__cxa_demangle.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    written: bytes | None = library.__cxa_demangle(symbol.encode(), None, None, None)
    if written is None:
        return symbol
    name = written.decode()
    for namespace in NAMESPACES:
        name = name.replace(namespace, "")
    name, depth = name.removeprefix("void "), 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:i]
    return name


def run(command: list[str]) -> str:
    """What a program prints, errors and output together.

    Raises:
        RuntimeError: it fails; with what it printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed on {Path(command[-1]).name}:\n{printed.strip()}")
    return printed
