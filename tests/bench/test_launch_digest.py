"""What a launch was made from: a digest that follows code, constants and specialisation, and nothing else."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench.ahead_of_time import Launch
from bench.launch_digest import code_digest, digest_of, key_of

BLOCKS = '''
import triton
import triton.language as tl

FACTOR = tl.constexpr(2.0)
UNREAD = 7


@triton.jit
def scaled(x):
    """Times the factor."""
    return x * FACTOR  # exact
'''
KERNELS = '''
import triton
import triton.language as tl

from .blocks import scaled

VARYING = ["count"]


@triton.jit(do_not_specialize=VARYING)
def scale_kernel(p_x, count, N: tl.constexpr):
    """In place."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(p_x + i, scaled(tl.load(p_x + i, i < count)), i < count)
'''


def package(folder: Path, name: str, blocks: str, kernels: str) -> ModuleType:
    """Module ``kernels`` of a package beside ``blocks``."""
    name = f"{folder.name}_{name}"  # no other test's: what is imported once is not read again
    (folder / name).mkdir()
    for file, text in (("__init__.py", ""), ("blocks.py", blocks), ("kernels.py", kernels)):
        (folder / name / file).write_text(text)
    importlib.invalidate_caches()
    return importlib.import_module(f"{name}.kernels")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packages are found."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


MOVED = (BLOCKS.partition("@triton.jit")[0], KERNELS.replace("import scaled", "import FACTOR"))


@pytest.mark.parametrize(
    ("blocks", "kernels", "changes"),
    [
        (BLOCKS.replace("# exact", "# a power of two"), KERNELS, False),
        (BLOCKS.replace("Times the", "By the"), KERNELS.replace("In place", "Over what was there"), False),
        (BLOCKS, KERNELS.replace("(0) * N + tl", "(0) * N\\\n        + tl"), False),
        (BLOCKS.replace("UNREAD = 7", "UNREAD = 8"), KERNELS, False),
        (MOVED[0], MOVED[1] + BLOCKS[BLOCKS.index("@triton.jit") :], False),
        (BLOCKS, KERNELS.replace("i < count)), i", "i < count - 1)), i"), True),
        (BLOCKS.replace("x * FACTOR", "x / FACTOR"), KERNELS, True),
        (BLOCKS.replace("2.0", "3.0"), KERNELS, True),
        (BLOCKS, KERNELS.replace('["count"]', '["p_x"]'), True),
    ],
    ids=[
        "comment",
        "docstring",
        "formatting",
        "a constant that it does not read",
        "another module",
        "its code",
        "that of a function it calls",
        "a constant that one reads",
        "a constant of its decorator",
    ],
)
def test_only_what_is_compiled_changes_the_digest(blocks: str, kernels: str, changes: bool, folder: Path) -> None:
    before, after = package(folder, "before", BLOCKS, KERNELS), package(folder, "after", blocks, kernels)
    assert (code_digest(after.scale_kernel) != code_digest(before.scale_kernel)) is changes


def test_what_no_digest_covers_is_refused(folder: Path) -> None:
    blocks = BLOCKS.replace("FACTOR = ", "FACTOR = object()  # ")
    with pytest.raises(TypeError, match=r"a kernel reads FACTOR, .*: neither a constant nor a Triton function"):
        code_digest(package(folder, "opaque", blocks, KERNELS).scale_kernel)


X = torch.zeros(64)
OTHERS: dict[str, tuple[dict[str, Any], bool]] = {
    "other values of the same dtype": ({"p_x": torch.ones(128)}, False),
    "another multiple of 16": ({"count": 48}, False),
    "another dtype": ({"p_x": X.half()}, True),
    "an address off 16 bytes": ({"p_x": X[1:]}, True),
    "no multiple of 16": ({"count": 50}, True),
    "one": ({"count": 1}, True),
    "another constant": ({"N": 128}, True),
}


def launch_of(module: ModuleType) -> Launch:
    return Launch(module.scale_kernel, (4,), {"p_x": X, "count": 64, "N": 64}, {"num_warps": 4})


@pytest.mark.parametrize("other", OTHERS)
def test_only_what_triton_compiles_for_changes_the_key(other: str, folder: Path) -> None:
    launch = launch_of(package(folder, "keyed", BLOCKS, KERNELS))
    arguments, changes = OTHERS[other]
    changed = replace(launch, arguments=launch.arguments | arguments)
    assert (key_of(changed) != key_of(launch), digest_of(changed) != digest_of(launch)) == (changes, changes)


def test_options_count_and_the_grid_does_not(folder: Path) -> None:
    launch = launch_of(package(folder, "options", BLOCKS, KERNELS))
    assert digest_of(replace(launch, grid=(8,))) == digest_of(launch)
    assert digest_of(replace(launch, options={"num_warps": 8})) != digest_of(launch)
