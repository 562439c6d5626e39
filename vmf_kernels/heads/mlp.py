"""The MLP of a projection head, its bottleneck, and their initialisation.

Legend: R rows, D bottleneck dim.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

INIT_STD = 0.02  # of the MLP's weights, truncated at +-2 (absolute): the ViT initialisation the published head uses


def check_head_dims(in_dim: int, out_dim: int, hidden_dim: int, bottleneck_dim: int) -> None:
    """Raise ValueError unless these are valid dims of a head."""
    if min(in_dim, out_dim, hidden_dim) < 1 or bottleneck_dim < 2:
        raise ValueError(
            f"in_dim, out_dim, hidden_dim, bottleneck_dim are {in_dim}, {out_dim}, {hidden_dim}, {bottleneck_dim}; "
            "expected at least 1, 1, 1 and 2"
        )


def unit_rows(hidden: Tensor) -> Tensor:
    """The L2-normalised bottleneck; rows of zeros stay zero."""
    # as published: in fp16, 1e-12 is 0, and a row of zeros would be divided by 0
    return functional.normalize(hidden, dim=-1, p=2.0, eps=1e-6 if hidden.dtype == torch.float16 else 1e-12)


def projection_mlp(
    in_dim: int, hidden_dim: int, out_dim: int, layers: int, *, use_bn: bool, bias: bool = True
) -> nn.Module:
    """The initialised MLP of a head: linear layers with GELU, and BatchNorm before it if ``use_bn``; at least one layer."""
    mlp = _layers(in_dim, hidden_dim, out_dim, layers, use_bn=use_bn, bias=bias)
    init_linears(mlp)
    return mlp


class HeadLinear(nn.Linear):
    """A linear layer of a head's MLP; ``reset_parameters`` initialises it as the head does, in any order of calls."""

    def reset_parameters(self) -> None:
        """Truncated normal weights of standard deviation 0.02, and a zero bias."""
        init_linear(self)


def init_linears(module: nn.Module) -> None:
    """Give every linear layer weights from a truncated normal of deviation 0.02 and zero biases, now and when reset."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            # not constructed as a HeadLinear: nn.Linear must first draw its own weights, as in the published heads
            if type(layer) is nn.Linear:
                layer.__class__ = HeadLinear
            init_linear(layer)


def init_linear(layer: nn.Linear) -> None:
    """Truncated normal weights of standard deviation 0.02, and a zero bias if there is one."""
    nn.init.trunc_normal_(layer.weight, std=INIT_STD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def reset_children(head: nn.Module) -> None:
    """Initialise all modules of a head by their own ``reset_parameters``, after ``to_empty()`` or to start again."""
    for module in head.modules():
        if module is not head and callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()  # type: ignore[operator]


def _layers(in_dim: int, hidden_dim: int, out_dim: int, layers: int, *, use_bn: bool, bias: bool) -> nn.Module:
    if layers <= 1:
        return nn.Linear(in_dim, out_dim, bias=bias)
    widths = [in_dim] + [hidden_dim] * (layers - 1)
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        modules.append(nn.Linear(before, after, bias=bias))
        if use_bn:
            modules.append(nn.BatchNorm1d(after))
        modules.append(nn.GELU())
    modules.append(nn.Linear(hidden_dim, out_dim, bias=bias))
    return nn.Sequential(*modules)
