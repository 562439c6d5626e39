"""torch's own loss behind a linear layer, on stored probabilities of the teacher.

Legend: V / G student / teacher views, B images, K prototypes.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vmf_bench.errors import UnavailableError
from vmf_bench.inputs import HeadInputs
from vmf_bench.peers.peer import Compile, Loss, by_view, product_weights


def prepare_linear_cross_entropy(inputs: HeadInputs, compile_: Compile) -> Loss:
    """As it comes: torch forms the logits as a whole."""
    if not hasattr(functional, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy")
    return _loss(None)


def prepare_chunked_linear_cross_entropy(inputs: HeadInputs, compile_: Compile) -> Loss:
    """With the options that ask torch to form the logits a chunk of rows at a time."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if not hasattr(functional, "linear_cross_entropy") or options is None:
        raise UnavailableError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    loss = _loss(options)
    try:
        with torch.no_grad():
            loss(inputs)
    except UserWarning as refusal:
        reason = f"linear_cross_entropy of torch {torch.__version__} does not chunk probability targets"
        raise UnavailableError(reason) from refusal
    return loss


def _loss(options: Any) -> Loss:
    """Probabilities of the teacher are stored, [S, K] in the products' dtype; each student row has one weighted target."""

    def loss(inputs: HeadInputs) -> Tensor:
        student_weight, teacher_weight = product_weights(inputs)
        mass_VB = inputs.pair_weights.sum(dim=0)[:, None] * inputs.image_weights
        targets = _stored_targets(inputs, teacher_weight, mass_VB)
        rows = inputs.student_features / inputs.student_temperature
        chosen = {} if options is None else {"options": options()}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*options.* ignored")
            by_row = functional.linear_cross_entropy(rows, student_weight, targets, reduction="none", **chosen)
        total: Tensor = (mass_VB.flatten() * by_row.float()).sum()
        return total

    return loss


@torch.no_grad()
def _stored_targets(inputs: HeadInputs, teacher_weight: Tensor, mass_VB: Tensor) -> Tensor:
    teacher = functional.linear(by_view(inputs)[1], teacher_weight).float()
    q_GBK = ((teacher - inputs.center) / inputs.teacher_temperature).softmax(dim=-1)
    targets_VBK = torch.einsum("gv,gbk->vbk", inputs.pair_weights, q_GBK) * inputs.image_weights[:, None]
    return (targets_VBK / mass_VB[..., None]).flatten(0, 1).to(inputs.dtype)
