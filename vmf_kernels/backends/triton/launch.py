"""The launch of kernels: their device, and the one function that makes every launch.

Nothing here imports Triton before a kernel is needed: a machine without a GPU may lack it.
"""

from __future__ import annotations

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_ARCH = 80  # compute capability times 10: tensor cores for bf16, asynchronous copies
INTERPRETER_ARCH = 0


class Target(NamedTuple):
    """The device properties that kernels are tuned for."""

    arch: int  # compute capability times 10, for example 90; INTERPRETER_ARCH under Triton's interpreter
    multiprocessors: int


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors: if TRITON_INTERPRET=1 was set before its first import."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def unsupported_device(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on this device, or None."""
    if device.type == "cpu":
        return None if interpreted() else "it runs on NVIDIA GPUs, but the tensors are on the CPU"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on NVIDIA GPUs, but the tensors are on {device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    arch = target_of(device).arch
    return None if arch >= MIN_ARCH else f"it needs compute capability 8.0 or later, but {device} has {arch / 10:.1f}"


def target_of(device: torch.device) -> Target:
    """The target to tune for on a device that ``unsupported_device`` accepts."""
    return Target(INTERPRETER_ARCH, 2) if device.type == "cpu" else _cuda_target(device)


@functools.cache
def _cuda_target(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """A region whose launches go to the tensor's device, on torch's current stream there."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch ``kernel`` over ``grid``, unless the grid is empty. Reports of launches replace this function."""
    if all(grid):
        kernel[grid](*args, **options)
