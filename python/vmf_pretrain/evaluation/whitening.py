"""Whitening of features by the principal axes of others.

Legend: N images, F features, D dims that are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST_SHARE = 1e-5  # of the largest eigenvalue; as published


@dataclass(frozen=True, eq=False)
class Whitening:
    """A linear map that gives other images' features equal variance along every axis.

    Attributes:
        mean: [F] subtracted first.
        axes: [D, F] principal axes over the root of their eigenvalues.
    """

    mean: Tensor
    axes: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """[N, D] float32 of length 1, of features [N, F]."""
        return functional.normalize((features.double() - self.mean) @ self.axes.T, dim=1).float()


def whitening_of(features: Tensor, dims: int | None = None) -> Whitening:
    """The whitening that DINO's copy detection learns on distractors.

    Its second moment is about zero although what is whitened is centred; eigenvalues are at least 1e-5 of the largest.

    Args:
        features: [N, F] of images that are neither queries nor database, N >= 1.
        dims: how many axes are kept, the strongest first; all by default.

    Raises:
        ValueError: there is no image, or ``dims`` is not in 1 to F.
    """
    wide = features.double()
    if wide.ndim != 2 or not len(wide):
        raise ValueError(f"features have shape {tuple(features.shape)}; expected [N, F] with N >= 1")
    kept = wide.shape[1] if dims is None else dims
    if not 1 <= kept <= wide.shape[1]:
        raise ValueError(f"dims is {dims}; expected 1 to {wide.shape[1]}, the features of an image")
    values, vectors = torch.linalg.eigh(wide.T @ wide / len(wide))  # ascending
    values = values.clamp(min=float(values[-1]) * SMALLEST_SHARE).flip(0)[:kept]
    axes = vectors.flip(1)[:, :kept].T / values.sqrt()[:, None]
    return Whitening(wide.mean(dim=0), axes)
