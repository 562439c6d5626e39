"""Shared parts of the drop-ins for DINOv2 and DINOv3: targets, a centre that moves one call late, masked patches.

Legend: R rows, C masked images, N patches of an image, M masked patches, K prototypes.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.arguments import temperature_tensor
from vmf_kernels.backends.stored.choice import check_stored_backend_name
from vmf_kernels.centering.logit import LogitCenter, RankMeanCenter
from vmf_kernels.centering.running_mean import check_momentum
from vmf_kernels.centering.sinkhorn import SinkhornKnopp
from vmf_kernels.losses.masked_patches import patch_weights
from vmf_kernels.losses.stream import check_logits
from vmf_kernels.losses.temperatures import check_positive
from vmf_kernels.ops.target_cross_entropy import target_cross_entropy
from vmf_kernels.prototypes import accumulation_dtype
from vmf_kernels.ranks import Shared
from vmf_kernels.statistics import AssignmentStatistics
from vmf_kernels.unstored.prototype_logits import PrototypeLogits
from vmf_kernels.unstored.teacher_targets import TeacherTargets

Logits = PrototypeLogits | Tensor
Targets = TeacherTargets | Tensor


class RankOptions(TypedDict, total=False):
    """Keywords beyond the published ones; ``Stream`` documents them."""

    backend: str
    prototype_group: ProcessGroup | None
    row_group: ProcessGroup | None


class LazilyCentered(LogitCenter):
    """A centre whose update is pending until targets are next requested or its state is saved, and the targets by it.

    Targets depend on the teacher's output: ``TeacherTargets``, which store no probabilities, for ``PrototypeLogits``;
    probabilities for stored logits, so that anything else a loop does with them still works.

    Args:
        num_prototypes: K.
        student_temp: student temperature.
        center_momentum: of the running mean, in [0, 1).
        backend, prototype_group, row_group: as ``Stream``.

    Attributes:
        center: the centre, the state dict's only entry; fp32, or fp64 after ``double()``. An assigned tensor is copied.
        student_temp, center_momentum: may be assigned.
        updated: whether no batch is pending. ``async_batch_center`` is the sum of the pending batches over all ranks, in the
            shape of the centre, or None; the published length attribute is its divisor. Neither needs a wait.
        statistics: ``AssignmentStatistics`` of the last cross-entropy (for a list that takes several, the last), or None.

    Raises:
        ValueError: a temperature is not positive, the momentum not in [0, 1), K below 1, or the backend unknown.
    Source: facebookresearch/dinov2 dinov2/loss/dino_clstoken_loss.py.
    """

    def __init__(
        self,
        num_prototypes: int,
        student_temp: float,
        center_momentum: float,
        *,
        backend: str = "auto",
        prototype_group: ProcessGroup | None = None,
        row_group: ProcessGroup | None = None,
    ) -> None:
        options: RankOptions = {"backend": backend, "prototype_group": prototype_group, "row_group": row_group}
        check_positive(student_temp, "student_temp")
        check_momentum(center_momentum, "center_momentum")
        super().__init__(num_prototypes, center_momentum, **options)
        self.student_temp = student_temp
        self._options = Shared(options)
        self.statistics: AssignmentStatistics | None = None

    @property
    def center_momentum(self) -> float:
        """Momentum of the centre; may be assigned."""
        return self.momentum

    @center_momentum.setter
    def center_momentum(self, value: float) -> None:
        check_momentum(value, "center_momentum")
        self.momentum = value

    @property
    def options(self) -> RankOptions:
        """Keywords of ``Stream``."""
        return self._options.value

    @property
    def updated(self) -> bool:
        """Whether no batch is pending."""
        return self.pending is None

    @property
    def reduce_handle(self) -> None:
        """None: the sum over ranks is complete when ``update_center`` returns."""
        return

    @property
    def async_batch_center(self) -> Tensor | None:
        """The sum of the pending batches over all ranks, in the shape of the centre; None if there are none."""
        return None if self.pending is None else self.pending[0].reshape(self.center.shape)

    def reset_parameters(self) -> None:
        """Set the centre to 0; pending batches are dropped."""
        super().reset_parameters()
        self._known_to_be_set = False

    def update_center(self, teacher_output: Logits) -> None:
        """Record the teacher's raw logits; the centre moves later. Collective: every rank must call it, with any rows.

        Several batches before the next targets count as one batch; the published code keeps only the last. A batch with a
        non-finite value is ignored.

        Raises:
            ValueError: the teacher's K is not the centre's.
        """
        self.reduce_center_update(teacher_output)

    def reduce_center_update(self, teacher_output: Logits) -> None:
        """As ``update_center``."""
        self.accumulate(self._checked(teacher_output), None)

    def apply_center_update(self) -> None:
        """Move the centre by the pending batches, if any. Not collective."""
        self.apply_pending()

    def _centered_targets(self, teacher: Logits, temperature: float | Tensor) -> Targets:
        """``softmax((logits - center) / temperature)``."""
        teacher = self._checked(teacher)
        if teacher.ndim < self.center.ndim:
            teacher = teacher.unsqueeze(0)  # the shape after the published subtraction of the centre, by broadcasting
        self._check_set()
        tau = temperature_tensor(temperature, "teacher_temp", teacher.device)
        bias = self.bias(tau, accumulation_dtype(teacher.dtype)).to(teacher.device)
        return _like(teacher, TeacherTargets(teacher, temperature, bias))

    def _sinkhorn_targets(self, teacher: Logits, temperature: float | Tensor, n_iterations: int) -> Targets:
        return sinkhorn_targets(self._checked(teacher), temperature, n_iterations, self.options)

    def _cross_entropy(
        self, student: Logits, targets: Targets, pair_weights: Tensor, image_weights: Tensor | None = None
    ) -> Tensor:
        result = target_cross_entropy(
            student,
            targets,
            pair_weights,
            student_temperature=self.student_temp,
            image_weights=image_weights,
            backend=self.options["backend"],
            prototype_group=self.options["prototype_group"],
        )
        self.statistics = result.statistics
        return result.loss

    def _checked(self, teacher: Logits) -> Logits:
        check_logits(teacher, "teacher")
        if isinstance(teacher, Tensor):
            check_stored_backend_name(self.options["backend"])
        if teacher.shape[-1] != self.center.shape[-1] or teacher.ndim < 2:
            raise ValueError(
                f"teacher output has shape {tuple(teacher.shape)}; expected rows of the {self.center.shape[-1]} prototypes "
                "that this loss was made for"
            )
        return teacher

    def _waiting_weight(self) -> Tensor | None:
        return None if self.pending is None else self.pending[1]

    def _check_set(self) -> None:
        if (
            self._known_to_be_set or torch.compiler.is_compiling()
        ):  # the check waits for a GPU, so it is made once, and it would break a trace
            return
        if self.center.isnan().any():
            raise RuntimeError("center is NaN; expected init_weights() or load_state_dict() before its first use")
        self._known_to_be_set = True

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        self.apply_center_update()  # otherwise the last batch would be lost, as in the published code
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _center_was_set(self) -> None:
        super()._center_was_set()
        self._known_to_be_set = False


class ClassTokenLoss(LazilyCentered):
    """The shared part of the class tokens' losses: a [1, K] centre over the rows of all ranks."""

    @property
    def len_teacher_output(self) -> Tensor | None:
        """[] number of rows, over all ranks, in the sum ``async_batch_center``; None if nothing is pending."""
        return self._waiting_weight()


