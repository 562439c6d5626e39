"""A stream whose prototypes are von Mises-Fisher components.

Legend: S / T student / teacher rows, K prototypes.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from vmf_kernels.arguments import temperature_tensor
from vmf_kernels.losses.stream import Outputs, Stream
from vmf_kernels.prototypes import Prototypes, accumulation_dtype
from vmf_kernels.unstored.prototype_logits import PrototypeLogits

FROZEN_NORMS = (
    "DINO-vMF is on but the prototypes' norms are frozen (norm_last_layer=True): with all norms at 1 every component has "
    "the same precision and the loss equals DINO up to centring; use norm_last_layer=False"
)


class VMFStream(Stream):
    """A ``Stream`` whose prototypes, of free norm, are von Mises-Fisher components of precision ``||w_k|| / tau``.

    ``log C_D(||w_k|| / tau)`` is added to each network's logits, with its own prototypes and its own temperature; gradients
    flow through the student's.

    Source: Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023 (arXiv:2405.10939).
    """

    default_centering = "probability"
    warned = False  # about frozen norms: once per loss, even with several streams

    def prepare(
        self,
        student: PrototypeLogits | Tensor,
        teacher: PrototypeLogits | Tensor,
        teacher_temp: float | Tensor,
        prototypes: tuple[Prototypes | None, Prototypes | None] = (None, None),
    ) -> Outputs:
        """As ``Stream.prepare``; plain logits need both networks' prototypes.

        Raises:
            ValueError: as there; or plain logits came without prototypes, with another number of prototypes, or with
                normalised prototypes, which have no precision.
        """
        student, teacher = super().prepare(student, teacher, teacher_temp)[:2]
        if isinstance(student, PrototypeLogits) and isinstance(teacher, PrototypeLogits):
            self._warn_if_frozen(student.prototypes)
            return Outputs(student.with_vmf(), teacher.with_vmf())
        for side, output, given in zip(("student", "teacher"), (student, teacher), prototypes, strict=True):
            if given is None:
                raise ValueError(
                    f"{side} output is plain logits of shape {tuple(output.shape)} without the prototypes' norms, which the "
                    f"vMF normaliser needs; expected {side}_prototypes= (for example "
                    "weight_norm_prototypes(layer.weight_g, layer.weight_v)), or a head that returns PrototypeLogits"
                )
            if given.count != output.shape[-1]:
                raise ValueError(
                    f"{side}_prototypes hold {given.count} prototypes but the {side} output has "
                    f"{output.shape[-1]} columns; both must be K"
                )
        of_student, of_teacher = prototypes
        assert of_student is not None
        assert of_teacher is not None
        self._warn_if_frozen(of_student)
        given_at = (of_student, self.student_temp, student.dtype), (of_teacher.detach(), teacher_temp, teacher.dtype)
        return Outputs(student, teacher, *(_log_normalizer(*at) for at in given_at))

    def _uncentered(self, teacher: PrototypeLogits | Tensor) -> PrototypeLogits | Tensor:
        if isinstance(teacher, PrototypeLogits):
            return teacher.with_vmf()
        if self.centering.over_probabilities:
            raise ValueError(
                f"update_center got plain logits of shape {tuple(teacher.shape)} without the prototypes' norms, which the vMF "
                "normaliser needs; expected PrototypeLogits, or a call of the loss"
            )
        return teacher

    def _warn_if_frozen(self, prototypes: Prototypes) -> None:
        magnitude = prototypes.magnitude
        frozen = magnitude is not None and not magnitude.requires_grad
        # a warning cannot be traced: a compiled loss warns only if it also runs eagerly
        silent = self.warned or torch.compiler.is_compiling()
        if frozen and prototypes.weight.requires_grad and not silent:
            warnings.warn(FROZEN_NORMS, UserWarning, stacklevel=4)
            self.warned = True


class UnstoredVMFStream(VMFStream):
    """``VMFStream`` of a loss that takes no prototypes besides the logits."""

    def prepare(
        self,
        student: PrototypeLogits | Tensor,
        teacher: PrototypeLogits | Tensor,
        teacher_temp: float | Tensor,
        prototypes: tuple[Prototypes | None, Prototypes | None] = (None, None),
    ) -> Outputs:
        """As ``Stream.prepare``; plain logits raise TypeError."""
        if isinstance(student, Tensor) and isinstance(teacher, Tensor):
            raise TypeError(
                f"outputs are plain logits of shapes {tuple(student.shape)} and {tuple(teacher.shape)}, without the "
                "prototypes' norms that the vMF normaliser needs; expected heads that return PrototypeLogits"
            )
        return super().prepare(student, teacher, teacher_temp, prototypes)


def _log_normalizer(prototypes: Prototypes, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
    """[K] log C_D(||w_k|| / tau) - log C_D(0) for logits of ``dtype``, differentiable in the stored tensors."""
    tau = temperature_tensor(temperature, "temperature", prototypes.weight.device)
    return prototypes.with_vmf().log_normalizer(tau, accumulation_dtype(dtype))
