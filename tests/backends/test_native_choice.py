"""When the native backend is chosen, and its message when it cannot run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vmf_kernels.backends import choice
from vmf_kernels.backends import native as package
from vmf_kernels.backends.native import module
from vmf_kernels.testing import library_outcome, random_problem

pytestmark = pytest.mark.quick

BUILT = pytest.mark.skipif(module.native() is None, reason="vmf_kernels._native was not built")
STORED = (torch.float32, torch.bfloat16, torch.float16)


def chosen(rows: torch.dtype = torch.float32, weight: torch.dtype = torch.float32) -> str:
    """Name of the backend that "auto" takes for tensors of these dtypes on a CPU."""
    backend = choice.choose_backend("auto", torch.empty(2, 4, dtype=rows), torch.empty(3, 4, dtype=weight))
    return next(name for name, known in choice.BACKENDS.items() if known is backend)


def refused(rows: Tensor, weight: Tensor) -> str:
    """What a request by name is answered."""
    with pytest.raises(RuntimeError) as raised:
        choice.choose_backend("native", rows, weight)
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
    assert choice.choose_backend("native", x, x) is choice.BACKENDS["native"], "by name it runs all the same"


@pytest.mark.parametrize(("rows", "weight"), [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_auto_takes_streaming_for_fp64(rows: torch.dtype, weight: torch.dtype) -> None:
    assert chosen(rows, weight) == "streaming"


def test_without_the_module_auto_takes_streaming_and_a_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MODULE", "vmf_kernels._not_built")
    monkeypatch.setattr(package, "why_absent", module.why_absent.__wrapped__)
    assert chosen() == "streaming"
    said = refused(torch.empty(2, 4), torch.empty(3, 4))
    assert said.startswith("backend 'native' cannot run here: its module was not built: install vmf_kernels again")


def test_a_module_that_cannot_be_loaded_is_as_good_as_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "of_another_machine.py").write_text("raise ImportError('GLIBCXX_9 not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "MODULE", "of_another_machine")
    monkeypatch.setattr(package, "why_absent", module.why_absent.__wrapped__)
    assert chosen() == "streaming"
    assert "cannot be loaded (GLIBCXX_9 not found)" in refused(torch.empty(2, 4), torch.empty(3, 4))


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=str)
def test_auto_takes_streaming_for_a_teacher_in_fp64(rows: torch.dtype) -> None:
    problem = random_problem(dtype=torch.float64)
    x_SD, x_TD = problem.student_features.to(rows), problem.teacher_features.to(rows)
    mixed = replace(problem.to(torch.float32), student_features=x_SD, teacher_features=x_TD)
    mixed = replace(mixed, teacher_prototypes=problem.teacher_prototypes)
    assert library_outcome(mixed)["loss"].item() == library_outcome(mixed, "streaming")["loss"].item()
    with pytest.raises(RuntimeError, match=r"but the prototypes are torch\.float64"):
        library_outcome(mixed, "native")


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
    said = choice.BACKENDS["native"].unsupported(rows, weight)
    assert said == "it runs on CPUs, but the features are on cuda:0"
