"""Gradients that are computed in forward, then scaled and returned by backward, in the same memory if that is safe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmf_kernels.ops.operators import OperatorFunction, below_autograd, operator
from vmf_kernels.tensors import has_memory, is_moved, version_of

TWICE = (
    "{name} cannot be differentiated twice: its gradient is computed in closed form and recorded as a constant; "
    "expected backward() or autograd.grad() of the loss alone, not of its gradient"
)
MOVED = (
    "a second backward pass of {name} computes its gradient again, but a tensor of shape {shape} that it needs has been "
    "changed in place since the loss; expected the teacher to be updated after the last backward pass"
)


class ReadyGradients:
    """The gradients of one loss. They are returned once; a second backward pass (retain_graph) computes them again.

    Args:
        gradients: fp32 or fp64.
        scale_in_place: multiplies a gradient by a [] tensor, in the gradient's memory.
    """

    def __init__(self, gradients: Sequence[Tensor], scale_in_place: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._gradients: Sequence[Tensor] | None = gradients
        self._scale_in_place = scale_in_place

    def take(self, scale: Tensor, recompute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """Every gradient times ``scale`` (a [] tensor), in the gradient's dtype."""
        gradients = recompute() if self._gradients is None else self._gradients
        if torch.is_grad_enabled() or not has_memory(scale):  # a graph is recorded or traced: it needs new tensors
            return [g * scale.to(g.dtype) for g in gradients]
        # the [K, D] buffer itself becomes the parameter's .grad: a copy would double the head's largest gradient
        self._gradients = None
        if scale.device.type == "cpu" and scale.item() == 1.0:
            return list(gradients)
        return [self._scale_in_place(g, scale) for g in gradients]


class Kept:
    """Inputs that only a second backward pass reads, kept outside autograd's records.

    Autograd would raise for tensors of ``torch.inference_mode``, and for a teacher that moves between the loss and its backward
    pass, although the gradients have been computed already.
    """

    def __init__(self, tensors: Sequence[Tensor | None], name: str) -> None:
        self._tensors = [(t, None if t is None else version_of(t)) for t in tensors]
        self._name = name

    def unchanged(self) -> list[Tensor | None]:
        """The tensors.

        Raises:
            RuntimeError: a tensor has been changed in place, so the gradients would be different.
        """
        for tensor, version in self._tensors:
            if tensor is not None and is_moved(tensor, version):
                raise RuntimeError(MOVED.format(name=self._name, shape=list(tensor.shape)))
        return [tensor for tensor, _ in self._tensors]


class Form(NamedTuple):
    """Shape and dtype that a gradient must share with its tensor."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor | None) -> Form | None:
        """The form of a tensor; None for None."""
        return None if tensor is None else cls(tensor.shape, tensor.dtype)

    def cast(self, gradient: Tensor) -> Tensor:
        """``gradient`` in this shape and dtype."""
        if gradient.dtype == self.dtype and gradient.shape == self.shape:
            return gradient
        return gradient.to(self.dtype).reshape(self.shape)


def formed(ctx: Any, op: Any, inputs: Sequence[Any]) -> Sequence[Tensor]:
    """Calls a loss's operator; only the first of its outputs, the loss, is differentiable."""
    outputs: Sequence[Tensor] = below_autograd(op, *inputs)
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)
    return outputs


def cast_to(
    forms: Sequence[Form | None], gradients: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Each gradient in the form of its tensor; None if the tensor is None or needs no gradient."""
    each = zip(forms, gradients, needed, strict=True)
    return tuple(form.cast(g) if wanted and form is not None else None for form, g, wanted in each)


def no_gradients(count: int) -> tuple[None, ...]:
    """``count`` times None, for the inputs of an op that have no gradient."""
    return (None,) * count


def saveable(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy if it was made in ``torch.inference_mode``, which ``save_for_backward`` would not accept."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def once_differentiable(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None], name: str) -> list[Tensor]:
    """The gradients. If a graph of the backward pass is recorded, differentiating them by the loss's inputs raises."""
    if not torch.is_grad_enabled():
        return list(gradients)
    return [_once_op(gradient, *inputs, *no_gradients(3 - len(inputs)), name) for gradient in gradients]


class _Refusal(OperatorFunction):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *rest: Any) -> Tensor:
        ctx.name = rest[-1]
        copy: Tensor = below_autograd(_once_op, gradient, *rest)
        return copy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(TWICE.format(name=ctx.name))


class _Arguments(NamedTuple):
    gradient: Tensor
    first: Tensor | None
    second: Tensor | None
    third: Tensor | None
    name: str


@operator("once_differentiable", _Arguments, fake=lambda args: torch.empty_like(args.gradient), gradient=_Refusal)
def _once_op(args: _Arguments) -> Tensor:
    """A copy of a gradient that depends on the inputs of the loss ``name``; differentiating it raises."""
    return args.gradient.clone()
