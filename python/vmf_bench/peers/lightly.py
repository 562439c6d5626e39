"""lightly's losses on stored logits."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional

from vmf_bench.errors import UnavailableError
from vmf_bench.inputs import HeadInputs
from vmf_bench.peers.peer import Compile, Loss, effective_weights, equal_weight, products


def prepare_lightly(inputs: HeadInputs, compile_: Compile) -> Loss:
    """``DINOLoss`` for multi-crop, ``IBOTPatchLoss`` for matched rows; each moves its centre after use, which is timed too.

    The logits of all views are one product, the fastest way that its interface, a list of views, leaves.
    """
    if importlib.util.find_spec("lightly") is None:
        raise UnavailableError("lightly is not installed")
    importlib.import_module(
        "vmf_pretrain.with_torchvision"
    )  # mends torchvision, which lightly imports, on CPU builds of torch
    scale = equal_weight(inputs, "lightly")
    return _matched(inputs, scale) if inputs.shape.matched else _multi_crop(inputs, scale)


def _multi_crop(inputs: HeadInputs, scale: Tensor) -> Loss:
    from lightly.loss import DINOLoss

    shape, tau = inputs.shape, inputs.teacher_temperature
    criterion = DINOLoss(shape.prototypes, tau, tau, 1, inputs.student_temperature).to(inputs.device)

    def loss(inputs: HeadInputs) -> Tensor:
        criterion.center = inputs.center.view(1, 1, -1)  # every step is to be the same one
        with products(inputs):  # as in a training step under autocast, criterion and all
            student, teacher = _logits(inputs)
            value: Tensor = criterion(teacher.chunk(shape.teacher_views), student.chunk(shape.student_views), tau)
        return scale * value

    return loss


def _matched(inputs: HeadInputs, scale: Tensor) -> Loss:
    from lightly.loss import IBOTPatchLoss

    shape = inputs.shape
    criterion = IBOTPatchLoss(shape.prototypes, inputs.teacher_temperature, inputs.student_temperature)
    criterion = criterion.to(inputs.device)
    mask = torch.ones(1, 1, shape.images, dtype=torch.bool, device=inputs.device)  # one image, all of it masked

    def loss(inputs: HeadInputs) -> Tensor:
        criterion.center.center = inputs.center.view(1, -1)
        with products(inputs):
            student, teacher = _logits(inputs)
            value: Tensor = criterion(teacher, student, mask)
        return scale * value

    return loss


def _logits(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    student_weight, teacher_weight = effective_weights(inputs)
    student = functional.linear(inputs.student_features, student_weight)
    with torch.no_grad():
        return student, functional.linear(inputs.teacher_features, teacher_weight)
