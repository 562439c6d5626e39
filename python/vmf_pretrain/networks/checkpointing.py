"""Activation checkpointing of a backbone's blocks: they compute their activations again in the backward pass.

timm's own draws stochastic depth again from a saved generator. Here the draws of a call belong to the call, and the second
computation has to use those.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmf_pretrain.networks.stochastic_depth import StochasticDepth


def checkpoint_block(block: nn.Module) -> None:
    """Let a block store its input only, in place; names in state dicts stay."""
    inner = block.forward
    depths = [part for part in block.modules() if isinstance(part, StochasticDepth)]

    def forward(rows: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if not (block.training and torch.is_grad_enabled()):
            plain: Tensor = inner(rows, *arguments, **options)
            return plain
        drawn = [depth.kept for depth in depths]

        def run(rows: Tensor) -> Tensor:
            for depth, kept in zip(depths, drawn, strict=True):
                depth.kept = kept
            output: Tensor = inner(rows, *arguments, **options)
            return output

        again: Tensor = checkpoint(run, rows, use_reentrant=False)
        return again

    block.forward = forward