class PatchLoss(LazilyCentered, RankMeanCenter):
    """The shared part of the patches' losses: their reductions, and a [1, 1, K] centre over ranks with masked patches.

    The centre moves by the mean of those ranks' means; every such rank has the same weight.

    Source: Zhou et al., "iBOT", ICLR 2022, equation 2; facebookresearch/dinov2 dinov2/loss/ibot_patch_loss.py.
    """

    center_dims = 3

    @property
    def len_teacher_patch_tokens(self) -> Tensor | None:
        """[] number of ranks whose means ``async_batch_center`` sums; None if nothing is pending."""
        return self._waiting_weight()

    def forward(
        self, student_patch_tokens: Logits, teacher_patch_tokens: Targets, student_masks_flat: Tensor
    ) -> Tensor:
        """Mean over the masked patches of each image, then over all images; an image without masked patches has mean 0.

        Args:
            student_patch_tokens: [C, N, K] raw logits.
            teacher_patch_tokens: [C, N, K] targets.
            student_masks_flat: [C, N], nonzero where masked. With unstored logits, only these rows are computed; reading
                their number waits for a GPU.

        Returns:
            [] nats.

        Raises:
            ValueError: shapes do not fit.
            TypeError: one side is stored and the other is not.
        """
        check_targets(teacher_patch_tokens)
        shape = tuple(student_masks_flat.shape)
        for name, tokens in (("student_patch_tokens", student_patch_tokens), ("teacher", teacher_patch_tokens)):
            if tokens.ndim != 3 or tuple(tokens.shape[:2]) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tokens.shape)} and student_masks_flat {shape}; expected [C, N, K] and [C, N]"
                )
        weights = patch_weights(student_masks_flat, accumulation_dtype(student_patch_tokens.dtype)).reshape(-1)
        student, targets = student_patch_tokens.flatten(0, 1), teacher_patch_tokens.flatten(0, 1)
        if isinstance(student, PrototypeLogits):
            masked = weights.nonzero().flatten()
            student, targets, weights = student[masked], targets[masked], weights[masked]
        return self._masked_loss(student, targets, weights / max(shape[0], 1))

    def forward_masked(
        self,
        student_patch_tokens_masked: Logits,
        teacher_patch_tokens_masked: Targets,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """The same, from the masked patches only.

        Args:
            student_patch_tokens_masked: [M, K] raw logits, image by image; M may be 0.
            teacher_patch_tokens_masked: [M, K] targets.
            student_masks_flat: [C, N] bool; C divides the loss.
            n_masked_patches: number of rows to use, from the first, if there are more; None for all.
            masks_weight: [M] one over the masked patches of each row's image, or None to compute it from the masks.

        Returns:
            [] nats; 0 with zero gradients for M = 0.

        Raises:
            ValueError: student, teacher and weights differ in their numbers of rows, or the masks are not bool [C, N].
            TypeError: one side is stored and the other is not.
        """
        check_logits(student_patch_tokens_masked, "student")
        check_targets(teacher_patch_tokens_masked)
        if not isinstance(student_masks_flat, Tensor) or student_masks_flat.ndim < 2:
            got = getattr(student_masks_flat, "shape", type(student_masks_flat).__name__)
            raise ValueError(f"student_masks_flat is {got}; expected bool [images, patches]")
        if masks_weight is None and student_masks_flat.dtype != torch.bool:
            raise ValueError(
                f"student_masks_flat is {student_masks_flat.dtype}; expected bool, to form the weights from"
            )
        student = student_patch_tokens_masked.flatten(0, -2)[:n_masked_patches]
        targets = teacher_patch_tokens_masked.flatten(0, -2)[:n_masked_patches]
        if masks_weight is None:
            masks_CN = student_masks_flat.flatten(1)
            masks_weight = patch_weights(masks_CN, accumulation_dtype(student.dtype))[masks_CN]
        counts = (student.shape[0], targets.shape[0], masks_weight.numel())
        if len(set(counts)) > 1:
            raise ValueError(
                f"student, teacher and weights have {counts[0]}, {counts[1]} and {counts[2]} masked patches; expected as many "
                "rows each as the masks have (n_masked_patches cuts padding off)"
            )
        return self._masked_loss(student, targets, masks_weight.reshape(-1) / max(student_masks_flat.shape[0], 1))

    def _masked_loss(self, student: Logits, targets: Targets, weights_M: Tensor) -> Tensor:
        weights_M = weights_M.to(student.device, accumulation_dtype(student.dtype))
        return self._cross_entropy(student, targets, weights_M.new_ones(1, 1), weights_M)


@torch.no_grad()
def sinkhorn_targets(teacher: Logits, temperature: float | Tensor, n_iterations: int, options: RankOptions) -> Targets:
    """[..., K] Sinkhorn-Knopp targets of raw logits [..., K], over the rows of all ranks; stored as the logits. Collective."""
    rule = SinkhornKnopp(n_iterations, **options)
    return _like(teacher, TeacherTargets(teacher, temperature, rule.target_bias(teacher.flatten(0, -2), temperature)))


def check_targets(targets: object) -> None:
    """Raise TypeError unless the targets are a result of the teacher methods, or probabilities."""
    if not isinstance(targets, (TeacherTargets, Tensor)):
        raise TypeError(
            f"targets are {type(targets).__name__}; expected what softmax_center_teacher or sinkhorn_knopp_teacher returns, or "
            "a tensor of probabilities"
        )


def _like(teacher: Logits, targets: TeacherTargets) -> Targets:
    return targets.materialize() if isinstance(teacher, Tensor) else targets
