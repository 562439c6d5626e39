"""The interface of a backend, and the types of backends that are made of a soft assignment.

Legend: R rows, S / T student / teacher rows, K prototypes, D embedding dim, J column weightings; logits
``l_rk = scale gain_k <x_r, weight_k> + bias_k`` and ``p_r = softmax_k(l_r)``. With a prototype group, each rank holds the same
rows and a part of the prototypes: K is the number of this rank's prototypes, and softmax runs over those of all ranks.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.pairing import Pairing
from vmf_kernels.prototypes import Keys, Prototypes


class LossInputs(NamedTuple):
    """Checked arguments of the loss; see ``prototype_cross_entropy``."""

    student_features: Tensor  # [S, D]
    student: Prototypes
    teacher_features: Tensor  # [T, D of the teacher], which may differ
    teacher: Prototypes
    teacher_bias: Tensor | None  # [K]; may hold a question that a backend may answer (``uncentered.py``)
    pairing: Pairing
    student_temperature: Tensor  # [] float64
    teacher_temperature: Tensor  # [] float64
    feature_gradient: bool
    prototype_gradient: bool
    prototype_group: ProcessGroup | None = None  # ranks over which the prototypes are split


class RowInputs(NamedTuple):
    """Checked arguments of the sums over one network's soft assignments; see ``prototype_usage``."""

    features: Tensor  # [R, D]
    prototypes: Prototypes
    temperature: Tensor  # [] float64
    bias: Tensor | None = None  # [K] nats
    prototype_group: ProcessGroup | None = None  # ranks over which the prototypes are split


class LossOutputs(NamedTuple):
    """The loss, its statistics and gradients; fp32 (fp64 for fp64 features). A gradient not requested has 0 elements."""

    loss: Tensor  # [] nats
    summary: Tensor  # [3] mean teacher entropy, student entropy and KL, nats
    usage: Tensor  # [K] mean teacher probability
    feature_gradient: Tensor  # [S, D]
    weight_gradient: Tensor  # [K, D]
    magnitude_gradient: Tensor  # [K]; 0 elements without weight norm


class Backend(Protocol):
    """One way to compute the operator. Only ``reference``, the definition of correct, stores the [R, K] values of all rows."""

    def unsupported(self, rows: Tensor, weight: Tensor) -> str | None:
        """Why it cannot run on these tensors, or None."""

    def cross_entropy(self, inputs: LossInputs) -> LossOutputs:
        """Equations (3)-(7) of vmf_kernels/README.md."""

    def usage(self, inputs: RowInputs) -> Tensor:
        """[K] mean probability of each prototype."""

    def row_log_sum_exp(self, inputs: RowInputs) -> Tensor:
        """[R] ``log sum_k exp(l_rk)``."""

    def column_log_sum_exp(self, inputs: RowInputs, offset: Tensor) -> Tensor:
        """[K] ``log sum_r exp(l_rk - offset_r)``; -inf for 0 rows. Ignores the group: prototypes do not interact."""


class StoredSums(Protocol):
    """Log-sums of one batch of rows, of which a backend reads the products again instead of forming them for each sum."""

    def over_prototypes(self, extra_K: Tensor | None) -> Tensor:
        """[R] ``log sum_k exp(l_rk + extra_k)``."""

    def over_rows(self, offset_R: Tensor) -> Tensor:
        """[K] ``log sum_r exp(l_rk - offset_r)``."""


@runtime_checkable
class StoringBackend(Protocol):
    """What a backend may be able to do besides."""

    def stored_sums(self, inputs: RowInputs) -> StoredSums | None:
        """The sums over rows that are few enough to store their logits; None if they are not."""


class Query(NamedTuple):
    """Rows against one network's prototypes, and the sums over these rows that are wanted."""

    rows: Tensor  # [R, D]
    keys: Keys
    cotangents: Tensor | None = None  # [R, D], needed if vectors_KD is requested
    weights: Tensor | None = None  # [J, R]
    sums: Tensor | None = None  # [J, K] sums_jk += sum_r weights_jr p_rk


class Assignment(NamedTuple):
    """Soft assignment of rows to prototypes, reduced over the prototypes; fp32 (fp64 for fp64 rows), nats."""

    log_sum_exp: Tensor  # [R] lse_r = log sum_k exp(l_rk)
    entropy: Tensor  # [R] H(p_r)
    barycentre: Tensor | None  # [R, D] sum_k p_rk values_k; None without values
