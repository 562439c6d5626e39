"""Changes existing heads so that they return logits that are never stored.

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
EXPECTED = "expected an nn.Linear without bias, plain or with weight norm over dim 0; choose it by fuse_head(module, layer=...)"


class FusedLinear(LinearPrototypes):
    """A linear layer after ``fuse_head``: the same parameters under the same names, but its logits are not stored.

    It loads state dicts of all three forms of a last layer: a plain ``weight``, or either kind of weight norm.
    """

    def prototypes(self) -> Prototypes:
        """The layer's K prototypes, sharing its parameters."""
        if parametrize.is_parametrized(self, "weight"):
            return handed_out(weight_norm_prototypes(*_originals(self)))
        return super().prototypes()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``; under weight norm, directions as ``nn.Linear`` and norms of 1, as published heads start."""
        if parametrize.is_parametrized(self, "weight"):
            reset_weight_norm(*_originals(self))  # the weight is computed: nn.Linear's method would initialise a copy
        else:
            super().reset_parameters()

    def _stored_names(self) -> tuple[str, ...]:
        return PARAMETRIZED if parametrize.is_parametrized(self, "weight") else PLAIN

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        convert_keys(state_dict, prefix, self._stored_names(), rest[-1])  # the last argument is the list of errors
        super()._load_from_state_dict(state_dict, prefix, *rest)


class FusedWeightNormLinear(WeightNormed, FusedLinear):
    """A ``FusedLinear`` with the parameters of ``torch.nn.utils.weight_norm``: ``weight_g`` [K, 1], ``weight_v`` [K, D]."""

    def _stored_names(self) -> tuple[str, ...]:
        return WEIGHT_NORM


def fuse_head(module: nn.Module, layer: str | None = None) -> nn.Module:
    """Turn a head whose last layer is linear into one that returns ``PrototypeLogits``, in place.

    The class of the last layer changes, and the hook of ``torch.nn.utils.weight_norm`` no longer computes a [K, D] weight.
    ``remove_weight_norm`` and ``remove_parametrizations`` work as before. Modules and parameters stay the same objects, with
    their names, state dict keys and all other hooks, so optimizers, copies and wrappers made earlier keep working. A layer that
    is already fused, or a ``PrototypeLayer``, is not changed. Call this before ``fully_shard``.

    Args:
        module: the head. Whatever it does after its last layer must be possible with ``PrototypeLogits``.
        layer: dotted name of the last layer. By default it is ``module`` itself, if that is linear. Else it is ``last_layer``
            and ``last_layer2`` of the only module, ``module`` or a submodule at any depth, that has either. Else it is the
            submodule without children that was registered last.

    Returns:
        ``module``.

    Raises:
        ValueError: the last layer is not linear without bias, plain or with weight norm over dim 0; or several submodules
            have a ``last_layer``. The text says what was found; nothing is changed.

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
    """Modules with last layers, by name, each with its last layers by dotted name. Shared layers have one entry."""
    heads: dict[frozenset[int], tuple[str, dict[str, nn.Module]]] = {}
    for name in named:
        prefix = f"{name}." if name else ""
        own = {prefix + last: named[prefix + last] for last in LAST_LAYERS if prefix + last in named}
        if own:
            heads.setdefault(frozenset(map(id, own.values())), (name, own))
    return dict(heads.values())


def _last_leaf(named: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The last module without children, for a head whose layers have other names."""
    # weight norm as a parametrization is a submodule of its layer
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
    """Why the layer cannot be fused, as the continuation of "it is"; None if it can."""
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
        # torch gives each parametrized module its own class, with its property and its copy methods. The same class on
        # another base keeps these, and becomes a FusedLinear when the parametrization is removed
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
