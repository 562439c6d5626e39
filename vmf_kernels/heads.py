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
from torch.nn import functional
from torch.nn.utils.weight_norm import WeightNorm

from vmf_kernels.layer_keys import WEIGHT_NORM, convert_keys
from vmf_kernels.logits import PrototypeLogits
from vmf_kernels.prototypes import Prototypes, linear_prototypes, weight_norm_prototypes
from vmf_kernels.tensors import inside_function

REPLICA = (
    "torch.nn.DataParallel joins the stored tensors of its replicas, and these logits are not stored; expected "
    "DistributedDataParallel, or DataParallel around the backbone alone"
)
INIT_STD = 0.02  # of the MLP's weights, truncated at +-2 (absolute): the ViT initialisation the published head uses


class LinearPrototypes(nn.Linear):
    """Plain linear layer without bias that never computes its logits."""

    def prototypes(self) -> Prototypes:
        """The layer's K prototypes, sharing its parameters."""
        return handed_out(linear_prototypes(self.weight))

    def forward(self, features: Tensor) -> PrototypeLogits:  # type: ignore[override]
        """[..., D] features to [..., K] logits that are not stored."""
        return outlive(self, PrototypeLogits(features, self.prototypes()))


class StoredNorm(WeightNorm):
    """The mark by which ``torch.nn.utils.remove_weight_norm`` knows a layer; it computes no weight when the layer is called.

    Args:
        of: class of the layer.
        becomes: its class without weight norm.
    """

    def __init__(self, of: type[nn.Module], becomes: type[nn.Module]) -> None:
        super().__init__("weight", 0)
        self.of, self.becomes = of, becomes

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Nothing: the layer's prototypes are computed where they are used."""

    def remove(self, module: nn.Module) -> None:
        """Make ``weight_g`` and ``weight_v`` one parameter ``weight``.

        Raises:
            RuntimeError: the layer has another class by now, or sharded parameters, from ``fully_shard`` for example.
        """
        kinds = type(module), type(module._parameters["weight_v"])
        if kinds != (self.of, nn.Parameter):
            raise RuntimeError(
                f"weight norm is to be removed from a {kinds[0].__name__} whose weight_v is a {kinds[1].__name__}; expected a "
                f"{self.of.__name__} itself with a Parameter, which it is before fully_shard"
            )
        weight, trained = self.compute_weight(module).detach(), module.get_parameter("weight_v").requires_grad
        del module._parameters["weight_g"], module._parameters["weight_v"]
        module.__class__ = self.becomes
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=trained))

    def compute_weight(self, module: nn.Module) -> Tensor:
        """[K, D] effective weight."""
        assert isinstance(module, WeightNormed), type(module).__name__
        return module.weight


class WeightNormed:
    """What layers with the parameters ``weight_g`` [K, 1] and ``weight_v`` [K, D] share."""

    weight_g: Tensor
    weight_v: Tensor

    def prototypes(self) -> Prototypes:
        """The layer's K prototypes, sharing its parameters."""
        return handed_out(weight_norm_prototypes(self.weight_g, self.weight_v))

    @property
    def weight(self) -> Tensor:
        """[K, D] effective weight, differentiable, computed at each access: writing into it changes nothing."""
        return self.prototypes().effective_weight()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise AttributeError(
            "weight is computed from weight_g and weight_v; expected those to be assigned, or "
            "torch.nn.utils.remove_weight_norm(layer) before"
        )

    @weight.deleter
    def weight(self) -> None:
        """Nothing: none is kept, which is what those who copy layers with weight norm are after."""

    def reset_parameters(self) -> None:
        """Norms of 1 and directions as ``nn.Linear``, as published heads start."""
        reset_weight_norm(self.weight_g, self.weight_v)


class PrototypeLayer(WeightNormed, nn.Module):
    """Weight-normed linear layer without bias, ``w_k = g_k v_k / ||v_k||``, that never computes its logits.

    It also loads weight norm stored as a parametrization, and a plain ``weight``, whose norms become ``weight_g``, of a layer
    with frozen norms as well: they are frozen at what was loaded, as those of a published checkpoint are.

    ``torch.nn.utils.remove_weight_norm(layer)`` leaves a plain ``weight`` and logits that are unstored still.

    Args:
        dim: D.
        num_prototypes: K.
        frozen_norm: keep ``g`` at 1 (``requires_grad=False``).

    Attributes:
        weight_g: [K, 1] signed norms, 1 at the start.
        weight_v: [K, D] directions, initialised as ``nn.Linear``.
        weight: [K, D] effective weight, computed at each access; no parameter.
    """

    def __init__(self, dim: int, num_prototypes: int, *, frozen_norm: bool = False) -> None:
        super().__init__()
        # parameters follow torch's defaults, as those of nn.Linear do
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        self.in_features, self.out_features = dim, num_prototypes
        norms = torch.empty(num_prototypes, 1, dtype=dtype, device=device)
        self.weight_g = nn.Parameter(norms, requires_grad=not frozen_norm)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, dim, dtype=dtype, device=device))
        self.register_parameter("bias", None)
        self.register_forward_pre_hook(StoredNorm(PrototypeLayer, LinearPrototypes))
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Sizes, and how to get a plain layer."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias=False"
        return f"{sizes}, weight norm, which torch.nn.utils.remove_weight_norm takes off"

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

    def reset_parameters(self) -> None:
        """Initialise every parameter and buffer as the constructor does."""
        reset_children(self)

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
        return replace(stored.detach(), severed=inside_function())
    # views: DistributedDataParallel finds the parameters an output needs by its graph, where a leaf has no node
    weight = stored.weight.view_as(stored.weight)
    return replace(stored, weight=weight, magnitude=None if magnitude is None else magnitude.view_as(magnitude))


def outlive(unit: nn.Module, logits: PrototypeLogits) -> PrototypeLogits:
    """The logits; with tensors of their own where ``fully_shard`` may free the prototypes as soon as ``unit`` returns.

    The loss reads them later than that. The copy is as large as what is freed, and gradients pass through it. Each call makes
    one of its own.

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


def reset_weight_norm(magnitude: Tensor, direction: Tensor) -> None:
    """Norms of 1, and directions as ``nn.Linear`` starts its weight."""
    nn.init.ones_(magnitude)
    nn.init.kaiming_uniform_(direction, a=math.sqrt(5))


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
