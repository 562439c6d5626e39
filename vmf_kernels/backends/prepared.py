"""Prototypes as a backend has prepared them, kept for the other sums over them in the same call.

They are kept only inside one call of the library: between calls weights often change through ``.data``, which does not
change a tensor's version.
"""

from __future__ import annotations

from typing import Any

from vmf_kernels.prototypes import Prototypes
from vmf_kernels.tensors import has_memory

ATTRIBUTE = "_vmf_kernels_prepared"  # of the weight, which stays the same object in torch's dispatcher


def keep_prepared(prototypes: Prototypes) -> None:
    """Until ``drop_prepared``, later passes reuse prepared prototypes; nobody may change the prototypes in between."""
    if has_memory(prototypes.weight):  # a traced tensor cannot hold them
        setattr(prototypes.weight, ATTRIBUTE, {})


def prepared_of(prototypes: Prototypes) -> dict[Any, Any] | None:
    """The store of prepared prototypes, by a key of how they were prepared; None if they would not be used again."""
    return getattr(prototypes.weight, ATTRIBUTE, None)


def drop_prepared(prototypes: Prototypes) -> None:
    """Free what was kept."""
    if has_memory(prototypes.weight):
        vars(prototypes.weight).pop(ATTRIBUTE, None)
