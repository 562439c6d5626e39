"""Where the native backend is chosen, and what it says where it cannot run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vmf_kernels import assign
from vmf_kernels.backends import native as package
from vmf_kernels.backends.native import module

BUILT = pytest.mark.skipif(module.native() is None, reason="vmf_kernels._native was not built")
STORED = (torch.float32, torch.bfloat16, torch.float16)


def chosen(rows: torch.dtype = torch.float32, weight: torch.dtype = torch.float32) -> str:
    """Name of the backend that "auto" takes for tensors of these dtypes on a CPU."""
    backend = assign.choose_backend("auto", torch.empty(2, 4, dtype=rows), torch.empty(3, 4, dtype=weight))
    return next(name for name, known in assign.BACKENDS.items() if known is backend)


def refused(rows: Tensor, weight: Tensor) -> str:
    """What a request by name is answered."""
    with pytest.raises(RuntimeError) as raised:
        assign.choose_backend("native", rows, weight)
    return str(raised.value)


@BUILT
@pytest.mark.parametrize("weight", STORED, ids=str)
@pytest.mark.parametrize("rows", STORED, ids=str)
@pytest.mark.parametrize("best", ["avx2", "avx512", "avx512bf16"])
def test_auto_takes_it_where_it_was_measured(
    best: str, rows: torch.dtype, weight: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "instruction_sets", lambda: ("portable", best))
    assert chosen(rows, weight) == "native"


@BUILT
def test_auto_does_not_take_portable_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "instruction_sets", lambda: ("portable",))
    assert chosen() == "streaming"
    x = torch.empty(2, 4)
    assert assign.choose_backend("native", x, x) is assign.BACKENDS["native"], "by name it runs all the same"


@pytest.mark.parametrize(("rows", "weight"), [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_auto_takes_streaming_for_fp64(rows: torch.dtype, weight: torch.dtype) -> None:
    assert chosen(rows, weight) == "streaming"


def test_without_the_module_auto_takes_streaming_and_a_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "native", lambda: None)
    assert chosen() == "streaming"
    said = refused(torch.empty(2, 4), torch.empty(3, 4))
    assert said.startswith("backend 'native' cannot run here: its module was not built: install vmf_kernels again")


def test_a_module_that_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MODULE", "vmf_kernels._not_built")
    assert module.native.__wrapped__() is None


@pytest.mark.parametrize(
    ("rows", "weight", "said"),
    [
        (
            torch.empty(2, 4, dtype=torch.float64),
            torch.empty(3, 4),
            "it takes float32, bfloat16 or float16, but the features are torch.float64",
        ),
        (
            torch.empty(2, 4),
            torch.empty(3, 4, dtype=torch.float64),
            "it takes float32, bfloat16 or float16, but the prototypes are torch.float64",
        ),
        (
            torch.empty(2, 4, device="meta"),
            torch.empty(3, 4, device="meta"),
            "it runs on CPUs, but the features are on meta",
        ),
        (torch.empty(2, 4), torch.empty(3, 4, device="meta"), "it runs on CPUs, but the prototypes are on meta"),
    ],
)
def test_what_it_cannot_run_is_said(rows: Tensor, weight: Tensor, said: str) -> None:
    assert refused(rows, weight) == f"backend 'native' cannot run here: {said}"


def test_tensors_on_a_gpu_are_refused() -> None:
    with FakeTensorMode():
        rows, weight = torch.empty(2, 4, device="cuda"), torch.empty(3, 4, device="cuda")
    said = assign.BACKENDS["native"].unsupported(rows, weight)
    assert said == "it runs on CPUs, but the features are on cuda:0"
