"""Gradients formed in the forward pass: handed out scaled, without a second buffer of their size where that is safe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vmf_kernels.backends.triton.launch import unsupported_device

TWICE = (
    "{name} cannot be differentiated twice: its gradient is formed in closed form and recorded as a constant; "
    "expected backward() or autograd.grad() without create_graph=True"
)


class ReadyGradients:
    """The gradients of one loss, given away once; asked for again (retain_graph) they are recomputed."""

    def __init__(self, gradients: Sequence[Tensor], name: str) -> None:
        self._gradients: Sequence[Tensor] | None = gradients
        self._name = name

    def take(self, scale: Tensor, recompute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """Every gradient times ``scale`` (a [] tensor), in its own dtype.

        Raises:
            RuntimeError: the caller is recording a graph of the backward pass.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE.format(name=self._name))
        gradients = recompute() if self._gradients is None else self._gradients
        if torch.compiler.is_compiling() or type(scale) is not Tensor:  # traced or fake: it has no value to look at
            return [g * scale.to(g.dtype) for g in gradients]
        # the [K, D] buffer becomes the parameter's .grad itself: a copy would double the head's largest gradient
        self._gradients = None
        if scale.device.type == "cpu" and scale.item() == 1.0:
            return list(gradients)
        return [_scaled(g, scale) for g in gradients]


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """``gradient`` times ``scale``, in place; on a GPU its memory is left alone where the scale turns out to be 1."""
    if gradient.dtype != torch.float32 or gradient.device.type != "cuda" or unsupported_device(gradient.device):
        return gradient.mul_(scale.to(gradient.dtype))
    from vmf_kernels.backends.triton.prototypes import scale_in_place

    return scale_in_place(gradient, scale)


def cast_like(gradient: Tensor, needed: bool, stored: Tensor | None) -> Tensor | None:
    """``gradient`` in the shape and dtype of the tensor it belongs to, or None where none is needed."""
    if stored is None or not needed:
        return None
    return gradient.to(stored.dtype).reshape(stored.shape)


def no_gradients(count: int) -> tuple[None, ...]:
    """``count`` times None, for the inputs of an op that have no gradient."""
    return (None,) * count


def mark_by_products(ctx: Any, outputs: Sequence[Tensor]) -> None:
    """Tell autograd that of an op's ``outputs`` only the first, the loss, is differentiable."""
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)
