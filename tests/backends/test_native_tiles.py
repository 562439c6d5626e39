"""Products on a CPU's matrix unit (csrc/cpu/tiles.h), on a stand-in of it that any machine has, against the fp64 truth.

What the stand-in is, and what it does not show, is in tests/csrc/tiles_stand_in.h. Where there is a matrix unit,
tests/backends/test_native.py runs on that as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("setuptools", reason="setup.py, which says how csrc/cpu is compiled, needs setuptools")

from tests.backends.native_calls import Damage, check, check_log_sums, damaged
from tests.backends.test_native import DAMAGES, SHAPES, changed_quantities, problem_of
from tests.csrc.building import module_with_stand_in
from tests.ops.test_prototype_cross_entropy import HARD
from vmf_kernels.backends.native import module, operator
from vmf_kernels.prototypes import KINDS
from vmf_kernels.testing import assert_within_budget, library_outcome, random_problem

pytestmark = pytest.mark.compiles

BF16 = torch.bfloat16
ISA = "amx_bf16"


@pytest.fixture(autouse=True)
def _on_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    built = module_with_stand_in()
    if built is None:
        pytest.skip("no C++ compiler with what csrc/cpu/tiles.h needs")
    monkeypatch.setattr(module, "native", lambda: built)
    monkeypatch.setattr(module, "why_absent", lambda: None)
    monkeypatch.setattr(module, "instruction_sets", lambda: tuple(built.available()))
    monkeypatch.setattr(module, "LEAST_WORK", 0)
    module._execution.cache_clear()  # between calls, and of one module
    yield
    module._execution.cache_clear()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_matches_the_fp64_truth(shape: str, uninitialised_memory_is_nan: None) -> None:
    assert module.has_bf16_products()
    check(problem_of(shape, BF16), ISA)


@pytest.mark.parametrize("name", HARD)
def test_hard_values_stay_within_the_budget(name: str) -> None:
    kind, harden = HARD[name]
    check(harden(random_problem(images=13, views=(2, 5), prototypes=1000, dim=24, kind=kind, dtype=BF16)), ISA)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_its_log_sums_match_the_fp64_truth(kind: str, uninitialised_memory_is_nan: None) -> None:
    problem = random_problem(images=7, views=(2, 4), prototypes=301, dim=40, kind=kind, dtype=BF16)
    check(problem, ISA)
    assert problem.teacher_bias is not None
    check_log_sums(problem.student_features, problem.student_prototypes, problem.teacher_bias, ISA)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    """Each thread has tile registers of its own, and configures them."""
    problem, outcomes = random_problem(images=9, views=(2, 5), prototypes=4099, dim=100, dtype=BF16), []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        outcomes.append(library_outcome(problem, "native"))
    for outcome in outcomes:
        assert not changed_quantities(outcomes[0], outcome)


def test_features_in_fp32_are_multiplied_as_torch_may_multiply_them() -> None:
    problem = random_problem(images=5, views=(2, 3), prototypes=301, dim=24, dtype=torch.float32)
    mixed = replace(problem, teacher_features=problem.teacher_features.to(BF16))
    settings = {"highest": torch.float32, "high": torch.float32, "medium": BF16}
    try:
        for setting, products in settings.items():
            torch.set_float32_matmul_precision(setting)
            assert operator.products_of(problem.student_features, mixed.teacher_features) == products, setting
            assert_within_budget(library_outcome(problem, "native"), problem, products)
            assert_within_budget(library_outcome(mixed, "native"), mixed, products)
        with pytest.raises(AssertionError, match=r"error .*, budget"):  # control: "medium" rounds
            assert_within_budget(library_outcome(problem, "native"), problem)
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore[attr-defined]
        torch.backends.mkldnn.fp32_precision = "bf16"
        assert operator.products_of(problem.student_features) == BF16
    finally:
        torch.backends.mkldnn.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_call_fails_the_budget(damage: Damage) -> None:
    """Negative control."""
    problem = random_problem(images=6, views=(2, 4), prototypes=127, dim=24, dtype=BF16)
    with damaged(damage), pytest.raises(AssertionError, match=r"error .*, budget"):
        check(problem, ISA)


def test_products_in_fp32_pass_a_budget_of_bf16_and_not_the_other_way_round() -> None:
    """Negative control: what is checked is the rounding of these products."""
    problem = random_problem(images=6, views=(2, 4), prototypes=127, dim=24, dtype=BF16)
    fp32 = replace(
        problem, student_features=problem.student_features.float(), teacher_features=problem.teacher_features.float()
    )
    with pytest.raises(AssertionError, match=r"error .*, budget"):
        check(problem, "portable")  # whose budget is that of fp32 products
    check(fp32, ISA)
