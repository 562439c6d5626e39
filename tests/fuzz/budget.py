"""How far a result may be off: the budget of ``vmf_kernels/testing.py``, for functions that this module does not know.

The truth is fp64 on the rounded inputs. A result may be off by twice what the dense formula is off in the dtype of the sums,
plus one rounding of each logit and of the result.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vmf_kernels.testing import DENSE_ERRORS, FP64_BUDGET

Values = Mapping[str, Tensor]


def faults(got: Values, truth: Values, dense: Values, sizes: Values, *, finite_inputs: bool) -> list[str]:
    """What is wrong with the results, a sentence each.

    Args:
        got: what the library computes.
        truth: fp64.
        dense: the dense formula in the dtype of the sums, cast to the dtypes that results have.
        sizes: by how much each value changes per relative change of its terms.
        finite_inputs: whether no input is NaN or infinite.
    """
    if got.keys() != truth.keys():
        return [f"got {sorted(got)}, expected {sorted(truth)}"]
    forms = {
        name: (form, expected)
        for name in got
        if (form := (list(got[name].shape), got[name].dtype))
        != (expected := (list(dense[name].shape), dense[name].dtype))
    }
    if forms:
        return [f"{name} is {form}, expected {expected}" for name, (form, expected) in forms.items()]
    if not all(bool(value.isfinite().all()) for value in dense.values()):
        return not_finite_faults(got, dense) if not finite_inputs else []
    return [fault for name in got for fault in too_far(name, got[name], truth[name], dense[name], sizes[name])]


def not_finite_faults(got: Values, dense: Values) -> list[str]:
    """Values that are finite although the dense formula's are not: NaN in, NaN out."""
    found = [
        f"{name} is finite, but densely it is not"
        for name in dense
        if got[name].isfinite().all() and not dense[name].isfinite().all()
    ]
    if "loss" in dense and dense["loss"].isnan().any() and not got["loss"].isnan().any():
        found.append(f"loss is {got['loss'].item()}, but densely NaN")
    return found


def too_far(name: str, got: Tensor, truth: Tensor, dense: Tensor, size: Tensor) -> list[str]:
    """The value's largest and root mean square error, where they are beyond their budgets."""
    found = []
    for norm, measure in (("largest", largest), ("root mean square", root_mean_square)):
        error = measure(got.double() - truth)
        if got.dtype == torch.float64:
            allowed = FP64_BUDGET * measure(size)
        else:
            sums, kept = torch.finfo(torch.float32), torch.finfo(got.dtype)
            # below the smallest normal number of the sums there are no digits to lose
            rounding = sums.eps * size + kept.eps / 2 * (truth.abs() + kept.tiny) + sums.tiny
            allowed = DENSE_ERRORS * measure(dense.double() - truth) + measure(rounding)
        if not error <= allowed:
            found.append(f"{name}: {norm} error {error:.2e}, budget {allowed:.2e}")
    return found


def largest(values: Tensor) -> float:
    """Largest absolute value; infinity if one is NaN."""
    return float(values.double().abs().nan_to_num(nan=torch.inf).max()) if values.numel() else 0.0


def root_mean_square(values: Tensor) -> float:
    return float(values.double().nan_to_num(nan=torch.inf).square().mean().sqrt()) if values.numel() else 0.0
