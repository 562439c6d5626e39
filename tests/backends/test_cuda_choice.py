"""When the CUDA backend is chosen, its message when it cannot run, and the compiled module without a driver."""

from __future__ import annotations

import ctypes.util
import importlib.machinery
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import vmf_kernels
from tests.backends.cuda_stand_in import StandIn, standing_in
from vmf_kernels.backends import choice
from vmf_kernels.backends.cuda import binding, measured
from vmf_kernels.backends.triton import launch

pytestmark = pytest.mark.quick

BF16 = torch.bfloat16
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: tests/gpu")
BUILT = pytest.mark.skipif(
    importlib.util.find_spec(binding.NAME) is None, reason=f"{binding.NAME} has not been built here: no nvcc"
)
ENTRY = {"rows": 640, "prototypes": 1000, "cuda_ms": 1.0, "triton_ms": 1.5, "source": "bench/results/device/head.json"}


def tensors(
    dtype: torch.dtype = BF16, dim: int = 200, rows: int = 640, prototypes: int = 1000
) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, dim, dtype=dtype), torch.empty(prototypes, dim)


@pytest.mark.parametrize(
    ("dtype", "dim", "said"),
    [
        (torch.float32, 24, "it computes in bfloat16 or float16, but the features are torch.float32"),
        (torch.float64, 24, "it computes in bfloat16 or float16, but the features are torch.float64"),
        (BF16, 385, "the embedding dim is 385; it goes up to 384"),
        (BF16, 384, "it runs on NVIDIA GPUs, but the tensors are on cpu"),
    ],
)
def test_what_it_cannot_run_is_said(dtype: torch.dtype, dim: int, said: str) -> None:
    with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run here: {said}"):
        choice.choose_backend("cuda", *tensors(dtype, dim))


def reason_on(arch: int, archs: tuple[str, ...], runtime: int = 13000, driver: int = 13000) -> str | None:
    """What is said about a GPU of this compute capability, by a module built for these parts, beside this driver."""
    module = mock.Mock(archs=archs)
    module.runtime_version.return_value, module.driver_version.return_value = runtime, driver
    with (
        mock.patch.object(launch, "unsupported_device", return_value=None),
        mock.patch.object(launch, "target_of", return_value=launch.Target(arch, 132)),
        mock.patch.object(binding, "missing", return_value=None),
        mock.patch.object(binding, "module", return_value=module),
    ):
        return binding.unsupported_device(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("arch", "archs", "said"),
    [
        (90, ("80", "100"), "built for 80 100; install the package again with 90a among VMF_CUDA_ARCHS"),
        (80, ("80", "90a"), "its passes are for compute capability 9.0, but cuda:0 has 8.0"),
        (100, ("80", "90a"), "its passes are for compute capability 9.0, but cuda:0 has 10.0"),
    ],
)
def test_a_device_or_a_build_that_does_not_suit_is_said(arch: int, archs: tuple[str, ...], said: str) -> None:
    reason = reason_on(arch, archs)
    assert reason is not None
    assert said in reason, reason


def test_hopper_with_its_code_suits() -> None:
    """Negative control of the one above."""
    assert reason_on(90, ("80", "90a")) is None


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (12090, "vmf_kernels._cuda has been built with CUDA 13.1, but the driver is for 12.9; update either"),
        (0, "vmf_kernels._cuda has been built with CUDA 13.1, but the driver is for 0.0; update either"),
        (13000, None),
        (14020, None),
    ],
)
def test_a_driver_of_an_older_major_version_is_said(driver: int, said: str | None) -> None:
    assert reason_on(90, ("90a",), runtime=13010, driver=driver) == said


@pytest.fixture
def imports_anew() -> Iterator[None]:
    """What is known of the compiled module is found out again, and again after the test."""
    for known in (binding.missing, binding.module):
        known.cache_clear()
    yield
    for known in (binding.missing, binding.module):
        known.cache_clear()


