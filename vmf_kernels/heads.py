"""The projection head whose last layer returns logits that are never stored.

Legend: R rows, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from vmf_kernels.layer_keys import WEIGHT_NORM, convert_keys
from vmf_kernels.logits import PrototypeLogits
from vmf_kernels.prototypes import Prototypes, weight_norm_prototypes

REPLICA = (
    "torch.nn.DataParallel joins the stored tensors of its replicas, and these logits are not stored; expected "
    "DistributedDataParallel, or DataParallel around the backbone alone"
)
INIT_STD = 0.02  # of the MLP's weights, truncated at +-2 (absolute): the ViT initialisation the published head uses


class PrototypeLayer(nn.Module):
    """Weight-normed linear layer without bias, ``w_k = g_k v_k / ||v_k||``, that never computes its logits.

    It also loads weight norm stored as a parametrization, and a plain ``weight``, whose norms become ``weight_g``, of a layer
    with frozen norms as well: they are frozen at what was loaded, as those of a published checkpoint are.

    Args:
        dim: D.
        num_prototypes: K.
        frozen_norm: keep ``g`` at 1 (``requires_grad=False``).

    Attributes:
        weight_g: [K, 1] signed norms, 1 at the start.
        weight_v: [K, D] directions, initialised as ``nn.Linear``.
    """

    def __init__(self, dim: int, num_prototypes: int, *, frozen_norm: bool = False) -> None:
        super().__init__()
        # parameters follow torch's defaults, as those of nn.Linear do
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        norms = torch.ones(num_prototypes, 1, dtype=dtype, device=device)
        self.weight_g = nn.Parameter(norms, requires_grad=not frozen_norm)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, dim, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def prototypes(self) -> Prototypes:
        """The layer's K prototypes, sharing its parameters."""
        return handed_out(weight_norm_prototypes(self.weight_g, self.weight_v))

    def forward(self, features: Tensor) -> PrototypeLogits:
        """[..., D] features to [..., K] logits that are not stored."""
        return outlive(self, PrototypeLogits(features, self.prototypes()))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        convert_keys(state_dict, prefix, WEIGHT_NORM, rest[-1])  # the last is the list of errors
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DINOHead(nn.Module):
    """DINO's head: MLP, L2-normalised bottleneck, weight-normed prototypes; logits come back unstored.

    Constructor, parameter names and initialisation are those of the published class, so its checkpoints load; unlike it,
    the module can be deep-copied.

    Args:
        in_dim: dim of the backbone's features.
        out_dim: number of prototypes K.
        use_bn: BatchNorm after each hidden layer.
        norm_last_layer: freeze the prototypes' norms at 1. DINO-vMF needs False.
        nlayers: layers of the MLP, at least 1.
        hidden_dim: width of its hidden layers.
        bottleneck_dim: D.

    Raises:
        ValueError: a dim is below 1, or ``bottleneck_dim`` below 2.
    Source: Caron et al., ICCV 2021, "Projection head" in section 3.2.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        check_head_dims(in_dim, out_dim, hidden_dim, bottleneck_dim)
        self.mlp = projection_mlp(in_dim, hidden_dim, bottleneck_dim, nlayers, use_bn=use_bn)
        self.last_layer = PrototypeLayer(bottleneck_dim, out_dim, frozen_norm=norm_last_layer)

    def forward(self, x: Tensor) -> PrototypeLogits:
        """[R, in_dim] features to [R, K] logits, in the dtype autocast gives the MLP."""
        logits: PrototypeLogits = self.last_layer(bottleneck_rows(self.mlp(x)))
        return logits if _is_fsdp_unit(self.last_layer) else outlive(self, logits)


def check_head_dims(in_dim: int, out_dim: int, hidden_dim: int, bottleneck_dim: int) -> None:
    """Raise ValueError unless a head can have these dims."""
    if min(in_dim, out_dim, hidden_dim) < 1 or bottleneck_dim < 2:
        raise ValueError(
            f"in_dim, out_dim, hidden_dim, bottleneck_dim are {in_dim}, {out_dim}, {hidden_dim}, {bottleneck_dim}; "
            "expected at least 1, 1, 1 and 2"
        )


def bottleneck_rows(hidden: Tensor) -> Tensor:
    """The L2-normalised bottleneck; zero rows stay zero."""
    # the published eps, 1e-12, is 0 in fp16, where a zero row would divide by it
    return functional.normalize(hidden, dim=-1, p=2.0, eps=max(1e-12, torch.finfo(hidden.dtype).smallest_normal))


def handed_out(stored: Prototypes) -> Prototypes:
    """A layer's prototypes as its outputs hold them: cut off from the parameters where autograd is off."""
    magnitude = stored.magnitude
    if not torch.is_grad_enabled():
        # a view would still require a gradient, which would then go to the view and not to the parameter
        return replace(stored.detach(), severed=_inside_function())
    # views: DistributedDataParallel finds the parameters an output needs by its graph, where a leaf has no node
    weight = stored.weight.view_as(stored.weight)
    return replace(stored, weight=weight, magnitude=None if magnitude is None else magnitude.view_as(magnitude))


def _inside_function() -> bool:
    """Whether an ``autograd.Function`` is in its forward pass, which gives a graph to the tensors that it returns alone."""
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != "self":
            if isinstance(frame.f_locals.get(code.co_varnames[0]), FunctionCtx):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def outlive(unit: nn.Module, logits: PrototypeLogits) -> PrototypeLogits:
    """The logits; with tensors of their own where ``fully_shard`` may free the prototypes as soon as ``unit`` returns.

    The loss reads them later than that. The copy is as large as what is freed, and gradients pass through it. Each call makes
    one of its own, so ``torch.cat`` takes the logits of two calls for those of two heads.

    Args:
        unit: the module whose ``forward`` is about to return the logits.
        logits: those of a layer in it.

    Raises:
        RuntimeError: ``unit`` is a replica of ``torch.nn.DataParallel``.
    """
    if getattr(unit, "_is_replica", False):
        raise RuntimeError(REPLICA)
    if not _is_fsdp_unit(unit):
        return logits
    stored = logits.prototypes
    magnitude = None if stored.magnitude is None else stored.magnitude.clone()
    # rows as well: where the unit is the layer itself they are its input, a view of which FSDP2 would warn
    return PrototypeLogits(logits.features.clone(), replace(stored, weight=stored.weight.clone(), magnitude=magnitude))


def _is_fsdp_unit(module: nn.Module) -> bool:
    # not imported here: that takes most of a second, and whoever has made such a module has it
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def projection_mlp(
    in_dim: int, hidden_dim: int, out_dim: int, layers: int, *, use_bn: bool, bias: bool = True
) -> nn.Module:
    """The MLP of a head, initialised: linear layers with GELU, and BatchNorm before it with ``use_bn``; one layer at least."""
    mlp = _layers(in_dim, hidden_dim, out_dim, layers, use_bn=use_bn, bias=bias)
    init_linears(mlp)
    return mlp


def init_linears(module: nn.Module) -> None:
    """Truncated normal weights of deviation 0.02 and zero biases for every linear layer in ``module``."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


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
