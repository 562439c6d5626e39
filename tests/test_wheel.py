"""The wheel, installed where the checkout is not, runs the README; ``python -m tests.wheel`` does it for real.

Here the environment is empty but for a path to the packages of this Python, so that torch is not installed again, and the
compiled module is a toy that shows where one ends up, so that nothing takes minutes.
"""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("build.env", reason="makes the wheel")  # the folder build of a checkout is no such package

from tests.csrc.building import ROOT, copy_of_the_tree, has_tools, with_toy_module
from tests.wheel import SOURCES, WheelError, build_wheel, check_installation, compiled_modules, run, source_files
from vmf_kernels import __version__


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is built: the checkout with a module that compiles in no time."""
    return with_toy_module(copy_of_the_tree(tmp_path_factory.mktemp("wheel") / "tree"))


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """Built from the source distribution that was built from the tree."""
    without_cuda = {"VMF_CUDA_ARCHS": "none", "VMF_REQUIRE_CUDA": "0"}  # CI requires the module, of the checkout
    return build_wheel(Path(sys.executable), tree, "--no-isolation", **without_cuda)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, and a path to the packages of this one for all the rest."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    python = folder / "bin" / "python"
    options = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], folder)
    # A path file of a folder that a path file names is not read: the checkout, installed editable there, stays unknown.
    (site_packages(python) / "rest.pth").write_text(sysconfig.get_path("purelib"))
    return python


def site_packages(python: Path) -> Path:
    """Where an environment has its packages."""
    (found,) = (python.parents[1] / "lib").glob("python*/site-packages")
    return found


def test_the_wheel_holds_the_packages_and_what_is_compiled(
    environment: Path, tree: Path, wheel: Path, tmp_path: Path
) -> None:
    assert compiled_modules(wheel) == (["native"] if has_tools("native") else [])
    check_installation(environment, tmp_path / "empty", tree, modules=compiled_modules(wheel), with_torch=False)


def test_the_wheel_holds_nothing_but_the_packages(wheel: Path) -> None:
    folders = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert folders == {"vmf_kernels", "vmf_pretrain", "vmf_bench", f"vmf_kernels-{__version__}.dist-info"}


def test_installed_the_readme_runs_outside_the_checkout(environment: Path, tree: Path, tmp_path: Path) -> None:
    for toy in site_packages(environment).glob("vmf_kernels/_native.*"):
        toy.unlink()  # it computes nothing
    check_installation(environment, tmp_path / "empty", tree, modules=[], with_torch=True)
    assert "usage: vmf-pretrain" in run([environment.parent / "vmf-pretrain", "--help"], tmp_path)


def test_installed_vmf_bench_runs_outside_the_checkout(environment: Path, tmp_path: Path) -> None:
    for toy in site_packages(environment).glob("vmf_kernels/_native.*"):
        toy.unlink()  # it computes nothing
    # its roof, measured for half a minute, is tests/bench_tool/test_roof.py's: here of small tensors
    roof = site_packages(environment) / "vmf_bench" / "roof.py"
    text = roof.read_text()
    assert text.count('{"cpu": 2048') == text.count('{"cpu": 2**28') == 1, "the sizes of the roof have moved"
    roof.write_text(text.replace('{"cpu": 2048', '{"cpu": 256').replace('{"cpu": 2**28', '{"cpu": 2**20'))
    command = environment.parent / "vmf-bench"
    sizes = ["--quick", "--rows", "10", "--prototypes", "16", "--dim", "16", "--dtype", "float32"]
    run([command, *sizes, "--only", "streaming", "--out", tmp_path], tmp_path)
    assert "<svg" in (tmp_path / "vmf-bench.html").read_text()


def test_sources_name_every_folder(tree: Path) -> None:
    """The list that an installation is compared with is not empty anywhere."""
    named = {str(Path(name).parent) for name in source_files(tree)}
    folders = {path.parent for path in (ROOT / "vmf_kernels").rglob("__init__.py")}
    assert {str(folder.relative_to(ROOT)) for folder in folders} <= named


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """A tree of the packages with nothing in them and a README, and the Python of an environment that has them."""
    tree = tmp_path / "tree"
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment"], tmp_path)
    python = tmp_path / "environment" / "bin" / "python"
    for package, folder in SOURCES.items():
        for place in (tree / folder, site_packages(python) / package):
            place.mkdir(parents=True)
            (place / "__init__.py").touch()
    (tree / "README.md").write_text("```python\nprint(1)\n```\n")
    return tree, python


def test_a_small_installation_without_a_fault_passes(small: tuple[Path, Path], tmp_path: Path) -> None:
    tree, python = small
    assert (
        check_installation(python, tmp_path / "empty", tree, modules=[], with_torch=True) == "installed as it should be"
    )


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda tree, place: (tree / "vmf_kernels" / "new.py").touch(), "vmf_kernels/new.py is absent"),
        (
            lambda tree, place: (place / "vmf_kernels" / "gone.py").touch(),
            "vmf_kernels/gone.py is there, and not in the",
        ),
        (
            lambda tree, place: (place / "vmf_kernels" / "_old.so").touch(),
            "vmf_kernels/_old.so is there, and not in the",
        ),
        (lambda tree, place: shutil.rmtree(place / "vmf_pretrain"), "vmf_pretrain is not installed"),
        (lambda tree, place: (tree / "README.md").write_text("```python\n1\n```\n"), "README block 0 prints nothing"),
        (lambda tree, place: (tree / "README.md").write_text("```python\n1 / 0\n```\n"), "ZeroDivisionError"),
    ],
    ids=["absent", "left over", "old module", "not installed", "silent", "failing"],
)
def test_a_fault_of_an_installation_is_found(
    small: tuple[Path, Path], tmp_path: Path, fault: Callable[[Path, Path], None], said: str
) -> None:
    """Negative control."""
    tree, python = small
    fault(tree, site_packages(python))
    with pytest.raises(WheelError, match=re.escape(said)):
        check_installation(python, tmp_path / "empty", tree, modules=[], with_torch=True)


def test_a_module_that_is_absent_or_does_not_load_is_found(small: tuple[Path, Path], tmp_path: Path) -> None:
    """Negative control."""
    tree, python = small
    with pytest.raises(WheelError, match=r"vmf_kernels\._native is absent"):
        check_installation(python, tmp_path / "absent", tree, modules=["native"], with_torch=False)
    (site_packages(python) / "vmf_kernels" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    with pytest.raises(WheelError, match=r"vmf_kernels\._native does not load"):
        check_installation(python, tmp_path / "empty", tree, modules=["native"], with_torch=False)


def test_packages_of_the_checkout_are_found(small: tuple[Path, Path], tmp_path: Path) -> None:
    """Negative control."""
    tree, python = small
    for package in SOURCES:
        shutil.rmtree(site_packages(python) / package)
    (site_packages(python) / "checkout.pth").write_text(f"{ROOT}\n{ROOT / 'python'}\n")
    with pytest.raises(
        WheelError,
        match=r"vmf_kernels is that of the checkout(.|\n)*vmf_pretrain is that of the checkout(.|\n)*vmf_bench is",
    ):
        check_installation(python, tmp_path / "empty", tree, modules=[], with_torch=False)
