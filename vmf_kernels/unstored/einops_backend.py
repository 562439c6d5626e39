"""``einops`` for objects that stand for a [..., K] tensor, by a subclass of its backend class, as einops provides for.

einops asks all existing subclasses when it meets a new type, so ours must exist by then. It is made with the first such
object after einops was imported, and never if nobody imports einops.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from vmf_kernels.unstored.row_index import advice


def offer_to_einops(kind: type) -> None:
    """Let einops take objects of ``kind``, a subclass of ``UnstoredRows``, if it has been imported."""
    if "einops" in sys.modules and not torch.compiler.is_compiling():  # a class cannot be made in a trace
        _make_backend(kind)


@functools.cache
def _make_backend(kind: type) -> type:
    from einops._backends import AbstractBackend  # the class that einops documents for other backends

    class Backend(AbstractBackend):
        framework_name = f"{__name__}:{kind.__name__}"

        def is_appropriate_type(self, tensor: object) -> bool:
            return isinstance(tensor, kind)

        def reshape(self, x: Any, shape: Any) -> Any:
            return x.reshape(tuple(shape))

        def transpose(self, x: Any, axes: Any) -> Any:
            return x.permute(tuple(axes))

        def add_axis(self, x: Any, new_position: int) -> Any:
            return x.unsqueeze(new_position)

        def add_axes(self, x: Any, n_axes: int, pos2len: dict[int, int]) -> Any:
            for position in sorted(pos2len):
                x = x.unsqueeze(position)
            return x.expand(*(pos2len.get(place, -1) for place in range(n_axes)))

        def tile(self, x: Any, repeats: Any) -> Any:
            return x.repeat(*repeats)

        def stack_on_zeroth_dimension(self, tensors: list[Any]) -> Any:
            return torch.stack(tensors)

        def concat(self, tensors: list[Any], axis: int) -> Any:
            return torch.cat(tensors, dim=axis)

        def is_float_type(self, x: Any) -> bool:
            return True

        def reduce(self, x: Any, operation: str, axes: Any) -> Any:
            raise TypeError(f"einops.reduce of {kind.__name__}: {advice(operation)}")

    sys.modules.setdefault(
        Backend.framework_name, sys.modules[__name__]
    )  # einops asks whether the framework is imported
    return Backend
