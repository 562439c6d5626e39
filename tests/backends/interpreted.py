"""Shared parts of the tests of Triton's kernels without a GPU: bf16 for the interpreter, and damaged launches.

Triton's interpreter multiplies the bit patterns of bf16 operands and truncates casts to bf16, in every version so far; the
kernels are right about both, so the interpreter is put right here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from vmf_kernels.backends.triton import launch

Damage = Callable[[str, list[Any], dict[str, Any]], None]


def _to_fp32(bits: Any) -> Any:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16().view(torch.uint16).numpy()


@contextmanager
def correct_bf16() -> Iterator[None]:
    """The interpreter with bf16 products of values, not bit patterns, and casts that round to nearest even."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        widened = [TensorHandle(_to_fp32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return dot(self, *widened, d, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bf16(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(_to_fp32(source.data), tl.float32)
        return cast(self, source, target)

    with (
        mock.patch.object(InterpreterBuilder, "create_dot", create_dot),
        mock.patch.object(InterpreterBuilder, "cast_impl", cast_impl),
    ):
        yield


@contextmanager
def damaged(damage: Damage) -> Iterator[list[str]]:
    """Every launch with its arguments changed in place by ``damage(kernel's name, positional, by name)``; the names seen."""
    run, names = launch.run, []

    def changed(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        arguments = list(args)
        names.append(kernel.__name__)
        damage(kernel.__name__, arguments, options)
        run(kernel, grid, *arguments, **options)

    with mock.patch.object(launch, "run", changed):
        yield names
