"""Liger's chunked distillation loss."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from vmf_bench.errors import UnavailableError
from vmf_bench.inputs import HeadInputs
from vmf_bench.peers.peer import Compile, Loss, by_view, eager, equal_weight, product_weights

LIGER_CHUNK_ROWS = 1024  # its default


def prepare_liger(inputs: HeadInputs, compile_: Compile) -> Loss:
    """Liger's chunked JSD at beta 0, KL(q, p), on one row a pair; temperatures are folded into the rows.

    Its loss takes one target a row, so a student row that learns from two teachers is two rows of it.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise UnavailableError("liger_kernel is not installed")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    shape, device = inputs.shape, inputs.student_features.device
    pairs = inputs.pair_weights.nonzero().tolist()
    scale = equal_weight(inputs, "Liger")
    labels = torch.zeros(len(pairs) * shape.images, dtype=torch.long, device=device)
    jsd = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0, compiled=compile_ is not eager, chunk_size=LIGER_CHUNK_ROWS
    )

    def loss(inputs: HeadInputs) -> Tensor:
        student_weight, teacher_weight = product_weights(inputs)
        student, teacher = by_view(inputs)
        rows_S = torch.cat([student[v] for _, v in pairs]) / inputs.student_temperature
        rows_T = torch.cat([teacher[g] for g, _ in pairs]) / inputs.teacher_temperature
        bias_K = inputs.teacher_bias.to(inputs.dtype)
        mean: Tensor = jsd(rows_S, student_weight, rows_T, teacher_weight, labels, None, bias_K)
        return scale * mean

    return loss
