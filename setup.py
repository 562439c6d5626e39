"""Build entry point: two compiled modules, by ninja, without torch; everything declarative lives in pyproject.toml.

``vmf_kernels._native`` comes from csrc/cpu, ``vmf_kernels._cuda`` from csrc/cuda. One that cannot be built is left out with a
warning, for the library works without it. Settings, read here and never at run time:

    CXX, CUDA_HOME, MAX_JOBS    the C++ compiler, where nvcc is, how many compilers run at once
    VMF_CUDA_ARCHS              the parts to compile for, "80 90a 100" if not given; "none" leaves vmf_kernels._cuda out
    VMF_CUDA_BOUNDED_WAITS=1    a wait in the streaming passes that does not end traps after seconds: to find a hang
    VMF_REQUIRE_NATIVE=1, VMF_REQUIRE_CUDA=1    a module that cannot be built is an error
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "ninja"  # setuptools' own folder is temporary in an editable install, and a second one as slow
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
source_digest = runpy.run_path(str(CSRC / "digest.py"))["source_digest"]

# csrc/cpu/kernels.cpp is compiled once for each, VMF_ISA being its name.
AVX512_BF16 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"]
INSTRUCTION_SETS = {
    "amx_bf16": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
    "avx512bf16": AVX512_BF16,
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
CUDA_ARCHS = ["80", "90a", "100"]  # Ampere and Ada, Hopper with its own instructions, Blackwell of data centres
OLDEST_ARCH = 80
BOUNDED = "VMF_CUDA_BOUNDED_WAITS"
IS_X86 = "#ifndef __x86_64__\n#error another processor\n#endif\n"
# what csrc/cpu/tiles.h needs of the compiler beside the flags; GCC 12 and clang 12 have it
HAS_AMX = """#include <immintrin.h>
typedef int Words __attribute__((vector_size(64)));
Words halves(Words a, Words b) { return __builtin_shufflevector(a, b, 0,1,2,3,4,5,6,7,16,17,18,19,20,21,22,23); }
void zero() { _tile_zero(0); }
"""
HAS_OPENMP = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
WITHOUT = {
    "native": "On CPUs the streaming backend, plain torch, does the same. The module takes g++ 10, clang++ 9, or later.",
    "cuda": "On NVIDIA GPUs the Triton kernels do the same. The module takes nvcc and a C++ compiler that it works with.",
}


class CannotBuildError(Exception):
    """This machine cannot build a module; the message says why."""


class Unit(NamedTuple):
    """One source, compiled once."""

    source: Path
    object: str
    flags: list[str]


class Plan(NamedTuple):
    """How a module is compiled and linked."""

    compiler: list[str]
    flags: list[str]
    units: list[Unit]
    link: list[str]


class Interpreter(NamedTuple):
    """The Python that a module is for."""

    include: str  # folder of its headers
    suffix: str  # of its modules' file names


HERE = Interpreter(sysconfig.get_path("include"), SUFFIX)


def host_compiler() -> list[str]:
    """The C++ compiler's command: CXX, or what is on PATH."""
    named = os.environ.get("CXX", "")
    for words in map(shlex.split, [named] if named else ["g++", "c++", "clang++"]):
        if words and (found := shutil.which(words[0])):
            return [found, *words[1:]]
    raise CannotBuildError(f"no C++ compiler: CXX is '{named}'" if named else "no g++, c++ or clang++ on PATH")


