"""Last layers whose logits are never stored.

Legend: R rows, K prototypes, D bottleneck dim.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from vmf_kernels.heads.layer_keys import WEIGHT_NORM, convert_keys
from vmf_kernels.prototypes import Prototypes, linear_prototypes, weight_norm_prototypes
from vmf_kernels.tensors import inside_function
from vmf_kernels.unstored.prototype_logits import PrototypeLogits

REPLICA = (
    "torch.nn.DataParallel joins the stored tensors of its replicas, and these logits are not stored; expected "
    "DistributedDataParallel, or DataParallel around the backbone alone"
)


class LinearPrototypes(nn.Linear):
    """Plain linear layer without bias that never computes its logits."""

    def prototypes(self) -> Prototypes:
        """The layer's K prototypes, sharing its parameters."""
        return handed_out(linear_prototypes(self.weight))

    def forward(self, features: Tensor) -> PrototypeLogits:  # type: ignore[override]
        """[..., D] features to [..., K] logits that are not stored."""
        return outlive(self, PrototypeLogits(features, self.prototypes()))


class StoredNorm(WeightNorm):
    """The hook by which ``torch.nn.utils.remove_weight_norm`` recognises a layer; it computes no weight in a call.

    Args:
        of: class of the layer.
        becomes: class of the layer without weight norm.
    """

    def __init__(self, of: type[nn.Module], becomes: type[nn.Module]) -> None:
        super().__init__("weight", 0)
        self.of, self.becomes = of, becomes

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Do nothing: the layer's prototypes are computed where they are used."""

    def remove(self, module: nn.Module) -> None:
        """Make ``weight_g`` and ``weight_v`` one parameter ``weight``.

        Raises:
            RuntimeError: the layer now has another class or sharded parameters, for example from ``fully_shard``.
        """
        kinds = type(module), type(module._parameters["weight_v"])
        if kinds != (self.of, nn.Parameter):
            raise RuntimeError(
                f"cannot remove weight norm from a {kinds[0].__name__} whose weight_v is a {kinds[1].__name__}; expected a "
                f"{self.of.__name__} with a Parameter, as it is before fully_shard"
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
        """[K, D] effective weight, differentiable, computed at each access: writing into it has no effect."""
        return self.prototypes().effective_weight()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise AttributeError(
            "weight is computed from weight_g and weight_v; expected those to be assigned, or "
            "torch.nn.utils.remove_weight_norm(layer) before"
        )

    @weight.deleter
    def weight(self) -> None:
        """Do nothing: no weight is kept. Code that copies layers with weight norm deletes it for this reason."""

    def reset_parameters(self) -> None:
        """Norms of 1 and directions as ``nn.Linear``, as published heads start."""
        reset_weight_norm(self.weight_g, self.weight_v)


class PrototypeLayer(WeightNormed, nn.Module):
    """Weight-normed linear layer without bias, ``w_k = g_k v_k / ||v_k||``, that never computes its logits.

    It also loads weight norm stored as a parametrization, and a plain ``weight``, whose norms become ``weight_g``. Frozen norms
    stay frozen at the loaded values, as with a published checkpoint.

    After ``torch.nn.utils.remove_weight_norm(layer)`` the layer has a plain ``weight``; its logits are still not stored.

    Args:
        dim: D.
        num_prototypes: K.
        frozen_norm: keep ``g`` at 1 (``requires_grad=False``).

    Attributes:
        weight_g: [K, 1] signed norms, 1 at the start.
        weight_v: [K, D] directions, initialised as ``nn.Linear``.
        weight: [K, D] effective weight, computed at each access; not a parameter.

    Example:
        >>> layer = PrototypeLayer(4, 512)
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(layer(x).materialize(), x @ layer.weight.T, atol=1e-6)
        True
    """

    def __init__(self, dim: int, num_prototypes: int, *, frozen_norm: bool = False) -> None:
        super().__init__()
        # like nn.Linear's, the parameters follow torch's default dtype and device
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
        convert_keys(state_dict, prefix, WEIGHT_NORM, rest[-1])  # the last argument is the list of errors
        super()._load_from_state_dict(state_dict, prefix, *rest)


def handed_out(stored: Prototypes) -> Prototypes:
    """A layer's prototypes as its outputs hold them: detached from the parameters if autograd is off."""
    magnitude = stored.magnitude
    if not torch.is_grad_enabled():
        # a view would still require a gradient, which would then go to the view and not to the parameter
        return replace(stored.detach(), severed=inside_function())
    # views, because DistributedDataParallel finds an output's parameters by its graph, in which a leaf has no node
    weight = stored.weight.view_as(stored.weight)
    return replace(stored, weight=weight, magnitude=None if magnitude is None else magnitude.view_as(magnitude))


def outlive(unit: nn.Module, logits: PrototypeLogits) -> PrototypeLogits:
    """The logits, with copied tensors if ``unit`` is an FSDP2 unit: it may free the prototypes as soon as it returns.

    The loss reads the prototypes later. The copy is as large as the freed memory, and gradients pass through it. Each call
    makes a new copy.

    Args:
        unit: the module whose ``forward`` is about to return the logits.
        logits: the logits of a layer in it.

    Raises:
        RuntimeError: ``unit`` is a replica of ``torch.nn.DataParallel``.
    """
    if getattr(unit, "_is_replica", False):
        raise RuntimeError(REPLICA)
    if not is_fsdp_unit(unit):
        return logits
    stored = logits.prototypes
    magnitude = None if stored.magnitude is None else stored.magnitude.clone()
    # rows too: if the unit is the layer itself, they are its input, and FSDP2 would warn about a view of it
    return PrototypeLogits(logits.features.clone(), replace(stored, weight=stored.weight.clone(), magnitude=magnitude))


def is_fsdp_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has made it a unit of its own."""
    # not imported here, which takes most of a second: whoever has made such a module has imported it
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def reset_weight_norm(magnitude: Tensor, direction: Tensor) -> None:
    """Norms of 1, and directions as ``nn.Linear`` starts its weight."""
    nn.init.ones_(magnitude)
    nn.init.kaiming_uniform_(direction, a=math.sqrt(5))
