"""The check that a refactoring changed no bit: it covers every public name, uses only public names, and finds changes."""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vmf_kernels
from bench import same_bits
from bench.bits import record
from bench.bits.operators import Setting, _evaluate

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "bench" / "same_bits.py", *(ROOT / "bench" / "bits").glob("*.py")]
Files = tuple[dict[str, Any], dict[str, Any]]


def imported_names(source: str) -> Iterator[str]:
    """What of the library a module imports: "name" of the package itself, "compat.module" of a drop-in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("vmf_kernels"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vmf_kernels"):
            package = (node.module or "").removeprefix("vmf_kernels").removeprefix(".")
            yield from (f"{package}.{alias.name}".removeprefix(".") for alias in node.names)


def content_of(case: record.Case) -> dict[str, Any]:
    """What a file with one case holds."""
    results = record.run_cases([case])
    ran = {"cases": results.cases, "skipped": results.skipped, "covers": {case.name: case.covers}}
    return {"environment": record.environment(), "public": list(case.covers), **ran}


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return content_of(record.Case("loss", (), lambda: _evaluate(Setting(images=3), "streaming")))


def compared(folder: Path, before: dict[str, Any], after: dict[str, Any]) -> int:
    """Exit status of the command."""
    for name, content in (("before", before), ("after", after)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return same_bits.main(["compare", str(folder / "before.json"), str(folder / "after.json")])


def test_every_public_name_is_exercised() -> None:
    assert same_bits.missing_names() == []


def test_a_name_without_a_case_is_found() -> None:
    cases = [case for case in same_bits.cases_of(["elements"]) if "SinkhornKnopp" not in case.covers]
    assert "SinkhornKnopp" in record.missing_names(cases, same_bits.public_names())


def test_a_case_that_covers_nothing_public_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cases cover dinov2\.DINOLos, which are not public"):
        record.missing_names([record.Case("one", ("dinov2.DINOLos",), dict)], ["dinov2.DINOLoss"])


def test_only_public_names_are_imported() -> None:
    known = {"vmf_kernels", *vmf_kernels.__all__, *(f"compat.{drop_in}" for drop_in in same_bits.DROP_INS)}
    imported = {name for source in SOURCES for name in imported_names(source.read_text())}
    assert imported - known == set()
    assert list(imported_names("from vmf_kernels.centering import Center")) == ["centering.Center"]


def test_a_run_repeats_to_the_bit(content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = content_of(record.Case("loss", (), lambda: _evaluate(Setting(images=3), "streaming")))
    assert compared(tmp_path, content, again) == 0
    assert capsys.readouterr().out == "no bit differs in 1 cases\n"


def other_loss(before: dict[str, Any], after: dict[str, Any]) -> None:
    after["cases"]["loss"]["result.loss"] = record.record_of(torch.tensor(1.0))


def no_case(before: dict[str, Any], after: dict[str, Any]) -> None:
    del after["cases"]["loss"]


def new_case(before: dict[str, Any], after: dict[str, Any]) -> None:
    after["cases"]["another"], after["covers"]["another"] = {}, []


def no_quantity(before: dict[str, Any], after: dict[str, Any]) -> None:
    del before["cases"]["loss"]["features_gradient"]


def skipped_case(before: dict[str, Any], after: dict[str, Any]) -> None:
    del after["cases"]["loss"]
    after["skipped"]["loss"] = "backend 'native' cannot run here: it was not built"


def other_machine(before: dict[str, Any], after: dict[str, Any]) -> None:
    after["environment"]["CPU"] = "an abacus"


def other_threads(before: dict[str, Any], after: dict[str, Any]) -> None:
    after["environment"]["threads"] = "2"
    no_case(before, after)  # of which nothing is said: it would follow from the threads


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_loss, "loss: result.loss: float32 [] "),
        (no_case, "loss: the case is missing after"),
        (new_case, "another: the case is missing before"),
        (no_quantity, "loss: features_gradient: missing -> float32 [15, 24] "),
        (skipped_case, "loss: run before only; on the other side: backend 'native' cannot run here"),
        (other_machine, "and 'an abacus' after: bits can only be compared in one environment"),
        (other_threads, "threads is '1' before and '2' after: bits can only be compared in one environment"),
    ],
)
def test_a_difference_is_found(
    change: Callable[..., None],
    said: str,
    content: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, after = copy.deepcopy(content), copy.deepcopy(content)
    change(before, after)
    assert compared(tmp_path, before, after) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2, f"one difference and their number, but got {lines}"
    assert said in lines[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_flipped_bit_changes_a_record(dtype: torch.dtype) -> None:
    tensor = torch.randn(257, 3).to(dtype)
    flipped = tensor.clone()
    flipped.view(torch.uint8)[200, 2] ^= 1
    assert record.record_of(flipped) != record.record_of(tensor)


def test_shape_dtype_and_sign_of_zero_count() -> None:
    zeros = [torch.zeros(2), -torch.zeros(2), torch.zeros(1, 2), torch.zeros(2, dtype=torch.int32)]
    assert len({record.record_of(tensor) for tensor in zeros}) == len(zeros)


def test_a_backend_that_cannot_run_is_skipped_and_other_errors_are_not() -> None:
    def raises(message: str) -> Callable[[], Any]:
        def run() -> Any:
            raise RuntimeError(message)

        return run

    reason = "backend 'triton' cannot run here: it is absent"
    assert record.run_cases([record.Case("one", (), raises(reason))]).skipped == {"one": reason}
    with pytest.raises(RuntimeError, match="the centre is NaN"):
        record.run_cases([record.Case("one", (), raises("the centre is NaN"))])
