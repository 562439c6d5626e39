"""The compiled module, and tensors as it takes them.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MODULE = "vmf_kernels._native"
ALIGNMENT = 64  # bytes: a cache line, and the widest vector
STORED = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@functools.cache
def native() -> ModuleType | None:
    """The module, or None where it was not built or cannot be loaded: ``why_absent`` says which."""
    return None if why_absent() is not None else importlib.import_module(MODULE)


@functools.cache
def why_absent() -> str | None:
    """Why there is no module, or None."""
    if importlib.util.find_spec(MODULE) is None:
        return "its module was not built: install vmf_kernels again where a C++17 compiler is found"
    try:
        importlib.import_module(MODULE)
    except ImportError as error:  # of another Python or C++ library
        return f"its module cannot be loaded ({error}): install vmf_kernels again on this machine"
    return None


def built() -> ModuleType:
    """The module, which is known to be there."""
    module = native()
    assert module is not None, "unsupported() was not asked first"
    return module


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """What this machine can run, the best last."""
    return tuple(built().available())


def execution(products: torch.dtype) -> Any:
    """How a call runs: best instruction set, torch's number of threads, its own workspace to be set."""
    module = built()
    name = "bf16" if products == torch.bfloat16 else "fp32"
    return module.Execution(
        isa=instruction_sets()[-1],
        products=getattr(module.Products, name),
        threads=torch.get_num_threads(),
    )


def has_bf16_products() -> bool:
    """Whether the machine multiplies pairs of bf16 numbers at once."""
    return instruction_sets()[-1] == "avx512bf16"


def weight_of(weight_KD: Tensor) -> Any:
    """Prototypes as stored; the tensor must outlive the result and have the elements of a row side by side."""
    module = built()
    assert weight_KD.stride(1) == 1, "rows of prototypes are contiguous"
    return module.Weight(
        data=weight_KD.data_ptr(),
        stored=getattr(module.Stored, STORED[weight_KD.dtype]),
        stride=weight_KD.stride(0),
        prototypes=weight_KD.shape[0],
        dim=weight_KD.shape[1],
    )


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous(), "the module takes contiguous memory"
    return tensor.data_ptr()


def fp32(values: Tensor) -> Tensor:
    """The same numbers, fp32 and contiguous."""
    return values.to(torch.float32).contiguous()


def run_with_workspace(run: Any, bytes_needed: int) -> Tensor:
    """Give ``run`` a workspace; the tensor that is returned must be kept until the call is over."""
    memory = torch.empty(bytes_needed + ALIGNMENT, dtype=torch.uint8)
    run.workspace = -(-memory.data_ptr() // ALIGNMENT) * ALIGNMENT
    return memory
