"""One vector of an image from its patches, and from the image at several sizes.

Legend: B images, N patches, F features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

GEM_FLOOR = 1e-6  # as published: what is negative vanishes, and the root has a slope everywhere


def generalised_mean(patches_BNF: Tensor, power: float) -> Tensor:
    """[B, F] ``(mean of max(x, 1e-6)^power)^(1 / power)`` over the patches (GeM); float32.

    Source: Radenovic et al., "Fine-tuning CNN image retrieval with no human annotation", TPAMI 2019 (arXiv:1711.02512).
    """
    return patches_BNF.float().clamp(min=GEM_FLOOR).pow(power).mean(dim=1).pow(1 / power)


def class_and_patches(features_BF: Tensor, patches_BNF: Tensor, power: float = 4.0) -> Tensor:
    """[B, 2 F] the class token beside the generalised mean of the patches, as DINO detects copies."""
    return torch.cat([features_BF.float(), generalised_mean(patches_BNF, power)], dim=1)


def mean_of_sizes(features: Sequence[Tensor]) -> Tensor:
    """[B, F] mean of [B, F] features of images at several sizes, of length 1.

    The features are averaged as they are, so that a size with longer features counts for more, as published.
    """
    return functional.normalize(torch.stack([part.float() for part in features]).mean(dim=0), dim=1)
