"""What the library may do with a caller's tensor: whether it has its own memory, and whether its values may be read."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.nn import Parameter

PLAIN = (Tensor, Parameter)  # the exact types: a subclass may keep its values elsewhere


def has_memory(tensor: Tensor) -> bool:
    """Whether it is an eager tensor with its own memory.

    Traced, fake, meta and other wrapped tensors (of ``torch.compile``, ``torch.func``, ``torch.export``) are not.
    """
    # torch.func and torch.vmap wrap tensors without changing their type
    if type(tensor) not in PLAIN or tensor.is_meta or torch.compiler.is_compiling():
        return False
    return not (is_functorch_wrapped_tensor(tensor) or is_legacy_batchedtensor(tensor))


def is_readable(tensor: Tensor) -> bool:
    """Whether reading its values neither waits for a device nor breaks a trace."""
    return tensor.device.type == "cpu" and has_memory(tensor)


def is_moved(tensor: Tensor, version: int | None) -> bool:
    """Whether it was changed in place since ``version_of`` returned this version; False if that is not known."""
    return version is not None and tensor._version != version


def version_of(tensor: Tensor) -> int | None:
    """A number that every in-place change increases; None for tensors without one, as in ``torch.inference_mode``."""
    return None if type(tensor) not in PLAIN or tensor.is_inference() else tensor._version


def may_require_grad(tensor: Tensor) -> bool:
    """Whether a gradient for it may be requested; under ``torch.func`` another level may do so, so this returns True."""
    if tensor.requires_grad or torch.compiler.is_compiling():
        return tensor.requires_grad
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def refuse_gradients(**arguments: object) -> None:
    """Raise ValueError if gradients are enabled and an argument requires one: the library computes none for these."""
    if not torch.is_grad_enabled():
        return
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, but only the student's outputs and prototypes get one; expected "
                f"{name}.detach()"
            )


def without_gradient(tensor: Tensor) -> Tensor:
    """The tensor, detached if it requires a gradient."""
    return tensor.detach() if tensor.requires_grad else tensor


def is_transforming() -> bool:
    """Whether ``torch.func`` (grad, vmap, ...) is active; False in a trace, which handles it itself."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def untransformed(tensor: Tensor) -> Tensor:
    """The tensor that ``torch.func`` has wrapped for its gradients.

    Raises:
        RuntimeError: it is a member of a batch of ``torch.vmap``, which has no value of its own outside.
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
    """A region without autocast, which would round sums to half precision. No effect on devices without autocast (meta)."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def inside_function() -> bool:
    """Whether the forward pass of an ``autograd.Function`` is running: it gives a graph only to the tensors it returns."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    entry = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is entry:
            return True
        frame = frame.f_back
    return False
