"""The compiled CUDA module of this checkout: whether one is here that can be used, and loading one from a file.

    python -m bench.gpu.module      says which file is used, exit code 0; or why none can be, exit code 1

Nothing of CUDA is called and torch is not imported: a module is usable where it imports, is built from the sources that lie
beside it, and has code for the part.
"""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
BOUNDED_FOLDER = ROOT / "build" / "bounded"
NAME = "vmf_kernels._cuda"
HOPPER = "90"  # compute capability * 10, as nvidia-smi has it without its point
REPLY_SECONDS = 20


def load(path: Path) -> ModuleType:
    """A file as ``vmf_kernels._cuda``; what imports that afterwards gets it.

    Raises:
        ImportError: the file is no module for this interpreter, or another one is loaded already.
    """
    if NAME in sys.modules:
        raise ImportError(f"{NAME} is loaded already, from {sys.modules[NAME].__file__}; load {path} before anything uses it")
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(f"{path} is no compiled module; expected a file such as _cuda.cpython-312-x86_64-linux-gnu.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


def usable(path: Path | None = None, arch: str | None = None) -> str | None:
    """Why the module is of no use here, or None.

    Args:
        path: a file; None for what ``vmf_kernels._cuda`` is.
        arch: compute capability * 10, such as "90"; None for that of GPU 0, or where there is none for any.
    """
    found = find(path)
    if isinstance(found, str):
        return found
    expected = runpy.run_path(str(ROOT / "csrc" / "digest.py"))["source_digest"](SOURCES)
    built_from = getattr(found, "source_digest", None)
    if built_from != expected:
        return f"{found.__file__} is built from other sources ({built_from}) than csrc/cuda ({expected}); build it again"
    part = arch or part_of_gpu()
    if part is not None and not {part, f"{part}a"} & set(found.archs):
        return f"{found.__file__} has code for {' '.join(found.archs)}, but the GPU is {part}; build it again for that"
    return None


def find(path: Path | None = None) -> ModuleType | str:
    """The module, imported; or why it cannot be."""
    try:
        if path is not None:
            return sys.modules[NAME] if is_loaded(path) else load(path)
        if NAME not in sys.modules:
            spec = importlib.util.find_spec("vmf_kernels")  # without its __init__, which imports torch
            places = list(spec.submodule_search_locations or []) if spec is not None else []
            files = [file for place in places for file in Path(place).glob("_cuda*.so") if fits(file)]
            if not files:
                others = ", ".join(file.name for place in places for file in Path(place).glob("_cuda*.so"))
                return f"{NAME} is not built for this Python; beside it is {others or 'no other'}"
            return load(files[0])
        return sys.modules[NAME]
    except ImportError as error:
        return f"it does not import: {error}"


def fits(file: Path) -> bool:
    """Whether a file's name is one that this interpreter imports."""
    return any(file.name == f"_cuda{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)


def is_loaded(path: Path) -> bool:
    """Whether the module in use is this file."""
    return NAME in sys.modules and Path(str(sys.modules[NAME].__file__)).resolve() == path.resolve()


def part_of_gpu() -> str | None:
    """Compute capability * 10 of GPU 0, such as "90"; None where nvidia-smi names none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--id=0", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=REPLY_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip().replace(".", "") or None if done.returncode == 0 else None


if __name__ == "__main__":
    if (reason := usable()) is not None:
        sys.exit(f"no CUDA module to use: {reason}")
    module = sys.modules[NAME]
    print(f"{module.__file__}: archs {' '.join(module.archs)}, sources {module.source_digest}")