def test_a_module_that_was_not_built_is_said(imports_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert binding.module() is None
    said = "vmf_kernels._cuda has not been built; install the package where nvcc is found"
    assert str(binding.unusable()).startswith(said)


def test_a_module_that_does_not_load_is_said(
    imports_anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the right name that no linker takes, as a module of another machine."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_cuda{suffix}").write_text("no library")
    monkeypatch.setattr(vmf_kernels, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, binding.NAME, raising=False)
    importlib.invalidate_caches()
    assert binding.module() is None
    reason = str(binding.unusable())
    assert reason.startswith("vmf_kernels._cuda cannot be loaded ("), reason
    assert reason.endswith("install the package again on this machine"), reason


@BUILT
def test_a_module_that_loads_is_there(imports_anew: None) -> None:
    """Negative control of the two above."""
    assert binding.missing() is None
    assert binding.module() is sys.modules[binding.NAME]


@NO_GPU
def test_absent_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert binding.unsupported_device(torch.device("cuda", 0)) == "the package triton is not installed"


def chosen(monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], rows: int = 640, prototypes: int = 1000) -> str:
    """What "auto" takes on a device where both could run, which the CPU stands for."""
    monkeypatch.setattr(choice, "PREFERENCE", {"cpu": choice.PREFERENCE["cuda"]})
    monkeypatch.setattr(measured, "table", lambda: table)
    monkeypatch.setattr(launch, "target_of", lambda device: launch.Target(90, 132))
    with standing_in():
        backend = choice.choose_backend("auto", *tensors(rows=rows, prototypes=prototypes))
    return next(name for name, known in choice.BACKENDS.items() if known is backend)


def test_it_comes_first_on_a_gpu() -> None:
    assert choice.PREFERENCE["cuda"] == ("cuda", "triton", "streaming")


@NO_GPU
def test_auto_does_not_take_what_nobody_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, {}) == "triton"


@NO_GPU
def test_auto_takes_it_where_it_was_measured_to_win(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, {"90": {"bf16": {"256": [ENTRY]}}}) == "cuda"


LOST = ENTRY | {"cuda_ms": 2.0}


@NO_GPU
@pytest.mark.parametrize(
    "table",
    [
        {"90": {"bf16": {"256": [LOST]}}},
        {"90": {"fp16": {"256": [ENTRY]}}},
        {"90": {"bf16": {"128": [ENTRY]}}},
        {"100": {"bf16": {"256": [ENTRY]}}},
    ],
    ids=["lost", "another dtype", "another width", "another part"],
)
def test_auto_does_not_take_it_elsewhere(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, table) == "triton"


@NO_GPU
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (320, "triton"),
        (640, "cuda"),
        (900, "cuda"),
        (1280, "cuda"),
        (1300, "triton"),
        (3771, "triton"),
        (9999, "triton"),
    ],
)
def test_the_nearest_measured_numbers_of_rows_decide(rows: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [ENTRY, ENTRY | {"rows": 1280}, LOST | {"rows": 3771}]
    assert chosen(monkeypatch, {"90": {"bf16": {"256": entries}}}, rows) == expected


@NO_GPU
def test_beyond_the_most_measured_rows_those_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, {"90": {"bf16": {"256": [ENTRY]}}}, rows=10**5) == "cuda"


