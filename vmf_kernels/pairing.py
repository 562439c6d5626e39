"""Which student rows learn from which teacher rows, and with what weight.

Rows are view-major: row ``v * B + b`` is view v of image b. Teacher view g and student view v of one image are paired
with weight ``a_gv r_b``. Rows of different images are never paired. With B = 1, ``a`` is an arbitrary matrix between single
rows; with one view on each side, ``r`` are the weights of a one-to-one pairing (masked patches).

Legend: G / V teacher / student views, B images, T = G B teacher rows, S = V B student rows, D any trailing dim.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from vmf_kernels.tensors import is_readable

FEW = 64  # weights


class Pairing(NamedTuple):
    """Pair weights ``a_gv r_b``."""

    view_weights: Tensor  # [G, V] a
    image_weights: Tensor | None  # [B] r; None means 1

    def student_mass(self, images: int) -> Tensor:
        """[S] ``n_s = sum_t a_ts`` (equation 3 of vmf_kernels/README.md)."""
        return self._spread(self.view_weights.sum(dim=0), images)

    def teacher_mass(self, images: int) -> Tensor:
        """[T] ``n_t = sum_s a_ts`` (equation 6 of vmf_kernels/README.md)."""
        return self._spread(self.view_weights.sum(dim=1), images)

    def to_students(self, teacher_TD: Tensor) -> Tensor:
        """[S, D] ``sum_t a_ts x_t``."""
        return self._carry(self.view_weights.T, teacher_TD)

    def to_teachers(self, student_SD: Tensor) -> Tensor:
        """[T, D] ``sum_s a_ts x_s``."""
        return self._carry(self.view_weights, student_SD)

    def _spread(self, view_V: Tensor, images: int) -> Tensor:
        image_B = view_V.new_ones(images) if self.image_weights is None else self.image_weights
        return torch.outer(view_V, image_B).reshape(-1)

    def _carry(self, weights_OV: Tensor, rows: Tensor) -> Tensor:
        views, dim = weights_OV.shape[1], rows.shape[1]
        by_view = rows.reshape(views, rows.shape[0] // views, dim)
        if self.image_weights is not None:
            by_view = by_view * self.image_weights[:, None]
        return (weights_OV @ by_view.reshape(views, -1)).reshape(-1, dim)


def multi_crop_weights(teacher_views: int, student_views: int, *, device: torch.device | None = None) -> Tensor:
    """[G, V] weights of DINO's mean over all pairs of different views (before the mean over images).

    Raises:
        ValueError: no pair of different views is left.
    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, equation 3.

    Example:
        >>> multi_crop_weights(2, 3).tolist()  # two global crops against them and a local one
        [[0.0, 0.25, 0.25], [0.25, 0.0, 0.25]]
    """
    weights = torch.ones(teacher_views, student_views, dtype=torch.float64, device=device)
    weights.fill_diagonal_(0.0)
    pairs = teacher_views * student_views - min(teacher_views, student_views)
    if pairs == 0:
        raise ValueError(
            f"{teacher_views} teacher view(s) and {student_views} student view(s) leave no pair of "
            "different views; expected at least one more student view"
        )
    return weights / pairs


def check_pairing(pairing: Pairing, teacher_rows: int, student_rows: int) -> int:
    """Check that the pairing fits the rows; returns the number of images B.

    Raises:
        ValueError: rows are not divisible by the views, the two sides disagree on B, or the weights have a wrong shape.
    """
    if pairing.view_weights.ndim != 2:
        raise ValueError(
            f"pair weights have shape {tuple(pairing.view_weights.shape)}; expected [teacher views, student views]"
        )
    teacher_views, student_views = pairing.view_weights.shape
    for rows, views, side in ((teacher_rows, teacher_views, "teacher"), (student_rows, student_views, "student")):
        if views == 0 or rows % views:
            raise ValueError(
                f"{side} has {rows} rows, not divisible by its {views} views (crops); pair weights are "
                f"{list(pairing.view_weights.shape)}, expected [teacher views, student views]"
            )
    images = teacher_rows // teacher_views
    if student_rows // student_views != images:
        raise ValueError(
            f"teacher has {teacher_rows} rows for {teacher_views} views but student {student_rows} rows for "
            f"{student_views}; expected the same number of images, got {images} and "
            f"{student_rows // student_views}"
        )
    if pairing.image_weights is not None and tuple(pairing.image_weights.shape) != (images,):
        raise ValueError(
            f"image or row weights have shape {tuple(pairing.image_weights.shape)}; expected [{images}], one a pair"
        )
    return images


def check_weights(pairing: Pairing) -> None:
    """Raise ValueError unless all weights are finite and not negative. Skips weights whose reading would wait for a device."""
    for weights, name in ((pairing.view_weights, "pair weights"), (pairing.image_weights, "image or row weights")):
        if weights is None or not is_readable(weights):
            continue
        if weights.numel() <= FEW:
            # as Python numbers, which is faster than torch's reduction; the sum is NaN if any is, and fails the comparison
            numbers = weights.tolist()
            # flattened after the conversion: flattening the tensor takes longer for so few
            flat: list[float] = numbers if weights.ndim == 1 else list(itertools.chain.from_iterable(numbers))
            if min(flat, default=0.0) >= 0 and sum(flat) < math.inf:
                continue
        least, most = (bound.item() for bound in weights.aminmax())
        if not (least >= 0 and most < math.inf):  # false for NaN as well
            raise ValueError(f"{name} go from {least:.3g} to {most:.3g}; expected finite numbers >= 0")
