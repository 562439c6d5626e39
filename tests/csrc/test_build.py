"""setup.py: what it builds, what that depends on, and that an installation without a compiler succeeds and says so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("setuptools", reason="setup.py needs setuptools")

from tests.csrc.building import ROOT, copy_of_the_tree, has_tools, setup_module, with_toy_module
from vmf_kernels import __version__

pytestmark = pytest.mark.compiles

MODULES = ("native", "cuda")
SYSTEM_LIBRARIES = {
    "libstdc++",
    "libgcc_s",
    "libgomp",
    "libm",
    "libc",
    "libpthread",
    "libdl",
    "librt",
    "ld-linux-x86-64",
}
SYSTEM_LIBRARIES |= {"ld-linux-aarch64"}
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(sys.argv[1], sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
assert "libcuda." not in open("/proc/self/maps").read()
"""


def module_path(name: str) -> Path:
    """Where a module is after an editable installation."""
    return ROOT / "vmf_kernels" / f"_{name}{setup_module().SUFFIX}"


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> Path:
    """A built module."""
    if not module_path(request.param).exists():
        pytest.skip(f"vmf_kernels._{request.param} is not built")
    return module_path(request.param)


def needed_libraries(path: Path) -> set[str]:
    """Names without version of what the dynamic linker loads with a library."""
    printed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    return {name.partition(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", printed)}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_there_where_its_compilers_are(name: str) -> None:
    if not has_tools(name):
        pytest.skip("no compiler")
    assert module_path(name).exists(), (
        f"{module_path(name)} is missing: install again, or python setup.py build_ext --inplace"
    )


def test_a_module_needs_system_libraries_only(module: Path) -> None:
    foreign = needed_libraries(module) - SYSTEM_LIBRARIES
    assert not foreign, f"{module.name} is linked to {foreign}"


def test_a_module_of_torch_needs_more() -> None:
    assert needed_libraries(Path(torch._C.__file__)) - SYSTEM_LIBRARIES, "the test above finds nothing"


def test_a_module_loads_without_torch_and_without_the_driver(module: Path) -> None:
    command = [sys.executable, "-c", LOAD, module.name.partition(".")[0], str(module)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def shared_symbols(listing: str, instruction_set: str) -> list[str]:
    """Of nm's lines, the functions that the linker keeps one copy of, whichever instructions that one uses."""
    weak = re.findall(r"^\w+ [WVu] (\w+)$", listing, re.MULTILINE)
    own = f"3vmf3cpu{len(instruction_set)}{instruction_set}"
    return [name for name in weak if own not in name]


def test_kernels_of_one_instruction_set_share_no_function_with_another() -> None:
    folder = setup_module().BUILD / "native" / setup_module().SUFFIX.strip(".")
    objects = sorted(folder.glob("kernels.*.o"))
    if not objects:
        pytest.skip(f"{folder} has no objects: the module was built elsewhere")
    for path in objects:
        listing = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        shared = shared_symbols(listing, path.suffixes[0][1:])
        assert not shared, f"{path.name} has {shared}: a part without its instructions may end up with this copy"


def test_a_shared_function_is_found() -> None:
    own, foreign = "_ZN3vmf3cpu4avx21fEv", "_ZNSt6vectorIfSaIfEED2Ev"
    listing = f"0000000000000000 W {own}\n0000000000000000 W {foreign}\n0000000000000010 T _ZN3vmf3cpu1gEv\n"
    assert shared_symbols(listing, "avx2") == [foreign]
    assert shared_symbols(listing, "avx512") == [own, foreign]


def build(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """``python arguments`` in a copy of the tree, with no settings of the build but these; its messages in ``stdout``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VMF_")}
    return subprocess.run(
        [sys.executable, *(arguments or ("setup.py", "build_ext", "--inplace"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=folder,
        env=kept | settings,
    )


@pytest.fixture
def toy_tree(tmp_path: Path) -> Iterator[Path]:
    """A copy of the tree whose csrc/cpu compiles in no time."""
    pytest.importorskip("pybind11", reason="a requirement of the build")
    if not has_tools("native"):
        pytest.skip("no compiler")
    folder = with_toy_module(copy_of_the_tree(tmp_path / "tree"))
    yield folder
    shutil.rmtree(folder)


def built_in(folder: Path) -> list[str]:
    """Modules beside their package's sources."""
    return sorted(path.name.partition(".")[0] for path in (folder / "vmf_kernels").glob("*.so"))


def test_installing_without_a_compiler_succeeds_and_says_so(tmp_path: Path) -> None:
    """That it then runs without the modules is tests/test_wheel.py's."""
    folder, installed = copy_of_the_tree(tmp_path / "tree"), tmp_path / "installed"
    options = (
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
        "--disable-pip-version-check",
        "-v",
        "--target",
        str(installed),
    )
    done = build(folder, "-m", "pip", "install", *options, ".", CXX="/nowhere/g++")
    assert done.returncode == 0, done.stdout
    for name, instead in (("native", "streaming backend"), ("cuda", "Triton kernels")):
        pattern = rf"warning: installed without vmf_kernels\._{name}: .*\. .*{instead}"
        assert len(re.findall(pattern, done.stdout)) == 1, done.stdout
    assert "no C++ compiler: CXX is '/nowhere/g++'" in done.stdout
    assert not list(installed.glob("vmf_kernels/*.so"))
    assert (installed / f"vmf_kernels-{__version__}.dist-info").exists()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_is_required_and_cannot_be_built_is_an_error(tmp_path: Path, name: str) -> None:
    settings = {"CXX": "/nowhere/g++", f"VMF_REQUIRE_{name.upper()}": "1"}
    done = build(copy_of_the_tree(tmp_path / "tree"), **settings)
    assert done.returncode != 0, done.stdout
    assert f"error: vmf_kernels._{name} cannot be built" in done.stdout


def test_the_second_build_compiles_what_a_changed_header_concerns(toy_tree: Path) -> None:
    first = build(toy_tree, VMF_CUDA_ARCHS="none", VMF_REQUIRE_NATIVE="1")
    assert built_in(toy_tree) == ["_native"], first.stdout
    assert "kernels.portable.o" in first.stdout
    assert ("kernels.avx2.o" in first.stdout) == ("kernels.avx512.o" in first.stdout)
    command = [sys.executable, "-c", LOAD, "_native", str(next((toy_tree / "vmf_kernels").glob("*.so")))]
    assert subprocess.run(command, check=False).returncode == 0
    assert "no work to do" in build(toy_tree, VMF_CUDA_ARCHS="none").stdout
    header = toy_tree / "csrc" / "cpu" / "toy.h"
    header.write_text(header.read_text() + "// changed\n")
    third = build(toy_tree, VMF_CUDA_ARCHS="none").stdout
    assert "bindings.o" in third
    assert "kernels.portable.o" not in third, third


def test_sources_that_do_not_compile_show_why_and_leave_no_old_module(toy_tree: Path) -> None:
    build(toy_tree, VMF_CUDA_ARCHS="none")
    assert built_in(toy_tree) == ["_native"]
    (toy_tree / "csrc" / "cpu" / "bindings.cpp").write_text("#error a fault of ours\n")
    failed = build(toy_tree, VMF_CUDA_ARCHS="none")
    assert failed.returncode == 0, failed.stdout
    assert "#error a fault of ours" in failed.stdout
    assert "installed without vmf_kernels._native: its compilation failed" in failed.stdout
    assert built_in(toy_tree) == []
    assert build(toy_tree, VMF_CUDA_ARCHS="none", VMF_REQUIRE_NATIVE="1").returncode != 0


def test_a_source_distribution_holds_csrc_and_nothing_built(tmp_path: Path) -> None:
    folder = copy_of_the_tree(tmp_path / "tree")
    (folder / "vmf_kernels" / f"_native{setup_module().SUFFIX}").touch()
    done = build(folder, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    suffixes = {".cpp", ".h", ".cu", ".cuh"}
    sources = {str(path.relative_to(folder)) for path in (folder / "csrc").rglob("*") if path.suffix in suffixes}
    assert len(sources) >= 10, sources
    assert not sources - names, f"not in the archive: {sources - names}"
    assert not [name for name in names if name.endswith(".so")]


def test_packages_are_copied_without_what_an_earlier_build_left(tmp_path: Path) -> None:
    folder = copy_of_the_tree(tmp_path / "tree")
    stale = folder / "build" / "lib" / "vmf_kernels" / "gone.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    done = build(folder, "setup.py", "--quiet", "build_py", "--build-lib", "build/lib")
    assert (stale.parent / "__init__.py").exists(), done.stdout
    assert not stale.exists(), "a wheel from here would hold vmf_kernels/gone.py"


@pytest.mark.parametrize("setting", ["9.0", "hopper", "80 90a 7", "75", "80,90a", "90b", ""])
def test_archs_that_are_none_are_refused(setting: str) -> None:
    with pytest.raises(SystemExit, match=r"VMF_CUDA_ARCHS='.*' has '.*': expected compute capabilities from 80 up"):
        setup_module().cuda_archs(setting)


@pytest.mark.parametrize(
    ("setting", "archs"),
    [
        (None, ["80", "90a", "100"]),
        ("90a", ["90a"]),
        (" 120f  80 120f", ["120f", "80"]),
        ("90", ["90a"]),  # plain code for Hopper only traps
        ("90 80 90a", ["90a", "80"]),
    ],
)
def test_archs_are_read(setting: str | None, archs: list[str]) -> None:
    assert setup_module().cuda_archs(setting) == archs


def test_a_bad_arch_is_an_error_also_where_nothing_is_required(tmp_path: Path) -> None:
    done = build(copy_of_the_tree(tmp_path / "tree"), CXX="/nowhere/g++", VMF_CUDA_ARCHS="9.0")
    assert done.returncode != 0, done.stdout
    assert "VMF_CUDA_ARCHS='9.0' has '9.0': expected" in done.stdout


def test_an_arch_that_nvcc_does_not_know_is_refused_by_name_and_left_out_by_default() -> None:
    if not has_tools("cuda"):
        pytest.skip("no nvcc")
    builder = setup_module()
    nvcc = builder.find_nvcc()
    with pytest.raises(SystemExit, match=r"VMF_CUDA_ARCHS has '999': .* knows .*80"):
        builder.known_archs(nvcc, builder.cuda_archs("80 999"))
    assert builder.known_archs(nvcc, builder.cuda_archs("80 90a")) == ["80", "90a"]