@NO_GPU
@pytest.mark.parametrize(("prototypes", "expected"), [(3, "triton"), (499, "triton"), (500, "cuda"), (4000, "cuda")])
def test_measurements_of_more_than_twice_the_prototypes_tell_nothing(
    prototypes: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(monkeypatch, {"90": {"bf16": {"256": [ENTRY]}}}, prototypes=prototypes) == expected


def test_every_entry_of_the_table_names_a_result_file_that_exists() -> None:
    sources = [
        entry["source"]
        for by_element in measured.table().values()
        for by_width in by_element.values()
        for entries in by_width.values()
        for entry in entries
    ]
    root = measured.TABLE_PATH.parents[3]
    missing = [source for source in sources if not (root / source).is_file()]
    assert not missing, f"measured.json cites {missing}, which do not exist"


@NO_GPU
def test_a_name_runs_it_whatever_was_measured() -> None:
    with standing_in():
        assert choice.choose_backend("cuda", *tensors()) is choice.BACKENDS["cuda"]


@pytest.mark.thorough
def test_the_library_imports_no_compiled_module() -> None:
    code = f"import sys, vmf_kernels; print({binding.NAME!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def calls(module: Any) -> dict[str, Any]:
    """A call of each function that launches, with addresses that nobody follows."""
    expansion = module.Expansion(order=31.0, steps=0, coefficients=[0.0] * 9, slopes=[0.0] * 10)
    stored = module.StoredPrototypes(
        stored=module.Stored.fp32,
        kind=module.Kind.linear,
        count=1,
        dim=4,
        stride=4,
        weight=16,
        magnitude=0,
        temperature=0,
        expansion=expansion,
    )
    queue, side = module.Queue(device=0, stream=0), dict.fromkeys(("keys", "features", "bias", "offset"), 1024)
    side |= {"rows": module.row_tile(), "temperature": 1024}
    packing = {
        "width": 64,
        "padded": 256,
        "lowest_bias": -1.0,
        "extra_bias": 0,
        "packed": 1024,
        "bias": 1024,
        "norm": 0,
    }
    element = module.Element.bf16
    return {
        "preparing prototypes": lambda: module.pack_prototypes(
            [module.Packing(stored, element=element, **packing)] * 2, queue
        ),
        "pulling gradients back": lambda: module.pull_back(
            stored, queue, bias_gradient=0, gradient=1024, magnitude_gradient=0
        ),
        "the row pass": lambda: module.row_pass(
            queue,
            element=element,
            width=64,
            rows=module.row_tile(),
            prototypes=256,
            splits=1,
            split_size=256,
            features=1024,
            keys=1024,
            values=1024,
            bias=1024,
            value_bias=0,
            temperature=1024,
            statistics=1024,
            barycentre=1024,
        ),
        "the column pass": lambda: module.column_pass(
            queue,
            module.Side(**side),
            module.Side(**side),
            element=element,
            width=64,
            prototypes=256,
            prototype_count=256,
            dim=64,
            cotangents=1024,
            unit=1024,
            total=1024,
            vectors=1024,
            bias_gradient=1024,
            usage=1024,
        ),
    }


@BUILT
@NO_GPU
@pytest.mark.parametrize("what", ["preparing prototypes", "pulling gradients back", "the row pass", "the column pass"])
def test_the_compiled_module_raises_where_there_is_no_driver(what: str) -> None:
    call = calls(binding.module())[what]
    with pytest.raises(RuntimeError, match=rf"{what} failed: .*\(cudaError\w+\)"):
        call()


@BUILT
def test_the_compiled_module_names_its_parts_and_tiles() -> None:
    module = binding.module()
    assert set(module.archs) <= {"80", "86", "89", "90a", "100", "100a", "120"}, module.archs
    assert module.archs, "compiled for no part"
    for width in (64, 128, 192, 256, 384):
        tiles = {module.prototype_tile(width=width, own_values=own) for own in (False, True)}
        assert all(256 % tile == 0 for tile in tiles), f"tiles {tiles} do not divide the padding of 256"
    assert 256 % module.row_tile() == 0, "prototypes take the rows' place in column_log_sum_exp"


@BUILT
def test_the_compiled_module_knows_versions_also_where_there_is_no_driver() -> None:
    module = binding.module()
    assert module.runtime_version() >= 12050, module.runtime_version()
    has_driver = ctypes.util.find_library("cuda") is not None
    assert (module.driver_version() > 0) == has_driver, module.driver_version()


@BUILT
def test_the_stand_in_has_the_interface_of_the_compiled_module() -> None:
    module = binding.module()
    names = {name for name in dir(module) if not name.startswith("_")}
    assert names == {name for name in dir(StandIn) if not name.startswith("_")}


@BUILT
def test_an_expansion_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="slopes has 3 elements; expected 10"):
        binding.module().Expansion(order=31.0, steps=0, coefficients=[0.0] * 9, slopes=[0.0] * 3)