def compiles(compiler: list[str], source: str, *flags: str) -> bool:
    """Whether a small C++ source compiles and links to a shared library."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        command = [*compiler, *flags, "-fPIC", "-shared", str(path), "-o", f"{path}.so"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def binding_flags(python: Interpreter) -> list[str]:
    """Where Python's and pybind11's headers are."""
    if find_spec("pybind11") is None:
        raise CannotBuildError("Python does not find pybind11, a requirement of the build")
    import pybind11

    # A copy: an isolated build has its own in a new folder each time, and another command line is another compilation.
    headers = BUILD / f"pybind11-{pybind11.__version__}"
    if not headers.exists():
        headers.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=headers.parent) as folder:  # whole or not at all, if this is interrupted
            shutil.copytree(pybind11.get_include(), Path(folder, "headers")).rename(headers)
    return ["-isystem", str(headers), "-isystem", python.include]


def known_sets(compiler: list[str]) -> list[str]:
    """The instruction sets that this compiler has and the processor may have."""
    if not compiles(compiler, IS_X86):
        return ["portable"]
    has_amx = compiles(compiler, HAS_AMX, *INSTRUCTION_SETS["amx_bf16"])
    return [name for name in INSTRUCTION_SETS if has_amx or name != "amx_bf16"]


def native_units(names: list[str]) -> list[Unit]:
    """What csrc/cpu is compiled to: bindings.cpp, the slowest, among the first; the kernels once for each instruction set."""
    kernels = CSRC / "cpu" / "kernels.cpp"
    others = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if path != kernels]
    present = {"-DVMF_HAS_X86": "avx2", "-DVMF_HAS_AMX": "amx_bf16"}
    defines = [define for define, name in present.items() if name in names]
    units = [Unit(path, f"{path.stem}.o", defines) for path in others]
    flags = {name: [*INSTRUCTION_SETS[name], f"-DVMF_ISA={name}"] for name in names}
    return units + [Unit(kernels, f"kernels.{name}.o", flags[name]) for name in names]


def with_bindings(units: Iterable[Unit], flags: list[str]) -> list[Unit]:
    """The same, bindings.cpp with these flags, such as where Python's headers are."""
    return [unit._replace(flags=unit.flags + flags * (unit.source.stem == "bindings")) for unit in units]


def native_plan() -> Plan:
    """``vmf_kernels._native``."""
    compiler = host_compiler()
    openmp = ["-fopenmp"] if compiles(compiler, HAS_OPENMP, "-fopenmp") else []
    units = with_bindings(native_units(known_sets(compiler)), binding_flags(HERE))
    is_mac = sys.platform == "darwin"
    link = ["-bundle", "-undefined", "dynamic_lookup"] if is_mac else ["-shared", "-Wl,-s"]
    return Plan(compiler, CXX_FLAGS + openmp, units, link + openmp)


def find_nvcc() -> Path:
    """nvcc of CUDA_HOME, on PATH, or of the nvidia-cuda-nvcc package beside this Python's others."""
    home, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    packages = Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc")
    for path in [*([Path(home, "bin", "nvcc")] if home else []), *([Path(on_path)] if on_path else []), *packages]:
        if path.exists():
            return path
    raise CannotBuildError("no nvcc in CUDA_HOME, on PATH, or from the package nvidia-cuda-nvcc")


def cuda_archs(setting: str | None) -> list[str]:
    """The parts that VMF_CUDA_ARCHS asks for; 90 is read as 90a, for the same GPUs, as plain code of the passes only traps.

    Raises:
        SystemExit: it is no list of parts that the sources can be compiled for.
        CannotBuildError: it is "none".
    """
    if setting is None:
        return CUDA_ARCHS
    if setting.strip() == "none":
        raise CannotBuildError("VMF_CUDA_ARCHS is none")
    archs = list(dict.fromkeys("90a" if arch == "90" else arch for arch in setting.split()))
    for arch in archs or [""]:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < OLDEST_ARCH:
            expected = f"compute capabilities from {OLDEST_ARCH} up such as '{' '.join(CUDA_ARCHS)}', or 'none'"
            raise SystemExit(f"VMF_CUDA_ARCHS='{setting}' has '{arch}': expected {expected}")
    return archs


