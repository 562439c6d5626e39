"""Whether the losses are right: value and gradients against the published loss in fp64, within an error budget.

The truth is the published loss in fp64 on the already rounded inputs. A result of this library may be off by twice what the
published loss is off in the dtype at hand, plus a rounding of the largest logit in fp32, and for the loss what rounding the
logits in that dtype may change: where the published loss happens to round well, chance would decide otherwise. In bf16 the
published loss is what a training step under autocast computes: on a CPU its log-softmax is in bf16 too, so the budget is
wider there than on a GPU. At the sizes that are timed, every loss is compared with the published one in fp32.

Legend: K prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vmf_bench.agreement import Outcome, outcome_of, relative_errors, teacher_entropy
from vmf_bench.attempts import attempt
from vmf_bench.errors import DisagreementError
from vmf_bench.inputs import HeadInputs, HeadShape, matched_shape
from vmf_bench.peers.peer import by_view, eager, effective_weights
from vmf_bench.peers.stored import published
from vmf_bench.variants import Variant

# numbers of rows, prototypes and dims that fit no tile
SHAPES = (HeadShape(5, 2, 6, prototypes=1009, dim=72), matched_shape(37, prototypes=1009, dim=72))
PUBLISHED_ERRORS = 2.0  # by how many times the published loss's error a result may be off
DEVIATIONS = 3.0  # of the mean over rows of independent roundings
TOLERANCES = {  # relative, of the loss and of the norm of a gradient, at the sizes that are timed
    torch.float32: (1e-5, 1e-3),
    torch.bfloat16: (0.01, 0.04),  # bf16 logits of 10 are off by up to 0.03
}


def pairing_of(shape: HeadShape) -> str:
    """How rows are paired, for a reader."""
    return "matched" if shape.matched else "multi-crop"


def dtype_name(dtype: torch.dtype) -> str:
    """For example "float32"."""
    return str(dtype).removeprefix("torch.")


def check(
    variants: Mapping[str, Variant], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> list[dict[str, Any]]:
    """What came of every one of this library's losses, at small sizes: a record for each pairing and dtype."""
    records = []
    for shape in SHAPES:
        for dtype in dtypes:
            inputs = HeadInputs.of(shape, device=device, dtype=dtype)
            truth = outcome_of(published, inputs.to(torch.float64))
            budget = budget_of(inputs, truth)
            where = {"pairing": pairing_of(shape), "dtype": dtype_name(dtype)}
            for name, variant in variants.items():
                if variant.is_ours:
                    records.append({"name": name, **where, **_checked(variant, inputs, truth, budget)})
    return records


def budget_of(inputs: HeadInputs, truth: Outcome) -> dict[str, float]:
    """How far off each quantity may be, relative to it: from the published loss as autocast runs it on this device."""
    norm = inputs.teacher_magnitude.abs().max().item()
    rounding = torch.finfo(torch.float32).eps * norm / min(inputs.student_temperature, inputs.teacher_temperature)
    errors = relative_errors(outcome_of(published, inputs), truth)
    budget = {name: PUBLISHED_ERRORS * error + rounding for name, error in errors.items()}
    deviation = torch.finfo(inputs.dtype).eps / 12**0.5  # a rounding is uniform in +- eps/2
    logits = norm / inputs.student_temperature / truth["loss"].item() / inputs.shape.student_rows**0.5
    budget["loss"] += DEVIATIONS * deviation * logits
    return budget


def _checked(variant: Variant, inputs: HeadInputs, truth: Outcome, budget: dict[str, float]) -> dict[str, Any]:
    errors: dict[str, float] = {}

    def action() -> None:
        errors.update(relative_errors(outcome_of(variant.prepare(inputs, eager), inputs), truth))
        beyond = [name for name in errors if not errors[name] <= budget[name]]  # NaN is beyond
        if beyond:
            name = beyond[0]
            raise DisagreementError(f"{name} is off by {errors[name]:.1e}, budget {budget[name]:.1e}")

    _, outcome = attempt(action)
    inputs.clear_gradients()
    return {**outcome, "errors": errors, "budget": budget if errors else {}}


def expected_outcome(inputs: HeadInputs) -> tuple[Outcome, float]:
    """The published loss in fp32 from these rows, with gradients; and what a loss without the targets' entropy lacks."""
    wide = inputs.to(torch.float32)
    with torch.no_grad():
        weight = effective_weights(wide)[1]
        entropy = teacher_entropy(by_view(wide)[1], weight, wide, wide.image_weights)
    return outcome_of(published, wide), entropy


def refuse_disagreement(errors: Mapping[str, float], dtype: torch.dtype) -> None:
    """Accept errors that the dtype explains.

    Raises:
        DisagreementError: one is larger, or NaN.
    """
    loss, gradient = TOLERANCES[dtype]
    for name, error in errors.items():
        allowed = loss if name == "loss" else gradient
        if not error <= allowed:
            raise DisagreementError(f"{name} is off by {error:.1e} from the published loss, allowed {allowed:.0e}")
