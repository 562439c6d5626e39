"""setup.py as a module, and copies of what an installation reads, for the tests of the build."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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


def units_of_the_stand_in(defines: list[str], optimisation: str) -> list[Any]:
    """What of csrc/cpu knows of a matrix unit, compiled for one that any machine has: tiles_stand_in.h.

    Its kernels for bf16 are those of tiles.h on portable vectors.

    Args:
        defines: of the instruction sets that there are besides.
        optimisation: of these kernels.
    """
    stand_in = f'-DVMF_TILES_STAND_IN="{ROOT / "tests" / "csrc" / "tiles_stand_in.h"}"'
    own = {"operator": defines, "dispatch": defines, "kernels": ["-DVMF_ISA=amx_bf16", "-Wno-psabi", optimisation]}
    return [
        setup_module().Unit(ROOT / "csrc" / "cpu" / f"{name}.cpp", f"stand_in.{name}.o", [*added, stand_in])
        for name, added in own.items()
    ]


@functools.cache
def module_with_stand_in() -> ModuleType | None:
    """vmf_kernels._native whose matrix unit is a stand-in; None where a compiler or what tiles.h needs of it is not there.

    What does not know of the stand-in is as in the module itself, and not compiled again if that was built here.
    """
    builder = setup_module()
    try:
        plan = builder.native_plan()
    except builder.CannotBuildError:
        return None
    if "amx_bf16" not in builder.known_sets(plan.compiler):
        return None
    units = [unit for unit in plan.units if unit.object in ("bindings.o", "kernels.portable.o")]
    plan = plan._replace(units=units + units_of_the_stand_in([], "-O1"))
    path = builder.run_ninja(plan, builder.ninja_folder("native"), f"_native.stand_in{builder.SUFFIX}")
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
