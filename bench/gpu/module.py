"""The compiled CUDA module of this checkout: whether it can be used, and loading one from a file.

    python -m bench.gpu.module      says which file is used, exit code 0; or why none can be, exit code 1

A module can be used where it imports, is built from the sources that lie here, and has code for the GPU. Nothing of CUDA is
called, and torch is not imported.
"""

from __future__ import annotations

import importlib.util
import runpy
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
BOUNDED_FOLDER = ROOT / "build" / "bounded"
NAME = "vmf_kernels._cuda"
PART, CODE = "9.0", "90a"  # that the passes are for: compute capability, and the name nvcc has for its code
REPLY_SECONDS = 20


def load(path: Path) -> ModuleType:
    """Load a file as ``vmf_kernels._cuda``; later imports of that name get it.

    Raises:
        ImportError: the file is no module for this interpreter, or another one is loaded already.
    """
    if NAME in sys.modules:
        raise ImportError(f"{NAME} is loaded already, from {sys.modules[NAME].__file__}; load {path} before it is used")
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(f"{path} is no compiled module; expected a file such as {own_names()[0]}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


def usable(gpu: str | None = None) -> str | None:
    """Why the module of this checkout cannot be used here, or None.

    Args:
        gpu: compute capability, such as "9.0"; None for that of GPU 0, which need not be there.
    """
    try:
        module = sys.modules.get(NAME) or load(own_file())
    except ImportError as error:
        return str(error)
    expected = runpy.run_path(str(ROOT / "csrc" / "digest.py"))["source_digest"](SOURCES)
    if (made_of := getattr(module, "source_digest", "unknown")) != expected:
        return f"{module.__file__} is built from sources {made_of}, but csrc/cuda is {expected}; build it again"
    if module.has_bounded_waits:
        return f"{module.__file__} is built to look for a hang (VMF_CUDA_BOUNDED_WAITS); build it without"
    if CODE not in module.archs:
        return f"{module.__file__} has code for {' '.join(module.archs)}; build it with {CODE} among VMF_CUDA_ARCHS"
    part = gpu or part_of_gpu()
    return None if part in (None, PART) else f"its passes are for compute capability {PART}, but the GPU has {part}"


def own_names() -> list[str]:
    """File names that this interpreter imports; the most particular first."""
    return [f"_cuda{suffix}" for suffix in EXTENSION_SUFFIXES]


def own_file() -> Path:
    """The file that ``import vmf_kernels._cuda`` would load.

    Raises:
        ImportError: there is none.
    """
    spec = importlib.util.find_spec("vmf_kernels")  # does not run it, which would import torch
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec is not None else []
    for file in (folder / name for folder in folders for name in own_names()):
        if file.exists():
            return file
    others = ", ".join(file.name for folder in folders for file in sorted(folder.glob("_cuda*.so")))
    raise ImportError(
        f"no {own_names()[0]} in vmf_kernels ({others or 'nor another'}); python -m bench.gpu.build makes one"
    )


def part_of_gpu() -> str | None:
    """Compute capability of GPU 0, such as "9.0"; None where nvidia-smi names none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--id=0", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=REPLY_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


if __name__ == "__main__":
    if (reason := usable()) is not None:
        sys.exit(f"no CUDA module to use: {reason}")
    used = sys.modules[NAME]
    print(f"{used.__file__}: code for {' '.join(used.archs)}, sources {used.source_digest}")
