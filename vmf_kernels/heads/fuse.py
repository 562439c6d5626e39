"""Heads written elsewhere, made to return logits that are never stored.

Legend: K prototypes, D bottleneck dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm  # private: nothing public tells weight norm from others
from torch.nn.utils.weight_norm import WeightNorm

from vmf_kernels.heads.layer_keys import PARAMETRIZED, PLAIN, WEIGHT_NORM, convert_keys
from vmf_kernels.heads.prototype_layer import (
    LinearPrototypes,
    PrototypeLayer,
    StoredNorm,
    WeightNormed,
    handed_out,
    reset_weight_norm,
)
from vmf_kernels.prototypes import Prototypes, weight_norm_prototypes

LAST_LAYERS = ("last_layer", "last_layer2")  # as the published heads name them; the second is iBOT's, of the patches
EXPECTED = (
    "expected an nn.Linear without bias, plain or with weight norm over dim 0; fuse_head(module, layer=...) names it"
)


class FusedLinear(LinearPrototypes):
    """What ``fuse_head`` turns a linear layer into: the same parameters under the same names, logits not stored.

    It loads what any of the three ways of storing a last layer saved, ``weight`` alone or either kind of weight norm.
    """

    def prototypes(self) -> Prototypes:
        """The layer's K prototypes, sharing its parameters."""
        if parametrize.is_parametrized(self, "weight"):
            return handed_out(weight_norm_prototypes(*_originals(self)))
        return super().prototypes()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``; under weight norm its directions, with norms of 1 as published heads start them."""
        if parametrize.is_parametrized(self, "weight"):
            reset_weight_norm(*_originals(self))  # the weight is computed: nn.Linear's would start a copy
        else:
            super().reset_parameters()

    def _stored_names(self) -> tuple[str, ...]:
        return PARAMETRIZED if parametrize.is_parametrized(self, "weight") else PLAIN

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        convert_keys(state_dict, prefix, self._stored_names(), rest[-1])  # the last is the list of errors
        super()._load_from_state_dict(state_dict, prefix, *rest)


class FusedWeightNormLinear(WeightNormed, FusedLinear):
    """A ``FusedLinear`` with the parameters of ``torch.nn.utils.weight_norm``: ``weight_g`` [K, 1], ``weight_v`` [K, D]."""

    def _stored_names(self) -> tuple[str, ...]:
        return WEIGHT_NORM


def fuse_head(module: nn.Module, layer: str | None = None) -> nn.Module:
    """Turn a head whose last layer is linear into one that returns ``PrototypeLogits``, in place.

    The class of the last layer changes, and the hook of ``torch.nn.utils.weight_norm`` computes no [K, D] weight any more;
    ``remove_weight_norm`` and ``remove_parametrizations`` work as before. Modules and parameters stay the objects they are,
    with their names, state dict keys and all other hooks, so optimizers, copies and wrappers made before keep working. A layer
    that is fused already, or a ``PrototypeLayer``, stays as it is. Fuse before ``fully_shard``.

    Args:
        module: the head; what it does after its last layer must be something ``PrototypeLogits`` can do.
        layer: dotted name of the last layer. By default ``module`` itself if it is linear, else ``last_layer`` and
            ``last_layer2`` of the one submodule at any depth, or ``module``, that has either, else its last submodule
            without children, in the order of registration.

    Returns:
        ``module``.

    Raises:
        ValueError: the last layer is not a linear one without bias, plain or with weight norm over dim 0, or several
            submodules have a ``last_layer``; says what was found. Nothing is changed then.

    Example:
        >>> head = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 512, bias=False))
        >>> x = torch.randn(3, 8)
        >>> stored = head(x)
        >>> unstored = fuse_head(head)(x)
        >>> type(unstored).__name__, torch.allclose(unstored.materialize(), stored, atol=1e-6)
        ('PrototypeLogits', True)
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"cannot fuse {module!r}; expected a head, an nn.Module")
    found = _last_layers(module, layer)
    for name, last in found.items():
        reason = _misfit(last)
        if reason is not None:
            place = f"its submodule {name!r} is " if name else "it is "
            raise ValueError(f"cannot fuse {type(module).__name__}: {place}{reason}; {EXPECTED}")
    for last in found.values():
        _fuse(last)
    return module


