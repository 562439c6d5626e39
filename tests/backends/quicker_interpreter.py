"""Triton's interpreter without the work that it repeats or throws away: a quarter of its time, and the same results.

At every call of a device function, of which a kernel makes hundreds, it replaces the functions of Triton's language by
interpreted ones, although the launch has just done so. At every operation it looks for an overflow of integers in a wider
type, and drops the answer unless it debugs; it writes down a table of numpy's types; it describes the shapes of operands and
result, of which a kernel has few; and it asks which type the result has, and how the operands are brought to it, of operands
that mostly have the same already.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

PATCHED: set[int] = set()  # globals, by identity, whose language the running launch has replaced
# types that every operation of two of a kind keeps, and Python's numbers that take them
KEPT: dict[str, tuple[type, ...]] = {"fp32": (int, float), "fp64": (int, float), "int32": (int,), "int64": (int,)}
LARGE = 2**30  # such a number is asked about
ORIGINALS: list[tuple[Any, str, Any]] = []  # object, attribute and value that ``install`` has replaced


class _Nothing:
    """The scope of a replacement that was not needed."""

    def restore(self) -> None:
        """Nothing."""


def install() -> None:
    """From now on, for this process."""
    from triton.language import core
    from triton.runtime import interpreter

    if ORIGINALS:
        return  # installed before
    builder, semantic = interpreter.interpreter_builder, type(interpreter.interpreter_semantic)
    for target, name, value in (
        (interpreter, "_patch_lang", _once_a_launch(interpreter._patch_lang)),
        (interpreter.GridExecutor, "__call__", _launch(interpreter.GridExecutor.__call__)),
        (interpreter, "_get_np_dtype", _once_a_type(interpreter._get_np_dtype)),
        (builder, "options", dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)),
        (core.block_type, "__init__", _once_a_shape(core.block_type, core)),
        (core.tensor, "__init__", _described_tensor(core)),
        (core.dtype, "__eq__", _same_or(core.dtype.__eq__)),
        (interpreter, "_patch_attr", _patch_attribute),
        (semantic, "broadcast_impl_value", _broadcast(semantic.broadcast_impl_value, core)),
        (semantic, "binary_op_type_checking_impl", _of_one_type(semantic.binary_op_type_checking_impl, core)),
    ):
        ORIGINALS.append((target, name, getattr(target, name)))
        setattr(target, name, value)


@contextmanager
def as_triton_has_it() -> Iterator[None]:
    """The interpreter without ``install``."""
    with ExitStack() as stack:
        for original in ORIGINALS:
            stack.enter_context(mock.patch.object(*original))
        yield


def _once_a_launch(patch: Any) -> Any:
    def patch_once(function: Any) -> Any:
        if id(function.__globals__) in PATCHED:
            return _Nothing()
        PATCHED.add(id(function.__globals__))
        return patch(function)

    return patch_once


def _launch(call: Any) -> Any:
    @functools.wraps(call)
    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        PATCHED.clear()  # the last launch has put the language back
        call(self, *arguments, **options)

    return launch


def _once_a_type(numpy_type: Any) -> Any:
    known: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = numpy_type(scalar)
        return known[scalar.name]

    return remembered


def _once_a_shape(block_type: Any, core: Any) -> Any:
    """``block_type.__init__``, which checks a shape and writes its name."""
    describe, known = block_type.__init__, {}

    def remembered(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        key = type(shape), element_ty.name, sizes
        if key not in known:
            describe(self, element_ty, shape)
            known[key] = dict(self.__dict__)
        self.__dict__.update(known[key])
        self.element_ty = element_ty

    return remembered


def _described_tensor(core: Any) -> Any:
    """``tensor.__init__``, with the constants that its shape consists of made once."""

    @functools.cache
    def constants(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.constexpr(math.prod(sizes)), core.tuple([core.constexpr(size) for size in sizes])

    def init(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = constants(tuple(type.shape) if type.is_block() else ())

    return init


def _same_or(equal: Any) -> Any:
    def same(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    return same


def _patch_attribute(target: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """A function of the language that needs no semantics handed over: its own are the interpreter's."""
    from triton.runtime.interpreter import interpreter_semantic

    function = getattr(member, "__wrapped__", member)  # behind a check that there are semantics

    def interpreted(*arguments: Any, **options: Any) -> Any:
        options["_semantic"] = interpreter_semantic
        return function(*arguments, **options)

    scope.set_attr(target, name, interpreted)


def _broadcast(broadcast: Any, core: Any) -> Any:
    def to_common_shape(self: Any, lhs: Any, rhs: Any) -> Any:
        if not (lhs.type.is_block() and rhs.type.is_block()):
            return broadcast(self, lhs, rhs)
        sizes = lhs.type.shape.values, rhs.type.shape.values
        if sizes[0] == sizes[1]:
            return lhs, rhs
        if len(sizes[0]) != len(sizes[1]) or any(m != n and 1 not in (m, n) for m, n in zip(*sizes, strict=True)):
            return broadcast(self, lhs, rhs)
        shape = [n if m == 1 else m for m, n in zip(*sizes, strict=True)]
        lhs, rhs = (
            operand
            if operand.type.shape.values == shape
            else self.tensor(
                self.builder.create_broadcast(operand.handle, shape), core.block_type(operand.dtype, shape)
            )
            for operand in (lhs, rhs)
        )
        return lhs, rhs

    return to_common_shape


def _of_one_type(check: Any, core: Any) -> Any:
    """``binary_op_type_checking_impl``, which keeps operands of one type, and numbers take the type of a tensor."""

    def checked(self: Any, lhs: Any, rhs: Any, *arguments: Any, **options: Any) -> Any:
        if type(lhs) is core.tensor and lhs.dtype.name in KEPT:
            if type(rhs) is core.tensor:
                if rhs.dtype.name == lhs.dtype.name:
                    return self.broadcast_impl_value(lhs, rhs)
            elif type(rhs) in KEPT[lhs.dtype.name] and abs(rhs) < LARGE:
                return self.broadcast_impl_value(lhs, self.scalar_constant(rhs, lhs.dtype))
        return check(self, lhs, rhs, *arguments, **options)

    return checked
