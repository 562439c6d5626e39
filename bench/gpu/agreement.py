"""Checks that a baseline computes the same loss: value and gradients against the formula in fp32.

Legend: V / G student / teacher views, B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import torch

from vmf_bench.agreement import Outcome, teacher_entropy
from vmf_bench.errors import DisagreementError
from vmf_bench.inputs import HeadInputs
from vmf_bench.peers.chunks import chunk_gradients, chunks_of_images
from vmf_bench.peers.peer import by_view, effective_weights

LOSS_TOLERANCE = 0.01  # relative
GRADIENT_TOLERANCE = (
    0.04  # relative, of Frobenius norms: bf16 logits of 10 are off by up to 0.03; 0.01 was seen on a CPU
)
TRUTH_CACHE_BYTES = 2**30  # of bf16 logits a chunk: 2 GiB for each fp32 copy


@torch.no_grad()
def exact_outcome(inputs: HeadInputs) -> tuple[Outcome, float]:
    """Loss and gradients in fp32 from the bf16 rows and fp32 prototypes, and the teacher's entropy times the pairs' mass."""
    with torch.enable_grad():
        student_weight, teacher_weight = effective_weights(inputs)
    weights = student_weight.detach(), teacher_weight
    student, teacher = (rows.detach().float() for rows in by_view(inputs))
    loss, entropy = inputs.center.new_zeros((), dtype=torch.float64), 0.0
    features_grad, weight_grad = torch.empty_like(student), torch.zeros_like(weights[0])
    for images in chunks_of_images(inputs, TRUTH_CACHE_BYTES):
        rows = student[:, images], teacher[:, images]
        value, at_rows, at_weight = chunk_gradients(rows, weights, inputs, inputs.image_weights[images])
        features_grad[:, images] = at_rows
        weight_grad += at_weight
        loss += value
        entropy += teacher_entropy(rows[1], teacher_weight, inputs, inputs.image_weights[images])
    stored = inputs.student_magnitude, inputs.student_direction
    magnitude, direction = torch.autograd.grad(student_weight, stored, weight_grad)
    gradients = {"features": features_grad.flatten(0, 1), "magnitude": magnitude, "direction": direction}
    return {"loss": loss, **gradients}, entropy


def refuse_disagreement(errors: dict[str, float]) -> None:
    """Accept errors that bf16 arithmetic explains.

    Raises:
        DisagreementError: an error is larger, or NaN.
    """
    for name, error in errors.items():
        allowed = LOSS_TOLERANCE if name == "loss" else GRADIENT_TOLERANCE
        if not error <= allowed:
            numbers = ", ".join(f"{quantity} {value:.1e}" for quantity, value in errors.items())
            raise DisagreementError(f"{name} is off by {error:.1e}, allowed {allowed:.0e}; relative errors: {numbers}")
