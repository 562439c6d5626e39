"""What a backend has made of prototypes, kept for other passes over the same output of a head.

Weights often change between steps through ``.data``, of which no version tells. So nothing outlives the output of the head that
the prototypes came with, and it is kept only where somebody says that more passes are to come (``keep_prepared``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmf_kernels.prototypes import Prototypes
from vmf_kernels.tensors import version_of

ATTRIBUTE = "_vmf_kernels_prepared"  # of the detached weight, which goes through torch's dispatcher as the same object


class Prepared:
    """Room for one thing made of a weight and its magnitude; empty again once either has changed or another stream asks."""

    def __init__(self) -> None:
        self._made: tuple[Any, Any, Any] | None = None  # state, key, thing

    def get(self, prototypes: Prototypes, key: object) -> Any:
        """What was put in under this key; None if nothing was, or the prototypes are no longer what they were."""
        state = _state(prototypes)
        if self._made is None or state is None or self._made[:2] != (state, key):
            return None
        return self._made[2]

    def put(self, prototypes: Prototypes, key: object, thing: Any) -> None:
        """Keep ``thing``, made of these prototypes; nothing where it could not be known to be current."""
        state = _state(prototypes)
        self._made = None if state is None else (state, key, thing)


def keep_prepared(prototypes: Prototypes) -> None:
    """Say that several passes over prototypes as they are read follow, the last of them a loss: ``drop_prepared`` ends it.

    Nothing is kept of others: a parameter itself lives longer than what its head put out.
    """
    if prototypes.is_read and not prototypes.requires_grad and prepared_of(prototypes) is None:
        setattr(prototypes.weight, ATTRIBUTE, Prepared())


def prepared_of(prototypes: Prototypes) -> Prepared | None:
    """The room that ``keep_prepared`` made, or None."""
    return getattr(prototypes.weight, ATTRIBUTE, None)


def drop_prepared(prototypes: Prototypes) -> None:
    """Free what is kept."""
    if prepared_of(prototypes) is not None:
        delattr(prototypes.weight, ATTRIBUTE)


def _state(prototypes: Prototypes) -> Any:
    """What is the same as long as the prototypes are; None where that cannot be known.

    A graph that is captured must not read what was made outside of it, nor anybody else what it will make when it is replayed.
    """
    stored = [prototypes.weight, *([] if prototypes.magnitude is None else [prototypes.magnitude])]
    versions = [version_of(tensor) for tensor in stored]
    if None in versions:
        return None
    stream = _stream(prototypes.weight)
    return None if stream is None else (stream, prototypes.kind, versions, [tensor.data_ptr() for tensor in stored])


def _stream(tensor: Tensor) -> int | None:
    """Torch's current stream on the tensor's device, 0 on a CPU; None while it is captured."""
    if tensor.device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)
