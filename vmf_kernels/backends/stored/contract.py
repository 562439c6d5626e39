"""What a backend of the loss on stored logits computes.

Legend: S / T student / teacher rows, G / V teacher / student views, B images, K prototypes. Rows are view-major.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Side(NamedTuple):
    """One network: stored logits, with the bias and temperature that turn them into log-probabilities."""

    logits: Tensor  # [views * B, K]
    bias: Tensor | None  # K elements, nats
    temperature: Tensor  # [] float64


class Sums(NamedTuple):
    """The results of the forward pass."""

    terms: Tensor  # [3] float64, nats: loss, teacher entropy and student entropy, weighted sums over the rows
    usage: Tensor  # [K] weighted sum of the teachers' probabilities
    student_lse: Tensor  # [B, V] base 2
    teacher_lse: Tensor  # [B, G] base 2


class StoredInputs(NamedTuple):
    """Checked arguments of the loss; see ``logit_cross_entropy``."""

    student: Side
    teacher: Side
    view_weights: Tensor  # [G, V]
    image_weights: Tensor  # [B]


class StoredBackend(Protocol):
    """One way to compute the loss on stored logits."""

    def unsupported(self, inputs: StoredInputs) -> str | None:
        """Why it cannot run on these tensors, or None."""

    def forward(self, inputs: StoredInputs) -> Sums:
        """Loss and statistics."""

    def backward(
        self, inputs: StoredInputs, loss_gradient: Tensor, student_lse: Tensor, teacher_lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient at the student's logits [S, K], in their dtype, and at its bias [K] (zeros if it has none)."""
