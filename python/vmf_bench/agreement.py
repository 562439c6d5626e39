"""The value and the gradients of a loss, and how far two of them are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from vmf_bench.errors import DisagreementError
from vmf_bench.inputs import HeadInputs
from vmf_bench.peers.peer import Loss

Outcome = dict[str, Tensor]  # "loss" and the gradient of each of ``HeadInputs.leaves``


def outcome_of(loss: Loss, inputs: HeadInputs) -> Outcome:
    """Value and gradients of one step; leaves no gradient behind."""
    inputs.clear_gradients()
    value = loss(inputs)
    value.backward()
    gradients = {name: leaf.grad for name, leaf in inputs.leaves.items()}
    inputs.clear_gradients()
    missing = [name for name, gradient in gradients.items() if gradient is None]
    if missing:
        raise DisagreementError(f"no gradient reaches {', '.join(missing)}")
    return {"loss": value.detach(), **{name: g for name, g in gradients.items() if g is not None}}


def relative_errors(outcome: Outcome, exact: Outcome) -> dict[str, float]:
    """``||got - exact|| / ||exact||`` by quantity."""
    return {
        name: (
            torch.linalg.vector_norm(outcome[name].double() - value) / torch.linalg.vector_norm(value.double())
        ).item()
        for name, value in exact.items()
    }


def teacher_entropy(rows: Tensor, weight: Tensor, inputs: HeadInputs, image_weights: Tensor) -> float:
    """Entropy of the targets, summed with the weights of their pairs, nats: what a loss without it falls short by.

    Args:
        rows: [G, B, D] features of the teacher.
        weight: [K, D] prototypes of the teacher.
        inputs: centre, pair weights and temperature.
        image_weights: [B].
    """
    q_GBK = ((rows @ weight.T - inputs.center) / inputs.teacher_temperature).softmax(dim=-1)
    mass_GB = inputs.pair_weights.sum(dim=1)[:, None] * image_weights
    return -(mass_GB * torch.xlogy(q_GBK, q_GBK).sum(dim=-1)).sum().item()
