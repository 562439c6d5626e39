"""The compiled module ``vmf_kernels._cuda``: whether it is there, where it runs, and the arguments of its functions.

Its functions take addresses as integers (0 for no tensor) and check no shapes; ``address`` checks them for all callers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from vmf_kernels.backends.triton import launch

NAME = "vmf_kernels._cuda"
ARCH, CODE = (
    90,
    "90a",
)  # the target of the streaming passes: compute capability * 10, and nvcc's name of it
MAJOR = 1000  # CUDA's version numbers are 1000 major + 10 minor
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # of the products


@functools.cache
def module() -> Any:
    """The compiled module, imported at first use; None if it is absent, for which ``missing`` gives the reason."""
    return None if missing() is not None else importlib.import_module(NAME)


@functools.cache
def missing() -> str | None:
    """Why the compiled module cannot be imported, or None."""
    if importlib.util.find_spec(NAME) is None:
        return f"{NAME} has not been built; install the package where nvcc is found, with {CODE} among VMF_CUDA_ARCHS"
    try:
        importlib.import_module(NAME)
    except ImportError as error:  # built for another Python, or a library that it needs is absent
        return f"{NAME} cannot be loaded ({error}); install the package again on this machine"
    return None


def unsupported_device(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None."""
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs, but the tensors are on {device}"
    reason = launch.unsupported_device(device)  # the kernels between these are Triton's
    if reason is not None:
        return reason
    if (arch := launch.target_of(device).arch) != ARCH:
        return f"its passes are for compute capability {ARCH / 10:.1f}, but {device} has {arch / 10:.1f}"
    return unusable()


def unusable() -> str | None:
    """Why the compiled module cannot be used with this machine's driver, or None."""
    if (reason := missing()) is not None:
        return reason
    if CODE not in module().archs:
        archs = " ".join(module().archs)
        return f"{NAME} has been built for {archs}; install the package again with {CODE} among VMF_CUDA_ARCHS"
    runtime, driver = module().runtime_version(), module().driver_version()
    if driver // MAJOR < runtime // MAJOR:  # within one major version, older drivers work
        return (
            f"{NAME} has been built with CUDA {dotted(runtime)}, but the driver is for {dotted(driver)}; update either"
        )
    return None


def dotted(version: int) -> str:
    """13000 -> "13.0"."""
    return f"{version // MAJOR}.{version % MAJOR // 10}"


def queue(tensor: Tensor) -> Any:
    """Torch's current stream on the tensor's device."""
    stream = torch.cuda.current_stream(tensor.device)
    return module().Queue(device=stream.device_index, stream=stream.cuda_stream)


def element(dtype: torch.dtype) -> Any:
    """The module's name for a dtype of the products."""
    return getattr(module().Element, ELEMENTS[dtype])


def address(
    tensor: Tensor | None,
    device: torch.device,
    count: int,
    dtype: torch.dtype = torch.float32,
    adjacent: int | None = None,
) -> int:
    """Address of the first of ``count`` elements of a dtype on a device; 0 for None.

    Every pointer that the module gets comes from here. So a tensor that does not fit is an error, not an access beyond its
    memory.

    Args:
        tensor: contiguous, or a matrix whose rows have ``adjacent`` elements side by side.

    Raises:
        RuntimeError: the tensor is anything else.
    """
    if tensor is None:
        return 0
    lies_right = tensor.is_contiguous() if adjacent is None else tensor.stride(-1) == 1 and tensor.shape[-1] == adjacent
    if tensor.dtype != dtype or tensor.device != device or tensor.numel() != count or not lies_right:
        raise RuntimeError(
            f"the CUDA module was about to get {tensor.dtype} of shape {list(tensor.shape)} and strides "
            f"{list(tensor.stride())} on {tensor.device}; expected {count} numbers of {dtype} side by side on {device} "
            "(a fault of vmf_kernels: please report it)"
        )
    return tensor.data_ptr()
