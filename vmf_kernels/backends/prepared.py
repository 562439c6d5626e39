"""What a backend has made of prototypes, kept for the other sums that one call takes over them.

Only inside a call of the library: between two calls weights often change through ``.data``, of which no version tells.
"""

from __future__ import annotations

from typing import Any

from vmf_kernels.prototypes import Prototypes
from vmf_kernels.tensors import has_memory

ATTRIBUTE = "_vmf_kernels_prepared"  # of the weight, which goes through torch's dispatcher as the same object


def keep_prepared(prototypes: Prototypes) -> None:
    """From here to ``drop_prepared`` nobody changes these prototypes: what is prepared for one pass serves the next."""
    if has_memory(prototypes.weight):  # a traced tensor has no place for it
        setattr(prototypes.weight, ATTRIBUTE, {})


def prepared_of(prototypes: Prototypes) -> dict[Any, Any] | None:
    """Where to keep what is prepared, by what tells it from others; None where it would not be used again."""
    return getattr(prototypes.weight, ATTRIBUTE, None)


def drop_prepared(prototypes: Prototypes) -> None:
    """Free what was kept."""
    if has_memory(prototypes.weight):
        vars(prototypes.weight).pop(ATTRIBUTE, None)
