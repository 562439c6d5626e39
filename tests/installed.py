"""What an installed vmf_kernels must show: run by the installation's own Python, in a folder of its own.

    python installed.py ORDER.json

It imports nothing of the checkout, and a copy of it is what runs, so that the checkout is nowhere on ``sys.path``. ORDER.json
has

    checkout    the folder that nothing may be imported from
    files       what must be there, relative to site-packages
    modules     compiled modules that must be there and load, such as "native"
    blocks      examples, each a Python program; none where there is no torch

Prints a line for each fault and exits with 1 if there is one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("vmf_kernels", "vmf_pretrain", "vmf_bench")


def place_of(package: str) -> Path | None:
    """The folder a package would be imported from; imports nothing, for where there is no torch."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent


def faults_of_places(checkout: Path) -> Iterator[str]:
    """Packages that are absent, or not those of this environment."""
    for package in PACKAGES:
        folder = place_of(package)
        if folder is None:
            yield f"{package} is not installed"
        elif folder.is_relative_to(checkout):
            yield f"{package} is that of the checkout, {folder}"
        elif not folder.is_relative_to(Path(sys.prefix).resolve()):
            yield f"{package} is in {folder}, outside of {sys.prefix}"


def faults_of_files(files: list[str], modules: list[str]) -> Iterator[str]:
    """Files that are absent, or there without being asked for: a module that is gone from the sources, or a test."""
    for package in PACKAGES:
        folder = place_of(package)
        if folder is None:
            continue
        found = {str(path.relative_to(folder.parent)) for path in folder.rglob("*") if path.is_file()}
        found = {name for name in found if "__pycache__" not in name and not name.startswith(compiled_names(modules))}
        expected = {name for name in files if name.startswith(f"{package}/")}
        yield from (f"{name} is absent" for name in sorted(expected - found))
        yield from (f"{name} is there, and not in the sources" for name in sorted(found - expected))


def compiled_names(modules: list[str]) -> tuple[str, ...]:
    """How the paths of compiled modules start, relative to site-packages."""
    return tuple(f"vmf_kernels/_{name}." for name in modules)


def faults_of_modules(modules: list[str]) -> Iterator[str]:
    """Compiled modules that are absent or do not load; they need no torch."""
    folder = place_of("vmf_kernels")
    for name in modules:
        built = [] if folder is None else [*folder.glob(f"_{name}.*")]
        if not built:
            yield f"vmf_kernels._{name} is absent"
            continue
        spec = importlib.util.spec_from_file_location(f"_{name}", built[0])
        if spec is None or spec.loader is None:
            yield f"{built[0]} is no module of this Python"
            continue
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except ImportError as error:
            yield f"vmf_kernels._{name} does not load: {error}"


def silent_blocks(blocks: list[str]) -> Iterator[str]:
    """Examples that print nothing; one that fails ends all with its traceback, as a user would see it."""
    for number, block in enumerate(blocks):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, f"README block {number}", "exec"), {"__name__": "__main__"})
        if not printed.getvalue().strip():
            yield f"README block {number} prints nothing"


def main() -> int:
    """Check what the order says."""
    order = json.loads(Path(sys.argv[1]).read_text())
    faults = [
        *faults_of_places(Path(order["checkout"]).resolve()),
        *faults_of_files(order["files"], order["modules"]),
        *faults_of_modules(order["modules"]),
        *silent_blocks(order["blocks"]),
    ]
    print("\n".join(faults) or "installed as it should be")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
