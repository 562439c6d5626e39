"""The CUDA module for a GPU: built for another interpreter, with bounded waits, and the check whether it can be used."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("setuptools", reason="setup.py needs setuptools")

from bench.gpu import build, module
from tests.csrc.building import has_tools, setup_module
from tests.csrc.test_build import LOAD, needed_libraries
from vmf_kernels.backends.cuda import binding

SUFFIX = ".cpython-399-some-system.so"


@pytest.fixture
def no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if none were loaded, and no GPU here."""
    monkeypatch.delitem(sys.modules, module.NAME, raising=False)
    monkeypatch.setattr(module, "part_of_gpu", lambda: None)


def made_up(**attributes: object) -> ModuleType:
    """A module as csrc/cuda's bindings make it."""
    made = ModuleType(module.NAME)
    made.__spec__ = importlib.util.spec_from_loader(module.NAME, loader=None)
    digest = setup_module().source_digest(module.SOURCES)
    usual = {"__file__": "a file", "source_digest": digest, "archs": ["90a"], "has_bounded_waits": False}
    for name, value in (usual | attributes).items():
        setattr(made, name, value)
    return made


def test_a_module_of_these_sources_for_this_gpu_can_be_used(no_module: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for attributes, gpu, reason in (
        ({}, None, None),
        ({}, "9.0", None),
        ({"archs": ["80", "90a", "100"]}, "9.0", None),
        ({}, "8.9", "its passes are for compute capability 9.0, but the GPU has 8.9"),
        ({"archs": ["80"]}, "9.0", "a file has code for 80; build it with 90a among VMF_CUDA_ARCHS"),
        ({"source_digest": "0123"}, None, "a file is built from sources 0123, but csrc/cuda is "),
        ({"has_bounded_waits": True}, None, "a file is built to look for a hang"),
    ):
        monkeypatch.setitem(sys.modules, module.NAME, made_up(**attributes))
        found = module.usable(gpu)
        assert (found is None) if reason is None else (found or "").startswith(reason), f"{attributes}: {found}"


def test_where_none_is_built_it_says_what_would_be(
    no_module: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vmf_kernels").mkdir()
    (tmp_path / "vmf_kernels" / "__init__.py").touch()
    (tmp_path / "vmf_kernels" / f"_cuda{SUFFIX}").touch()
    command = [sys.executable, "-S", "-m", "bench.gpu.module"]
    path = os.pathsep.join([str(tmp_path), str(module.ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "PATH": "", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert f"no CUDA module to use: no {module.own_names()[0]} in vmf_kernels (_cuda{SUFFIX})" in done.stderr


def test_a_file_that_is_no_module_cannot_be_loaded(no_module: None, tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"nothing.so is no compiled module; expected a file such as _cuda"):
        module.load(tmp_path / "nothing.so")
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(ImportError):
        module.load(tmp_path / "text.so")
    assert module.NAME not in sys.modules


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What the backend knows of its module is asked anew, before and after."""
    for function in (binding.missing, binding.module):
        function.cache_clear()
    yield
    for function in (binding.missing, binding.module):
        function.cache_clear()


def test_a_module_that_was_loaded_from_a_file_is_the_backends(
    no_module: None, forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = made_up()
    monkeypatch.setitem(sys.modules, module.NAME, loaded)
    assert binding.missing() is None
    assert binding.module() is loaded
    with pytest.raises(ImportError, match="is loaded already, from a file; load"):
        module.load(Path("another"))


def test_the_plan_is_for_the_interpreter_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_tools("cuda"):
        pytest.skip("no nvcc")
    builder = setup_module()
    python = builder.Interpreter("/headers/of/another", SUFFIX)
    release, bounded = build.jobs(SUFFIX)
    for job, defined in ((release, False), (bounded, True)):
        with build.settings(job.settings):
            plan, folder = builder.cuda_plan(python), builder.ninja_folder("cuda", python)
        flags = {unit.source.name: " ".join(unit.flags) for unit in plan.units}
        assert "-isystem /headers/of/another" in flags["bindings.cpp"]
        assert f"-DVMF_SOURCE_DIGEST={builder.source_digest(module.SOURCES)}" in flags["bindings.cpp"]
        assert "/headers/of/another" not in flags["rows.cu"]
        assert {"-DVMF_BOUNDED_WAITS" in line for line in flags.values()} == {defined}
        assert [flag for flag in plan.flags if "gencode" in flag] == ["-gencode=arch=compute_90a,code=sm_90a"]
        assert folder.name == SUFFIX.strip(".")
        assert ("bounded" in str(folder)) == ("bounded" in str(job.target)) == defined
    assert "VMF_CUDA_BOUNDED_WAITS" not in os.environ


def test_an_interpreter_is_asked_for_its_headers_and_its_suffix(tmp_path: Path) -> None:
    assert build.asked(sys.executable) == list(setup_module().HERE)
    with pytest.raises(SystemExit, match="/nowhere/python does not run"):
        build.asked("/nowhere/python")
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho \'["/no/headers", ".so"]\'\n')
    bare.chmod(0o755)
    with pytest.raises(SystemExit, match=r"has no headers: expected /no/headers/Python\.h"):
        build.asked(str(bare))


def test_a_module_that_would_not_load_elsewhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "_cuda.so"
    file.write_bytes(b"x" * 100)
    assert build.newest("GLIBC_2.4 GLIBC_2.34 GLIBC_2.9 GLIBCXX_3.4.29", "GLIBC") == (2, 34)
    assert build.faults(file, "GLIBC_2.34 GLIBCXX_3.4.29") == []
    assert build.faults(file, "GLIBC_2.36") == ["_cuda.so needs GLIBC 2.36; expected 2.34 at most"]
    monkeypatch.setattr(build, "MOST_BYTES", 99)
    assert build.faults(file, "") == ["_cuda.so has 100 bytes; expected 99 at most"]


def test_what_was_built_for_others_needs_system_libraries_only() -> None:
    files = [*(module.ROOT / "vmf_kernels").glob("_cuda.*.so"), *module.BOUNDED_FOLDER.glob("_cuda.*.so")]
    if not files:
        pytest.skip("none is built")
    for file in files:
        assert needed_libraries(file) <= {"libstdc++", "libgcc_s", "libm", "libc", "libpthread", "libdl", "librt"} | {
            "ld-linux-x86-64",
            "ld-linux-aarch64",
        }


def test_what_was_built_for_another_interpreter_is_imported_by_it() -> None:
    files = [file for file in (module.ROOT / "vmf_kernels").glob("_cuda.cpython-3*.so") if file != built_for_this()]
    pythons = {
        file: shutil.which("python3." + file.name.removeprefix("_cuda.cpython-3").partition("-")[0]) for file in files
    }
    found = {file: python for file, python in pythons.items() if python is not None}
    if not found:
        pytest.skip("no module for another interpreter is here together with that interpreter")
    for file, python in found.items():
        command = [python, "-c", LOAD, "_cuda", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def built_for_this() -> Path:
    return module.ROOT / "vmf_kernels" / module.own_names()[0]


def test_the_digest_is_of_names_and_bytes(tmp_path: Path) -> None:
    digest = setup_module().source_digest
    (tmp_path / "a.cu").write_text("one")
    (tmp_path / "README.md").write_text("no source")
    first = digest(tmp_path)
    (tmp_path / "README.md").write_text("changed")
    assert digest(tmp_path) == first
    (tmp_path / "a.cu").write_text("two")
    second = digest(tmp_path)
    (tmp_path / "a.cu").rename(tmp_path / "b.cu")
    assert len({first, second, digest(tmp_path)}) == 3
