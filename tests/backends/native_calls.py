"""Shared parts of the native backend's tests: the dtype of its products, its budget, and deliberately damaged calls.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.backends.conformance import dense_assignment
from vmf_kernels import Prototypes, prototype_usage
from vmf_kernels.backends.native import module
from vmf_kernels.ops.assignments import column_log_sum_exp, row_log_sum_exp
from vmf_kernels.prototypes import prepare_keys
from vmf_kernels.testing import Problem, assert_within_budget, library_outcome

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512bf16", "amx_bf16")  # of csrc/cpu, the best last
# those of this machine, which the report's first lines name: a skip for each test of the others would say it hundreds of times
HERE = tuple(name for name in INSTRUCTION_SETS if module.native() is not None and name in module.instruction_sets())
TASKS = ("Score", "Gather", "PullBack")  # what the module is called with
ROUNDINGS = 4  # of the largest logit, for every logarithm

Damage = Callable[[str, dict[str, Any]], None]


def products_of(problem: Problem, isa: str) -> torch.dtype | None:
    """Dtype of the products where it is narrower than that of the sums, as the budget takes it."""
    rounded = {problem.student_features.dtype, problem.teacher_features.dtype} == {torch.bfloat16}
    return torch.bfloat16 if rounded and isa in module.WITH_BF16 else None


def check(problem: Problem, isa: str) -> None:
    """Raise AssertionError unless the native backend's loss and gradients are within the budget."""
    assert_within_budget(library_outcome(problem, "native"), problem, products_of(problem, isa))


def check_log_sums(features: Tensor, prototypes: Prototypes, bias: Tensor, isa: str, temperature: float = 0.07) -> None:
    """Raise AssertionError unless log usage, row and column log-sum-exps are as near the fp64 truth as their products allow.

    Args:
        features: [R, D]
        prototypes: K of dim D.
        bias: [K] nats for the usage.
        isa: the instruction set that is taken.
        temperature: positive.
    """
    tau = torch.tensor(temperature, dtype=torch.float64)
    exact, p_RK = dense_assignment(features, prepare_keys(prototypes, tau, None, torch.float64))
    biased, q_RK = dense_assignment(features, prepare_keys(prototypes, tau, bias, torch.float64))
    usage = prototype_usage(features, prototypes, temperature, bias, backend="native")
    rows = row_log_sum_exp(features, prototypes, temperature, bias, backend="native")
    columns = column_log_sum_exp(features, prototypes, temperature, exact.log_sum_exp.float(), backend="native")
    assert {usage.dtype, rows.dtype, columns.dtype} == {torch.float32}
    logit = float(prototypes.norms().max()) / temperature + float(bias.abs().max())
    budget = ROUNDINGS * torch.finfo(torch.float32).eps * logit
    # rows of fewer bits than the stored prototypes' and their gains' product: that is rounded, each element on its own
    if isa in module.WITH_BF16 and features.dtype == torch.bfloat16:
        budget += torch.finfo(torch.bfloat16).eps * logit / prototypes.dim**0.5
    for name, got, truth in (
        ("usage", usage.log(), q_RK.mean(dim=0).log()),
        ("rows", rows, biased.log_sum_exp),
        ("columns", columns, p_RK.sum(dim=0).log()),
    ):
        error = float((got.double() - truth).abs().max())
        assert error <= budget, f"{name}: error {error:.1e} nats, budget {budget:.1e}"


@contextmanager
def damaged(damage: Damage) -> Iterator[list[str]]:
    """Every task of the module with its arguments changed in place by ``damage(name, arguments)``; the names seen."""
    native, names, kept = module.built(), [], []

    def changed(task: str) -> Callable[..., Any]:
        def build(**arguments: Any) -> Any:
            names.append(task)
            damage(task, arguments)
            kept.append(arguments)  # the task points to its tensors
            return getattr(native, task)(**arguments)

        return build

    stand_in = ModuleType(native.__name__)
    stand_in.__dict__.update(vars(native) | {task: changed(task) for task in TASKS})
    with mock.patch.object(module, "native", return_value=stand_in):
        yield names
