"""The compiled module, and the conversion of tensors for it. It checks what it gets (``csrc/cpu/tensors.h``).

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
CPU = torch.device("cpu")
ALIGNMENT = 64  # bytes: a cache line, and the widest vector
LEAST_WORK = 1 << 18  # products per thread: fewer are faster than waking another one (python -m bench.least_work)
WITH_BF16 = ("avx512bf16", "amx_bf16")  # instruction sets with bf16 products
STORED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of features and prototypes


@functools.cache
def native() -> ModuleType | None:
    """The module, or None if it was not built or cannot be loaded; ``why_absent`` says which."""
    return None if why_absent() is not None else importlib.import_module(MODULE)


@functools.cache
def why_absent() -> str | None:
    """Why the module is absent, or None if it is there."""
    if importlib.util.find_spec(MODULE) is None:
        return "its module was not built: install vmf_kernels again where a C++17 compiler is found"
    try:
        importlib.import_module(MODULE)
    except ImportError as error:  # of another Python or C++ library
        return f"its module cannot be loaded ({error}): install vmf_kernels again on this machine"
    return None


def built() -> ModuleType:
    """The module; call only if it is there."""
    module = native()
    assert module is not None, "unsupported() was not asked first"
    return module


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this machine can run, the best last."""
    return tuple(built().available())


def execution(products: torch.dtype) -> Any:
    """How a call runs: with the best instruction set and torch's number of threads."""
    return _execution(products, torch.get_num_threads(), LEAST_WORK, instruction_sets())


@functools.lru_cache(maxsize=64)
def _execution(products: torch.dtype, threads: int, least_work: int, sets: tuple[str, ...]) -> Any:
    module = built()
    name = "bf16" if products == torch.bfloat16 else "fp32"
    return module.Execution(
        isa=sets[-1], products=getattr(module.Products, name), threads=threads, least_work=least_work
    )


def has_bf16_products() -> bool:
    """Whether the machine has instructions that multiply bf16 numbers."""
    return instruction_sets()[-1] in WITH_BF16


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for the module: on the CPU and of this dtype, whatever torch's defaults are."""
    return torch.empty(shape, dtype=dtype, device=CPU)


def fp32(values: Tensor) -> Tensor:
    """The same numbers, fp32 and contiguous."""
    if values.dtype == torch.float32 and values.is_contiguous() and not values.is_neg():
        return values
    return values.resolve_neg().to(torch.float32).contiguous()


def workspace(bytes_needed: int) -> tuple[Tensor, int]:
    """Memory for one call, to be kept until it returns, and the address of its first whole cache line."""
    memory = new(bytes_needed + ALIGNMENT, dtype=torch.uint8)
    return memory, -(-memory.data_ptr() // ALIGNMENT) * ALIGNMENT
