"""How good features are, and whether a head has collapsed: k-NN, linear probe, RankMe, usage of the prototypes.

Legend: N training rows (or images), M test rows, F feature dim, C classes, K prototypes, D bottleneck dim.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from vmf_pretrain.config.errors import PretrainError


def extract_features(backbone: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """[N, F] float32 on the CPU: the backbone's features of every image, in evaluation mode, without random numbers.

    Args:
        backbone: maps [B, C, H, W] to [B, F]; the mode of every module is restored.
        batches: [B, C, H, W] images; moved to the backbone's device.

    Raises:
        PretrainError: a feature is NaN or infinite.
        ValueError: there is no batch.
    """
    device = device_of(backbone)
    with evaluating(backbone), torch.no_grad():
        dtype = next(backbone.parameters()).dtype
        parts = [backbone(images.to(device, dtype)).float().cpu() for images in batches]
    if not parts:
        raise ValueError("batches is empty; expected at least one batch of images")
    features = torch.cat(parts)
    broken = int((~features.isfinite().all(dim=1)).sum())
    if broken:
        raise PretrainError(f"The backbone's features are NaN or infinite for {broken} of {features.shape[0]} images.")
    return features


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for ``module`` and all its parts; on exit, the mode of each part is restored."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter lives."""
    return next(module.parameters()).device
