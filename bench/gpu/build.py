"""Builds the CUDA module for another interpreter, which may be on another machine.

    python -m bench.gpu.build                      for this interpreter
    python -m bench.gpu.build --python PYTHON      for that one, of which only the headers are used

It builds two modules with code for one GPU architecture: ``vmf_kernels/_cuda*.so``, and ``build/bounded/_cuda*.so``, in which a
wait that does not end traps. Git ignores both: copy them by name. It needs nvcc, and this interpreter's pybind11 and ninja.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from bench.gpu.module import BOUNDED_FOLDER, ROOT

ARCHS = "90a"
NEWEST_GLIBC, NEWEST_GLIBCXX = (2, 34), (3, 4, 30)  # that may be needed: of a system of 2021, and its g++ 12
MOST_BYTES = 16 * 2**20  # of a module: what is taken along has to fit with all else into 64 MiB
ASKED = (
    "import json, sysconfig; print(json.dumps([sysconfig.get_path('include'), sysconfig.get_config_var('EXT_SUFFIX')]))"
)


class Job(NamedTuple):
    """One module: how it is built, and where it is put."""

    settings: dict[str, str]  # of setup.py
    target: Path


def setup_module() -> ModuleType:
    """setup.py, imported; nothing is set up."""
    spec = importlib.util.spec_from_file_location("setup_of_vmf_kernels", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jobs(suffix: str, archs: str = ARCHS) -> list[Job]:
    """The module to use and the one to look for a hang with; ``suffix`` is of the interpreter's modules."""
    common = {"VMF_CUDA_ARCHS": archs, "VMF_CUDA_BOUNDED_WAITS": "0"}
    return [
        Job(common, ROOT / "vmf_kernels" / f"_cuda{suffix}"),
        Job(common | {"VMF_CUDA_BOUNDED_WAITS": "1"}, BOUNDED_FOLDER / f"_cuda{suffix}"),
    ]


def asked(python: str) -> list[str]:
    """[folder of the headers, suffix of modules] of an interpreter.

    Raises:
        SystemExit: it does not run, or has no headers.
    """
    try:
        printed = subprocess.run([python, "-c", ASKED], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{python} does not run: {error}") from None
    include, suffix = json.loads(printed)
    if not Path(include, "Python.h").exists():
        raise SystemExit(f"{python} has no headers: expected {include}/Python.h, of its development files")
    return [include, suffix]


@contextmanager
def settings(wanted: dict[str, str]) -> Iterator[None]:
    """The environment with these settings of setup.py."""
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def build(python: str, archs: str = ARCHS) -> list[Path]:
    """Both modules, only what has changed compiled again.

    Raises:
        SystemExit: one cannot be built; says why.
    """
    builder = setup_module()
    interpreter = builder.Interpreter(*asked(python))
    built = []
    for job in jobs(interpreter.suffix, archs):
        with settings(job.settings):
            try:
                plan, folder = builder.cuda_plan(interpreter), builder.ninja_folder("cuda", interpreter)
                made = builder.run_ninja(plan, folder, job.target.name)
            except builder.CannotBuildError as reason:
                raise SystemExit(f"{job.target.name} cannot be built: {reason}") from None
        job.target.parent.mkdir(parents=True, exist_ok=True)
        job.target.unlink(missing_ok=True)  # a process may have the old one loaded
        built.append(Path(shutil.copy2(made, job.target)))
    return built


def newest(symbols: str, library: str) -> tuple[int, ...]:
    """Of the versions of a library that objdump's or readelf's list of symbols names; () for none."""
    found = re.findall(rf"\b{library}_(\d+(?:\.\d+)+)", symbols)
    return max((tuple(int(part) for part in version.split(".")) for version in found), default=())


def faults(path: Path, symbols: str) -> list[str]:
    """Why a module might not load elsewhere, a sentence each; ``symbols`` from ``readelf --version-info``."""
    found = []
    for library, most in (("GLIBC", NEWEST_GLIBC), ("GLIBCXX", NEWEST_GLIBCXX)):
        if newest(symbols, library) > most:
            needs, allowed = (".".join(map(str, version)) for version in (newest(symbols, library), most))
            found.append(f"{path.name} needs {library} {needs}; expected {allowed} at most")
    if path.stat().st_size > MOST_BYTES:
        found.append(f"{path.name} has {path.stat().st_size} bytes; expected {MOST_BYTES} at most")
    return found


def main(arguments: list[str]) -> int:
    """Build, and say what is to be taken along and what it needs."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.build", description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that will import the modules")
    parser.add_argument("--archs", default=ARCHS, help=f"parts to compile for, default {ARCHS}")
    options = parser.parse_args(arguments)
    wrong = []
    for path in build(options.python, options.archs):
        symbols = subprocess.run(["readelf", "--version-info", path], capture_output=True, text=True, check=True).stdout
        needs = ", ".join(f"{name} {'.'.join(map(str, newest(symbols, name)))}" for name in ("GLIBC", "GLIBCXX"))
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 2**20:.1f} MiB, needs {needs}")
        wrong += faults(path, symbols)
    print("\n".join(wrong) or "take along both by name: git ignores them")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