def known_archs(nvcc: Path, archs: list[str]) -> list[str]:
    """Those of the parts that this nvcc knows; one that was asked for by name and is not known ends the build."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = re.findall(r"compute_(\d+)", listed.stdout)
    unknown = [arch for arch in archs if arch.rstrip("af") not in known]
    if known and unknown and archs is not CUDA_ARCHS:
        raise SystemExit(f"VMF_CUDA_ARCHS has '{unknown[0]}': {nvcc} knows {', '.join(known)}")
    if len(unknown) == len(archs):
        raise CannotBuildError(f"{nvcc} knows none of {', '.join(archs)}: {listed.stderr.strip() or known}")
    return [arch for arch in archs if arch not in unknown]


def is_set(name: str) -> bool:
    """Whether a setting that is on or off is on."""
    return os.environ.get(name, "") not in ("", "0")


def cuda_plan(python: Interpreter = HERE) -> Plan:
    """``vmf_kernels._cuda``: static cudart, and nothing of the driver, so that it loads where there is none."""
    wanted = cuda_archs(os.environ.get("VMF_CUDA_ARCHS"))
    nvcc, host = find_nvcc(), host_compiler()
    archs = known_archs(nvcc, wanted)
    compiler = [str(nvcc), *(["-ccbin", host[0]] if len(host) == 1 else [])]  # a launcher such as ccache is not nvcc's
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags = ["-std=c++17", "-O3", "-lineinfo", "-Xfatbin=-compress-all", "-Xcompiler=-fPIC,-fvisibility=hidden", *codes]
    sources = [*(CSRC / "cuda").glob("*.cu"), CSRC / "cuda" / "bindings.cpp"]
    defines = [f'-DVMF_CUDA_ARCHS="{" ".join(archs)}"']
    defines += ["-DVMF_BOUNDED_WAITS"] if is_set(BOUNDED) else []
    of_bindings = [f"-DVMF_SOURCE_DIGEST={source_digest(CSRC / 'cuda')}", *binding_flags(python)]
    units = with_bindings((Unit(path, f"{path.stem}.o", defines) for path in sorted(sources)), of_bindings)
    libraries = (
        f"-L{nvcc.parent.parent / 'lib'}"  # where the package nvidia-cuda-runtime has them; nvcc looks elsewhere
    )
    link = ["-shared", "-cudart=static", libraries, "-Xlinker=-s", "-Xlinker=--exclude-libs=ALL"]
    return Plan(compiler, flags, units, link)


def ninja_file(plan: Plan, target: str) -> str:
    """What ninja is to do; every object depends on the headers that its compilation read."""

    def escaped(path: str) -> str:
        return re.sub(r"([$ :])", r"$\1", path)

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines = [
        f"rule compile\n  command = {command(plan.compiler + plan.flags)} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = $out",
        f"rule link\n  command = {command(plan.compiler)} $in {command(plan.link)} -o $out\n  description = $out",
    ]
    lines += [f"build {u.object}: compile {escaped(str(u.source))}\n  flags = {command(u.flags)}" for u in plan.units]
    lines += [f"build {target}: link {' '.join(u.object for u in plan.units)}", ""]
    return "\n".join(lines)


def ninja_folder(name: str, python: Interpreter = HERE) -> Path:
    """Where a module's objects are kept; bounded waits have objects of their own."""
    kind = "cuda-bounded" if name == "cuda" and is_set(BOUNDED) else name
    return BUILD / kind / python.suffix.strip(".")


def run_ninja(plan: Plan, folder: Path, target: str) -> Path:
    """What the plan makes, ``target`` in the folder; only what has changed since the last time is compiled."""
    ninja = shutil.which("ninja")
    if ninja is None and find_spec("ninja") is None:
        raise CannotBuildError("no ninja, a requirement of the build")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(plan, target))
    jobs = os.environ.get("MAX_JOBS")
    command = [*([ninja] if ninja else [sys.executable, "-m", "ninja"]), *(["-j", jobs] if jobs else [])]
    sys.stdout.flush()
    if subprocess.run(command, cwd=folder, check=False).returncode != 0:
        raise CannotBuildError("its compilation failed, the messages are above")
    return folder / target


class BuildPackages(build_py):
    """Copies the packages as they are now: a module left from an earlier build and gone since would get into the wheel."""

    def run(self) -> None:
        """Copy them to where nothing is; compiled modules come afterwards."""
        for package in {name.partition(".")[0] for name in self.packages}:
            shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()


class BuildModules(build_ext):
    """Builds each module by its plan; leaves one out that cannot be built."""

    def build_extension(self, ext: Extension) -> None:
        """Put a module where setuptools expects it."""
        name = ext.name.rpartition("_")[2]
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # one that is left from an earlier build is of other sources
        try:
            plan = {"native": native_plan, "cuda": cuda_plan}[name]()
            built = run_ninja(plan, ninja_folder(name), f"_{name}{SUFFIX}")
        except CannotBuildError as reason:
            required = f"VMF_REQUIRE_{name.upper()}"
            if is_set(required):
                raise SystemExit(f"error: {ext.name} cannot be built, and {required} is set: {reason}") from None
            print(f"\nwarning: installed without {ext.name}: {reason}. {WITHOUT[name]}\n", file=sys.stderr, flush=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, target)

    def copy_extensions_to_source(self) -> None:
        """Put the modules beside their packages' sources, as new files: processes may have the old ones loaded."""
        for ext in self.extensions:
            Path(self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext)[0]).unlink(missing_ok=True)
        super().copy_extensions_to_source()


if __name__ == "__main__":
    modules = [Extension(f"vmf_kernels._{name}", sources=[], optional=True) for name in ("native", "cuda")]
    setup(ext_modules=modules, cmdclass={"build_ext": BuildModules, "build_py": BuildPackages})