def _last_layers(module: nn.Module, layer: str | None) -> dict[str, nn.Module]:
    """The layers to fuse by dotted name; "" is the module itself."""
    named = dict(module.named_modules(remove_duplicate=False))
    if layer is not None:
        if layer not in named:
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise ValueError(
                f"{type(module).__name__} has no submodule {layer!r}; expected a dotted name below its children: {children}"
            )
        return {layer: named[layer]}
    if isinstance(module, (nn.Linear, PrototypeLayer)):
        return {"": module}
    heads = _heads(named)
    if len(heads) > 1:
        places = ", ".join(name or "the module itself" for name in heads)
        raise ValueError(
            f"{type(module).__name__} has a {' or '.join(LAST_LAYERS)} in several places: {places}; expected one head, or "
            "fuse_head(module, layer=...) for each layer to fuse"
        )
    if heads:
        return next(iter(heads.values()))
    return _last_leaf(named)


def _heads(named: dict[str, nn.Module]) -> dict[str, dict[str, nn.Module]]:
    """By the name of the module that has them: its last layers by dotted name; one entry for the same layers."""
    heads: dict[frozenset[int], tuple[str, dict[str, nn.Module]]] = {}
    for name in named:
        prefix = f"{name}." if name else ""
        own = {prefix + last: named[prefix + last] for last in LAST_LAYERS if prefix + last in named}
        if own:
            heads.setdefault(frozenset(map(id, own.values())), (name, own))
    return dict(heads.values())


def _last_leaf(named: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The last module without children, of a head whose layers have other names."""
    # weight norm of the parametrized kind is a module below its layer
    inside = tuple(f"{name}." for name, m in named.items() if name and parametrize.is_parametrized(m))
    leaves = {
        name: m
        for name, m in named.items()
        if not name.startswith(inside)
        and not isinstance(m, nn.Identity)
        and (parametrize.is_parametrized(m) or not any(True for _ in m.children()))
    }
    name = list(leaves or named)[-1]
    return {name: named[name]}


def _misfit(layer: nn.Module) -> str | None:
    """What keeps the layer from being fused, to be read after "it is"; None where nothing does."""
    if isinstance(layer, (FusedLinear, PrototypeLayer)):
        return None
    name = type(layer).__name__
    kind = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    if not isinstance(layer, nn.Linear):
        return kind
    if layer.bias is not None:
        return f"{kind} with a bias, which the loss would need apart from the prototypes"
    if parametrize.is_parametrized(layer):
        return _parametrization_misfit(layer)
    if type(layer) is not nn.Linear:
        return f"{kind}, a subclass of nn.Linear that may compute something else (fuse before fully_shard)"
    norm = _weight_norm_hook(layer)
    if norm is not None:
        return None if norm.dim == 0 else f"{kind} with weight norm over dim {_dim_name(norm.dim)}"
    if "weight" not in layer._parameters:
        stored = ", ".join(name for name, _ in layer.named_parameters()) or "nothing"
        return f"{kind} whose weight is computed from {stored}"
    return None


def _parametrization_misfit(layer: nn.Linear) -> str | None:
    applied = {name: [*steps] for name, steps in layer.parametrizations.items()}  # type: ignore[operator, union-attr]
    kinds = ", ".join(f"{type(step).__name__} of {name}" for name, steps in applied.items() for step in steps)
    if list(applied) != ["weight"] or [type(step) for step in applied["weight"]] != [_WeightNorm]:
        return f"a Linear with the parametrization {kinds}"
    if parametrize.type_before_parametrizations(layer) is not nn.Linear:
        return f"a {type(layer).__name__}, a subclass of nn.Linear that may compute something else"
    dim = applied["weight"][0].dim
    return None if dim == 0 else f"a Linear with weight norm over dim {_dim_name(dim)}"


def _dim_name(dim: int) -> str:
    return "None" if dim == -1 else str(dim)  # torch keeps None, the norm of the whole matrix, as -1


def _fuse(layer: nn.Module) -> None:
    if isinstance(layer, (FusedLinear, PrototypeLayer)):
        return
    if parametrize.is_parametrized(layer):
        # torch gives each parametrized module a class of its own, which holds its property and its way of being copied;
        # the same on another base keeps those, and leaves a FusedLinear where the parametrization is removed
        own = {name: value for name, value in vars(type(layer)).items() if name not in ("__dict__", "__weakref__")}
        layer.__class__ = type("ParametrizedFusedLinear", (FusedLinear,), own)
        return
    norm = _weight_norm_hook(layer)
    if norm is None:
        layer.__class__ = FusedLinear
        return
    for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is norm]:
        layer._forward_pre_hooks[key] = StoredNorm(FusedWeightNormLinear, FusedLinear)
    layer.__dict__.pop("weight", None)  # what the hook computed
    layer.__class__ = FusedWeightNormLinear


def _weight_norm_hook(layer: nn.Module) -> WeightNorm | None:
    hooks = layer._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, WeightNorm) and hook.name == "weight"), None)


def _originals(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(g, v) of a layer with weight norm as a parametrization."""
    stored: Any = layer.parametrizations["weight"]  # type: ignore[index]
    return stored.original0, stored.original1
