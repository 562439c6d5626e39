"""lightly's own classes, and heads of ours and of lightly's with the same parameters.

Legend: B images, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vmf_kernels.compat import lightly

IMAGES, GRID = 3, (3, 4)
IN_DIM, HIDDEN, DIM, PROTOTYPES = 12, 16, 24, 301
Record = dict[str, Tensor]


@functools.cache
def published() -> Any:
    """lightly's own classes; imported late, for the ranks do without."""
    importlib.import_module("vmf_pretrain.with_torchvision")  # lightly imports torchvision
    modules = [importlib.import_module(f"lightly.{name}") for name in ("loss", "models.modules.heads")]
    names = ("DINOLoss", "IBOTPatchLoss", "KoLeoLoss", "DINOProjectionHead", "DINOv2ProjectionHead")
    return SimpleNamespace(**{name: next(vars(m)[name] for m in modules if name in vars(m)) for name in names})


def our_network(dtype: torch.dtype, *, frozen: bool = False, batch_norm: bool = False) -> lightly.DINOProjectionHead:
    """A head whose features differ between rows, with norms between 0.5 and 1.5 of either sign unless frozen."""
    head = lightly.DINOProjectionHead(IN_DIM, HIDDEN, DIM, PROTOTYPES, batch_norm, norm_last_layer=frozen).double()
    with torch.no_grad():
        for layer in head.layers:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(
                    15
                )  # as small as they start, steps of fp32 drift apart, lightly's own from its fp64 too
        if not frozen:
            g = head.last_layer.weight_g
            g.copy_((0.5 + torch.rand_like(g)) * torch.randn_like(g).sign())
    return head.to(dtype)


def twin_of(head: nn.Module, dtype: torch.dtype, **options: Any) -> nn.Module:
    """lightly's head with the parameters of ours."""
    twin: nn.Module = published().DINOProjectionHead(IN_DIM, HIDDEN, DIM, PROTOTYPES, **options).to(dtype)
    twin.load_state_dict(head.state_dict())
    return twin
