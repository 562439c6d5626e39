"""The MLP of a projection head, its bottleneck, and how both start.

Legend: R rows, D bottleneck dim.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

INIT_STD = 0.02  # of the MLP's weights, truncated at +-2 (absolute): the ViT initialisation the published head uses


def check_head_dims(in_dim: int, out_dim: int, hidden_dim: int, bottleneck_dim: int) -> None:
    """Raise ValueError unless a head can have these dims."""
    if min(in_dim, out_dim, hidden_dim) < 1 or bottleneck_dim < 2:
        raise ValueError(
            f"in_dim, out_dim, hidden_dim, bottleneck_dim are {in_dim}, {out_dim}, {hidden_dim}, {bottleneck_dim}; "
            "expected at least 1, 1, 1 and 2"
        )


def unit_rows(hidden: Tensor) -> Tensor:
    """The L2-normalised bottleneck; zero rows stay zero."""
    # the published eps: 1e-12 is 0 in fp16, where a zero row would be divided by it
    return functional.normalize(hidden, dim=-1, p=2.0, eps=1e-6 if hidden.dtype == torch.float16 else 1e-12)


def projection_mlp(
    in_dim: int, hidden_dim: int, out_dim: int, layers: int, *, use_bn: bool, bias: bool = True
) -> nn.Module:
    """The MLP of a head, initialised: linear layers with GELU, and BatchNorm before it with ``use_bn``; one layer at least."""
    mlp = _layers(in_dim, hidden_dim, out_dim, layers, use_bn=use_bn, bias=bias)
    init_linears(mlp)
    return mlp


class HeadLinear(nn.Linear):
    """A linear layer of a head's MLP: ``reset_parameters`` starts it as the head does, in whichever order it is called."""

    def reset_parameters(self) -> None:
        """Truncated normal weights of deviation 0.02, and a zero bias."""
        init_linear(self)


def init_linears(module: nn.Module) -> None:
    """Truncated normal weights of deviation 0.02 and zero biases for every linear layer in ``module``, now and when reset."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            # not built as what it becomes: nn.Linear draws numbers of its own before, as in the published heads
            if type(layer) is nn.Linear:
                layer.__class__ = HeadLinear
            init_linear(layer)


def init_linear(layer: nn.Linear) -> None:
    """Truncated normal weights of deviation 0.02, and a zero bias if there is one."""
    nn.init.trunc_normal_(layer.weight, std=INIT_STD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def reset_children(head: nn.Module) -> None:
    """Initialise all modules of a head by their own ``reset_parameters``: after ``to_empty()``, or to start anew."""
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
