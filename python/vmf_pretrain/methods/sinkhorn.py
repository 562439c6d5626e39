"""Sinkhorn-Knopp whose last bias stays, so that a head can be evaluated between batches and after a run.

Legend: K prototypes.
"""

from typing import Any

import torch
from torch import Tensor

from vmf_kernels import PrototypeLogits, SinkhornKnopp


class RememberedSinkhorn(SinkhornKnopp):
    """``SinkhornKnopp`` that remembers the [K] bias of its last batch, in the buffer ``last``.

    Args:
        prototypes: K.
        options: as ``SinkhornKnopp``.
    """

    last: Tensor

    def __init__(self, prototypes: int, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("last", torch.zeros(prototypes))

    @torch.no_grad()
    def target_bias(
        self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """[K] nats, as ``SinkhornKnopp.target_bias``."""
        found = super().target_bias(teacher, temperature, bias)
        self.last.copy_(found)
        return found

    def bias(self, temperature: float) -> Tensor:
        """[K] nats, of the last batch at its temperature."""
        return self.last
