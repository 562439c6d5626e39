"""What a user gets: the built wheel, installed where nothing of the checkout is, must run the README.

    python -m tests.wheel                                                 # this Python
    python -m tests.wheel --python python3.11 python3.12 --train          # others, and the trainer with what it needs

For each Python: ``python -m build`` in a copy of the tree makes a source distribution, and a wheel from that; an empty
environment gets the wheel and what it depends on, by constraints.txt; and tests/installed.py looks at it and runs the README's
blocks, in an empty folder. It takes a C++ compiler; settings of the build are those at the top of setup.py.

Where the package index has no CPU build of the pinned torch for a Python, what needs torch is skipped and the line says so: the
other builds bring gigabytes of CUDA. ``--any-torch`` takes those. Minutes for each Python, most of them compiling;
tests/test_wheel.py does the same for one Python with nothing compiled, and torch as it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tests.csrc.building import ROOT, copy_of_the_tree
from tests.readme_blocks import python_blocks

CONSTRAINTS = ROOT / "constraints.txt"
SOURCES = {"vmf_kernels": "vmf_kernels", "vmf_pretrain": "python/vmf_pretrain", "vmf_bench": "python/vmf_bench"}
OURS = ("PYTHON", "VIRTUAL_ENV", "TRITON_")  # settings of the Python that runs this, or of its tests


class WheelError(Exception):
    """A step that failed; the message has what it printed."""


def run(command: Sequence[str | Path], folder: Path, **settings: str) -> str:
    """What a command prints, in a folder, with no settings of this Python.

    Raises:
        WheelError: it failed.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=kept | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise WheelError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def build_wheel(python: Path, tree: Path, *options: str, **settings: str) -> Path:
    """The wheel that ``python -m build`` makes of the tree's source distribution; both lie in ``tree/dist``."""
    run([python, "-m", "build", *options], tree, PIP_CONSTRAINT=str(CONSTRAINTS), **settings)
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


def compiled_modules(wheel: Path) -> list[str]:
    """Which of the compiled modules a wheel holds."""
    names = zipfile.ZipFile(wheel).namelist()
    return [module for module in ("native", "cuda") if any(f"vmf_kernels/_{module}." in name for name in names)]


def source_files(tree: Path) -> list[str]:
    """Every file of the packages' sources, as it is to be named below site-packages."""
    return [
        f"{package}/{path.relative_to(tree / folder)}"
        for package, folder in SOURCES.items()
        for path in (tree / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]


def check_installation(python: Path, folder: Path, tree: Path, *, modules: Sequence[str], with_torch: bool) -> str:
    """What tests/installed.py prints when this Python runs it in a folder, which is made for it.

    Args:
        python: the environment's.
        folder: where to run, outside of the checkout.
        tree: the copy of the checkout that the wheel was built from.
        modules: compiled modules that have to be there.
        with_torch: run the README's blocks.

    Raises:
        WheelError: something is wrong with the installation.
    """
    folder.mkdir()
    shutil.copy2(ROOT / "tests" / "installed.py", folder)
    blocks = python_blocks(tree / "README.md") if with_torch else []
    order = {"checkout": str(ROOT), "files": source_files(tree), "modules": list(modules), "blocks": blocks}
    (folder / "order.json").write_text(json.dumps(order))
    return run([python, "installed.py", "order.json"], folder).strip()


def new_environment(python: str, folder: Path) -> Path:
    """The Python of a new and empty virtual environment."""
    run([python, "-m", "venv", folder], folder.parent)
    return folder / "bin" / "python"


def has_cpu_torch(python: Path, folder: Path) -> bool:
    """Whether pip finds a CPU build of the pinned torch for this Python."""
    pin = re.search(r"^(torch==\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    assert pin is not None, f"{CONSTRAINTS} pins no torch"
    try:
        run([python, "-m", "pip", "install", "--dry-run", "--no-deps", f"{pin[1]}+cpu"], folder)
    except WheelError:
        return False
    return True


def check_python(name: str, folder: Path, *, with_trainer: bool, any_torch: bool) -> str:
    """Build for a Python, install into an empty environment of it, and check that; the result in a line.

    Args:
        name: the Python's command.
        folder: where all of it goes; made here.
        with_trainer: install the extra ``train`` as well and ask ``vmf-pretrain`` for its help.
        any_torch: take a torch that is no CPU build.

    Raises:
        WheelError: a step failed.
    """
    folder.mkdir()
    start = time.monotonic()
    tree = copy_of_the_tree(folder / "tree")
    builder = new_environment(name, folder / "builder")
    run([builder, "-m", "pip", "install", "-c", CONSTRAINTS, "build"], folder)
    wheel = build_wheel(builder, tree, VMF_REQUIRE_NATIVE="1")
    python = new_environment(name, folder / "installed")
    with_torch = any_torch or has_cpu_torch(python, folder)
    extra = "[train]" if with_trainer and with_torch else ""
    options = ["-c", CONSTRAINTS] if with_torch else ["--no-deps"]
    run([python, "-m", "pip", "install", *options, f"{wheel}{extra}"], folder)
    modules = compiled_modules(wheel)
    check_installation(python, folder / "empty", tree, modules=modules, with_torch=with_torch)
    if with_torch:
        run([python.parent / "vmf-bench", "--quick", "--out", folder / "bench"], folder)
    if extra:
        run([python.parent / "vmf-pretrain", "--help"], folder)
    ran = (
        "the README's blocks and vmf-bench run"
        if with_torch
        else "the README not run, for pip finds no CPU build of torch"
    )
    trainer = ", vmf-pretrain too" if extra else ""
    return f"{wheel.name} with {' and '.join(modules)}, which loads; {ran}{trainer}; {time.monotonic() - start:.0f} s"


def main() -> int:
    """Check each Python."""
    parser = argparse.ArgumentParser(description="Build, install into an empty environment, and run the README there.")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="commands of the Pythons to check")
    parser.add_argument(
        "--train", action="store_true", help="install the extra train, and ask vmf-pretrain for its help"
    )
    parser.add_argument("--any-torch", action="store_true", help="take a torch that is no CPU build: gigabytes")
    asked = parser.parse_args()
    failed = 0
    for number, name in enumerate(asked.python):
        with tempfile.TemporaryDirectory() as folder:
            try:
                command = os.path.abspath(shutil.which(name) or name)  # a relative one is left behind with this folder
                place = Path(folder, str(number))
                said = check_python(command, place, with_trainer=asked.train, any_torch=asked.any_torch)
            except WheelError as fault:
                said, failed = f"FAILED: {fault}", failed + 1
        print(f"{name}: {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
