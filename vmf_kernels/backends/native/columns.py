"""Log-sums over the teacher's rows that the gathering pass forms beside the loss, as a maximum and a mass of each prototype.

Legend: K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmf_kernels.backends.base_two import LN_2
from vmf_kernels.backends.native import module
from vmf_kernels.backends.native.scores import NativeKeys, in_base_2


def no_columns(prototypes: int) -> Tensor:
    """[2, K] maximum and mass of no rows."""
    columns = module.new(2, prototypes)
    columns[0] = torch.finfo(torch.float32).min
    columns[1] = 0
    return columns


def sums_of_columns(columns: Tensor, keys: NativeKeys) -> Tensor:
    """[K] nats, over the probabilities with the keys' other bias; -inf without rows."""
    top, mass = columns
    assert keys.other_bias is not None
    assert keys.bias is not None
    # the pass read logits with the bias of the target
    sums: Tensor = (top + (keys.other_bias - in_base_2(keys.bias.reshape(-1))) + mass.log2()) * LN_2
    return sums
