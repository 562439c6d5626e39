"""Stores a running centre in its loss's state dict under the published name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


def publish_center(module: nn.Module, public: str, private: str, dims: int = 2) -> None:
    """Store the centre ``private`` in state dicts of ``module`` under the name ``public``, as [1, ..., K] of ``dims`` dims.

    If the module keeps no centre (Sinkhorn-Knopp), the centre of a checkpoint is ignored with a ``UserWarning``.
    """
    module.register_state_dict_post_hook(_Publish(public, private, dims))  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_Adopt(public, private))  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(_NameMissing(public, private))  # type: ignore[no-untyped-call]


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

    def __call__(self, module: nn.Module, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + self.public not in state or not isinstance(state, dict):
            return
        center = state.pop(prefix + self.public)
        owner, _, name = self.private.rpartition(".")
        if hasattr(module.get_submodule(owner), name):
            state[prefix + self.private] = center.reshape(1, -1)
        else:
            warnings.warn(
                f"{type(module).__name__} has a centring rule that keeps no centre: {prefix + self.public!r} of the "
                "checkpoint is not used",
                UserWarning,
                stacklevel=2,
            )


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
