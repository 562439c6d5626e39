"""What may be done with a tensor from outside: whether it has memory of its own, and whether its values may be looked at."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

PLAIN = (Tensor, Parameter)  # the exact types: a subclass may keep its values elsewhere


def has_memory(tensor: Tensor) -> bool:
    """Whether it is an eager tensor with memory of its own.

    Traced, fake, meta and other wrapped tensors are not: those of ``torch.compile``, ``torch.func`` and ``torch.export``.
    """
    # torch.func and torch.vmap wrap without a type of their own
    if type(tensor) not in PLAIN or tensor.is_meta or torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return not (functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def is_readable(tensor: Tensor) -> bool:
    """Whether looking at its values neither waits for a device nor breaks a trace."""
    return tensor.device.type == "cpu" and has_memory(tensor)


def is_moved(tensor: Tensor, version: int | None) -> bool:
    """Whether it was changed in place since ``version_of`` gave this version; False where that is not known."""
    return version is not None and tensor._version != version


def version_of(tensor: Tensor) -> int | None:
    """What an in-place change raises; None for tensors that do not count, such as those of ``torch.inference_mode``."""
    return None if type(tensor) not in PLAIN or tensor.is_inference() else tensor._version


def may_require_grad(tensor: Tensor) -> bool:
    """Whether a gradient at it may be asked for; ``torch.func`` says so at another of its levels."""
    if tensor.requires_grad or torch.compiler.is_compiling():
        return tensor.requires_grad
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def refuse_gradients(**arguments: object) -> None:
    """Raise ValueError if one of these requires a gradient, which is not formed for it, in a region that records them."""
    if not torch.is_grad_enabled():
        return
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which is formed for the student's outputs and prototypes only; expected "
                f"{name}.detach()"
            )


def is_transforming() -> bool:
    """Whether ``torch.func`` (grad, vmap, ...) is at work; not asked of a trace, which has its own way with it."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def untransformed(tensor: Tensor) -> Tensor:
    """The tensor that ``torch.func`` has wrapped for its gradients.

    Raises:
        RuntimeError: it is one of a batch of ``torch.vmap``, whose members have no value of their own outside.
    """
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    if functorch.is_functorch_wrapped_tensor(tensor):
        raise RuntimeError(
            "a centre cannot take in the teacher's rows inside torch.vmap, where each call has a batch of its own; expected "
            "the loss outside of vmap, or prototype_cross_entropy with the centre as a bias"
        )
    return tensor


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A region without autocast, which would round sums to half precision; nothing on devices that have none, such as meta."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def inside_function() -> bool:
    """Whether an ``autograd.Function`` is in its forward pass, which gives a graph to the tensors that it returns alone."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    entry = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is entry:
            return True
        frame = frame.f_back
    return False
