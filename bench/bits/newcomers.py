"""Cases of names that became public after the script was written; an older checkout lacks them.

Legend: K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vmf_kernels
from bench.bits import heads, losses
from bench.bits.record import Case


def cases() -> Iterator[Case]:
    """Those whose names this checkout has."""
    if hasattr(vmf_kernels, "DINOvMFHead"):
        make = partial(vmf_kernels.DINOvMFHead, heads.IN_DIM, heads.COUNT, **heads.SIZES)
        for precision in heads.PRECISIONS:
            yield Case(f"DINOvMFHead/{precision}", ("DINOvMFHead",), partial(heads._train, make, precision))
    if hasattr(vmf_kernels, "CenteringRule"):
        for form in losses.FORMS:
            yield Case(f"CenteringRule/{form}", ("CenteringRule",), partial(_with_rule_of_ones_own, form))


def _with_rule_of_ones_own(form: str) -> Any:
    """A loss whose targets are sharpened towards the first prototypes."""

    class Ramp(vmf_kernels.CenteringRule):
        def target_bias(self, teacher: Any, temperature: Any, bias: Tensor | None = None) -> Tensor:
            return torch.linspace(1, 0, teacher.shape[-1], dtype=torch.float32)

    loss: type[nn.Module] = vmf_kernels.DINOLoss
    return losses.train(loss, {"centering": Ramp()}, form)
