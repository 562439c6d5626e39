"""Drop-in for vturrisi/solo-learn: ``DINOHead`` and ``DINOLoss`` with its signatures, defaults, buffers and keys.

Change the imports of its ``solo/methods/dino.py`` (README). Its checkpoints load here, and this module's load there.

Legend: V crops, B images, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, Unpack

import torch
from torch import Tensor

from vmf_kernels.compat.checkpoints import load_modules as load_checkpoint
from vmf_kernels.heads import dino as heads
from vmf_kernels.losses import dino as losses
from vmf_kernels.losses.stream import StreamOptions
from vmf_kernels.unstored.prototype_logits import PrototypeLogits

__all__ = ["DINOHead", "DINOLoss", "load_checkpoint"]


class DINOHead(heads.DINOHead):
    """solo-learn's head: ``vmf_kernels.DINOHead`` with solo-learn's argument names, and with BatchNorm by default.

    Args:
        in_dim: dim of the backbone's features.
        num_prototypes: K.
        use_bn: BatchNorm after each hidden layer.
        norm_last_layer: freeze the prototypes' norms at 1.
        num_layers: layers of the MLP, at least 1.
        hidden_dim: width of its hidden layers.
        bottleneck_dim: dim of the prototypes.

    Raises:
        ValueError: a dim is below 1, or ``bottleneck_dim`` below 2.
    Source: vturrisi/solo-learn solo/methods/dino.py.

    Example:
        >>> head = DINOHead(in_dim=8, num_prototypes=512, hidden_dim=16, bottleneck_dim=4)
        >>> tuple(head(torch.randn(3, 8)).shape), type(head.mlp[1]).__name__
        ((3, 512), 'BatchNorm1d')
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        use_bn: bool = True,
        norm_last_layer: bool = True,
        num_layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__(in_dim, num_prototypes, use_bn, norm_last_layer, num_layers, hidden_dim, bottleneck_dim)


class DINOLoss(losses.DINOLoss):
    """solo-learn's loss: the epoch is an attribute that solo-learn's method sets, and there are only large crops.

    Args:
        num_prototypes: K.
        warmup_teacher_temp: teacher temperature at epoch 0.
        teacher_temp: teacher temperature after the warm-up.
        warmup_teacher_temp_epochs: epochs of linear warm-up; the last of them already has the final value.
        num_epochs: epochs of the run.
        student_temp: student temperature.
        num_large_crops: student crops V, at least 2; the teacher sees the first two.
        center_momentum: of the running mean, in [0, 1).
        options: keywords of ``Stream``: the centring rule and how its centre moves, backend, ranks.

    Attributes:
        epoch: selects the teacher temperature; 0 at the start, and not in the state dict.
        center: [1, K] fp32, the state dict's only entry; absent under Sinkhorn-Knopp, which keeps no centre.
        statistics: ``AssignmentStatistics`` of the last call; None before the first.

    Raises:
        ValueError: a temperature is not positive, ``num_large_crops`` < 2, or an option unknown.
    Source: vturrisi/solo-learn solo/losses/dino.py; Caron et al., ICCV 2021.

    Example:
        >>> student, teacher = (DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4) for _ in range(2))
        >>> criterion = DINOLoss(512, 0.04, 0.07, warmup_teacher_temp_epochs=2, num_epochs=10)
        >>> criterion.epoch = 1
        >>> features = torch.randn(2 * 3, 8)  # of 2 crops of 3 images, crop by crop
        >>> criterion(student(features), teacher(features)).requires_grad, bool(criterion.center.any())
        (True, True)
    """

    epoch_now: Tensor

    def __init__(
        self,
        num_prototypes: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        num_epochs: int,
        student_temp: float = 0.1,
        num_large_crops: int = 2,
        center_momentum: float = 0.9,
        **options: Unpack[StreamOptions],
    ) -> None:
        warm_up = (warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, num_epochs)
        super().__init__(num_prototypes, num_large_crops, *warm_up, student_temp, center_momentum, **options)
        # a compiled step would treat an int attribute of a module as a constant
        at = self._temperatures.stored.device
        self.register_buffer("epoch_now", torch.zeros((), dtype=torch.int64, device=at), persistent=False)
        self.epoch = 0

    @property
    def num_large_crops(self) -> int:
        """Student crops V; may be assigned."""
        return self.ncrops

    @num_large_crops.setter
    def num_large_crops(self, count: int) -> None:
        self.ncrops = count

    @property
    def epoch(self) -> int:
        """Selects the teacher temperature."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self.epoch_now.fill_(epoch)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.epoch_now.fill_(self._epoch)  # to_empty() does not keep the value
        return self

    def forward(  # type: ignore[override]
        self, student_output: PrototypeLogits | Tensor, teacher_output: PrototypeLogits | Tensor
    ) -> Tensor:
        """Mean cross-entropy over the pairs of different crops and over the images; moves the centre.

        Args:
            student_output: [V * B, K] raw logits of all crops, crop by crop.
            teacher_output: [2 * B, K] raw logits of the first two crops; they get no gradient.

        Returns:
            [] nats.

        Raises:
            ValueError: rows are not divisible by the crops, K differs, or ``epoch`` is beyond ``num_epochs``.
            TypeError: one side is stored and the other is not.
        """
        epoch = self.epoch_now if torch.compiler.is_compiling() else self.epoch
        return self._evaluate(student_output, teacher_output, epoch, (None, None))

    def update_center(self, teacher_output: PrototypeLogits | Tensor | None = None, epoch: int | None = None) -> None:
        """Move the centre by [R, K] teacher logits, if given, and by the pending batches of ``center_update="manual"``.

        Raises:
            ValueError: K is not ``num_prototypes``, or the epoch (by default the attribute) is beyond ``num_epochs``.
        """
        super().update_center(teacher_output, self.epoch if epoch is None else epoch)
