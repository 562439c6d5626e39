"""Stores a running centre in its loss's state dict under the published name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class CenterOwner(nn.Module):
    """A module with a property ``center``, which may be assigned any tensor, a parameter too."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # nn.Module would register a parameter beside the property
        else:
            super().__setattr__(name, value)


def publish_center(module: nn.Module, public: str, private: str, dims: int = 2) -> None:
    """Store the centre ``private`` in state dicts of ``module`` under the name ``public``, as [1, ..., K] of ``dims`` dims.

    If the module keeps no centre (Sinkhorn-Knopp), the centre of a checkpoint is ignored with a ``UserWarning``.
    """
    module.register_state_dict_post_hook(_Publish(public, private, dims))
    module.register_load_state_dict_pre_hook(_Adopt(public, private, dims))
    module.register_load_state_dict_post_hook(_NameMissing(public, private))


@dataclass
class _Publish:
    """After ``state_dict()``; a class, not a closure, so that losses can be pickled."""

    public: str
    private: str
    dims: int

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if prefix + self.private in state:
            center = state.pop(prefix + self.private)
            state[prefix + self.public] = center.reshape((1,) * (self.dims - 1) + center.shape[-1:])


@dataclass
class _Adopt:
    """Before ``load_state_dict()``."""

    public: str
    private: str
    dims: int

    def __call__(self, module: nn.Module, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        name = prefix + self.public
        if name not in state or not isinstance(state, dict):
            return
        given, kept = state.pop(name), _kept(module, self.private)
        if kept is None:
            warnings.warn(
                f"{type(module).__name__} has a centring rule that keeps no centre: {name!r} of the checkpoint is not used",
                UserWarning,
                stacklevel=2,
            )
            return
        if isinstance(given, Tensor) and given.numel() == kept.numel() and given.shape[-1:] == kept.shape[-1:]:
            state[prefix + self.private] = given.reshape(kept.shape)
            return
        got = f"a shape {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        expected = [1] * (self.dims - 1) + list(kept.shape[-1:])
        rest[-1].append(
            f"{name} is {got} in the checkpoint; expected a tensor of shape {expected}"
        )  # the list of errors
        state[prefix + self.private] = kept  # or it would be said to be missing as well


@dataclass
class _NameMissing:
    """After ``load_state_dict()``: reports a missing centre under the name that it has in a checkpoint."""

    public: str
    private: str

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        missing: list[str] = incompatible_keys.missing_keys
        # the prefix is not known here; for the centre of another loss with the same private name, this name is right too
        missing[:] = [
            key.removesuffix(self.private) + self.public if f".{key}".endswith(f".{self.private}") else key
            for key in missing
        ]


def _kept(module: nn.Module, path: str) -> Tensor | None:
    """The centre at a dotted path; None if its owner is no module, whose state is not loaded, or has none."""
    *parts, name = path.split(".")
    owner: Any = module
    for part in parts:
        owner = getattr(owner, part, None)
    center = getattr(owner, name, None) if isinstance(owner, nn.Module) else None
    return center if isinstance(center, Tensor) else None
