"""Principal components as colours.

Legend: P patches, F features.
"""

import torch
from torch import Tensor

COLOURS = 3
TAILS = (0.01, 0.99)  # quantiles that become black and full colour: single patches do not set the scale
FLAT = 1e-12  # a component whose spread is no more than this, as a share of the features' size, is rounding


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
