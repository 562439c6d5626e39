"""setup.py as a module, and copies of what an installation reads, for the tests of the build."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
READ = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "constraints.txt",
    "csrc",
    "vmf_kernels",
    "python",
)

# The shape of csrc/cpu in a tenth of a second: a module of Python that needs no pybind11, and kernels.
TOY = {
    "bindings.cpp": '#include <Python.h>\n#include "toy.h"\nstatic PyModuleDef toy{PyModuleDef_HEAD_INIT, "_native"};\n'
    "PyMODINIT_FUNC PyInit__native() { return portable::kernel() == 42 ? PyModule_Create(&toy) : nullptr; }\n",
    "toy.h": "namespace portable { int kernel(); }\n",
    "kernels.cpp": "namespace VMF_ISA { int kernel() { return 42; } }\n",
}


def setup_module() -> ModuleType:
    """setup.py, imported; nothing is set up."""
    name = "setup_of_vmf_kernels"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "setup.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def copy_of_the_tree(folder: Path) -> Path:
    """What an installation reads, without anything built."""
    for name in READ:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def has_tools(name: str) -> bool:
    """Whether this machine has the compilers of a module."""
    builder = setup_module()
    try:
        builder.host_compiler()
        if name == "cuda":
            builder.find_nvcc()
    except builder.CannotBuildError:
        return False
    return True


def with_toy_module(folder: Path) -> Path:
    """A copy of the tree whose csrc/cpu is made one that compiles in no time."""
    shutil.rmtree(folder / "csrc" / "cpu")
    (folder / "csrc" / "cpu").mkdir()
    for name, text in TOY.items():
        (folder / "csrc" / "cpu" / name).write_text(text)
    return folder
