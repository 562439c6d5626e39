"""Principal components as colours.

Legend: N images, h x w patches, P of them in all, F features.
"""

import torch
from torch import Tensor, nn

from vmf_pretrain.evaluation.features import device_of, evaluating
from vmf_pretrain.evaluation.outputs import PATCHES, Kinds, outputs, precision

COLOURS = 3
TAILS = (0.01, 0.99)  # quantiles that become black and full colour: single patches do not set the scale
FLAT = 1e-12  # a component whose spread is no more than this, as a share of the features' size, is rounding


@torch.no_grad()
def coloured_patches(network: nn.Module, inputs: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    """The patches of images as colours, by the components of all of them together: a colour means the same in each image.

    Args:
        network: a vision transformer of timm; its mode is restored.
        inputs: [N, C, H, W], moved to the network's device.
        dtype: that the features are computed in and rounded to, one of DTYPES.

    Returns:
        [N, 3, h, w] float32 in [0, 1], and the share of the variance that the components have.

    Raises:
        PretrainError: the network has no features of patches, or takes no such inputs.
    """
    device = device_of(network)
    with evaluating(network), precision(device, dtype):
        found = outputs(network, inputs.to(device), Kinds(1, frozenset({PATCHES})))[PATCHES]
    grids = found.to("cpu", dtype).float()
    colours, share = coloured(grids.flatten(0, 2))
    return colours.reshape(*grids.shape[:3], -1).permute(0, 3, 1, 2), share


def coloured(rows: Tensor) -> tuple[Tensor, float]:
    """Patches as colours: their first three principal components, each from its 1 % to its 99 % quantile.

    A component's sign is that which makes its largest loading positive, so that equal features have equal colours. A
    component without spread is 0.5.

    Args:
        rows: [P, F], at least one.

    Returns:
        [P, 3] float32 in [0, 1], and the share of the variance that the components have, 0 if there is none.
    """
    centred = rows.double() - rows.double().mean(dim=0)
    _, spread, loadings = torch.linalg.svd(centred, full_matrices=False)
    count = min(COLOURS, len(spread))
    largest = loadings[:count].abs().argmax(dim=1, keepdim=True)
    signs = loadings[:count].gather(1, largest).sign()
    values = centred @ (loadings[:count] * signs).T
    low, high = torch.quantile(values, torch.tensor(TAILS, dtype=torch.float64), dim=0)
    flat = high - low <= FLAT * max(1.0, float(rows.abs().max()))
    scaled = torch.where(flat, 0.5, ((values - low) / (high - low).clamp(min=FLAT)).clamp(0, 1))
    colours = torch.full((len(rows), COLOURS), 0.5)
    colours[:, :count] = scaled.float()
    total = float(spread.square().sum())
    return colours, 0.0 if total == 0 else float(spread[:count].square().sum()) / total
