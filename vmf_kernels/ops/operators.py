"""Registers operators with torch: kernel, shapes without values, gradient, ``vmap`` and FLOPs.

``torch.library.custom_op`` would do the same, but imports torch's compiler: a second and 150 MiB in the first call of a
process, and tens of microseconds in every call.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from vmf_kernels.tensors import PLAIN, has_memory, is_transforming, no_autocast

NAMESPACE = "vmf_kernels"
# global, because torch removes the operators when their library object is freed
LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")
EAGER = {*PLAIN, type(None), bool, str}  # types of arguments
KERNELS: dict[Any, Callable[..., Any]] = {}  # by operator
FLOPS: dict[Any, Callable[..., int]] = {}  # by operator, as ``torch.utils.flop_counter`` keeps them


class OperatorFunction(torch.autograd.Function):
    """The gradient of an operator, recorded inside torch's dispatcher."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As ``torch.autograd.Function.apply``, but without its handling of ``torch.func``: arguments are unwrapped already."""
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def operator(
    name: str,
    *arguments: type[Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    gradient: type[OperatorFunction] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated kernel as ``torch.ops.vmf_kernels.<name>``, which replaces it.

    Args:
        name: of the operator.
        arguments: NamedTuples of tensors and scalars; their fields, one after the other, are the operator's arguments. The
            kernel, ``fake`` and ``flops`` take one of each NamedTuple. Only defaults of the last one are used.
        fake: returns the outputs without their values.
        flops: number of floating-point operations; gets shapes in place of tensors.
        gradient: its ``forward(ctx, *args)`` calls the operator by ``below_autograd``; None for no gradient.
    """

    def register(kernel: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(_with_fields(arguments, kernel), mutates_args=())
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        plain = without_autocast(_of_fields(arguments, kernel))
        LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _of_fields(arguments, fake), lib=LIBRARY)
        op = getattr(getattr(torch.ops, NAMESPACE), name)
        LIBRARY.impl(name, _autograd_kernel(op.default, gradient), "Autograd")
        torch.library.register_vmap(f"{NAMESPACE}::{name}", _one_by_one(op.default), lib=LIBRARY)
        KERNELS[op.default] = plain
        if flops is not None:
            FLOPS[op] = _of_shapes(_of_fields(arguments, flops))
        return op.default

    return register


def called(op: Any, gradient: type[OperatorFunction], args: Sequence[Any]) -> Any:
    """``op(*args)`` of an operator with this gradient; without the dispatcher, where it would only record the gradient.

    The dispatcher and the conversion of arguments and results take some tens of us.
    """
    if torch.compiler.is_compiling():  # first: a trace goes no further
        return op(*args)
    listening = (
        torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )
    if listening or is_transforming() or not _is_eager(args):
        return op(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return gradient.apply(*args)
    return KERNELS[op](*args)


def below_autograd(op: Any, *args: Any) -> Any:
    """The operator's results, without recording its gradient."""
    if is_transforming():
        # autograd is off in an autograd.Function, so the next outer level of torch.func would record nothing
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    if _is_eager(args):
        return KERNELS[op](*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _is_eager(args: Sequence[Any]) -> bool:
    """Whether neither a mode nor a subclass of tensors takes part, so that a kernel may be called without the dispatcher."""
    if torch._C._len_torch_dispatch_stack() or not has_memory(args[0]):
        return False
    for arg in args:
        kind = type(arg)
        # memory may hold the numbers with the other sign, which the dispatcher puts right and a kernel would not notice
        if kind not in EAGER or (kind in PLAIN and arg.is_neg()):
            return False
    return True


def without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel with autocast off: the caller's autocast would round its fp32 sums to half precision."""

    def run(first: Tensor, *args: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return kernel(first, *args)
        with no_autocast(first.device):
            return kernel(first, *args)

    return run


def _with_fields(arguments: Sequence[type[Any]], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the signature of the operator, for ``infer_schema``."""

    def signed(*args: Any) -> Any:
        raise AssertionError("this function is a signature only")

    parameters = []
    for fields in arguments:
        hints, defaults = get_type_hints(fields), fields._field_defaults if fields is arguments[-1] else {}
        for name in fields._fields:
            default = defaults.get(name, inspect.Parameter.empty)
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            parameters.append(inspect.Parameter(name, kind, default=default, annotation=hints[name]))
    result = get_type_hints(kernel)["return"]
    signed.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    return signed


def _of_fields(arguments: Sequence[type[Any]], function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``function``, which takes one of each NamedTuple, so that it takes their fields one after the other."""
    if len(arguments) == 1:
        of_all = arguments[0]
        return lambda *args: function(of_all(*args))
    ends = list(itertools.accumulate(len(fields._fields) for fields in arguments))
    spans = [slice(end - len(fields._fields), end) for end, fields in zip(ends, arguments, strict=True)]
    return lambda *args: function(*(of(*args[span]) for of, span in zip(arguments, spans, strict=True)))


def _autograd_kernel(op: Any, gradient: type[OperatorFunction] | None) -> Callable[..., Any]:
    defaults = tuple(argument.default_value for argument in op._schema.arguments)

    def run(*args: Any) -> Any:
        if torch._C._len_torch_dispatch_stack():
            _tell_flop_counters()
        _refuse_tangents(op, args)
        if gradient is None or not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below_autograd(op, *args)
        args += defaults[len(args) :]  # the dispatcher drops trailing arguments that equal their defaults
        if not torch._C._are_functorch_transforms_active():
            return gradient.apply(*args)
        with enable_single_level_autograd_function():
            return gradient.apply(*args)  # by now torch.func's dispatch is at a single level

    return run


def _refuse_tangents(op: Any, args: Sequence[Any]) -> None:
    """Raise RuntimeError in forward-mode differentiation, which would silently take the operator's gradient as 0."""
    if forward_ad._current_level < 0:
        return
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise RuntimeError(
                f"{op} has no forward-mode gradient (torch.func.jvp, jacfwd, hessian, forward_ad); expected reverse mode: "
                "backward(), torch.func.grad, vjp or jacrev"
            )


def _one_by_one(op: Any) -> Callable[..., Any]:
    """The rule for ``torch.vmap``: one call for each element of the batch; the results are stacked."""

    def run(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError(f"torch.vmap runs {op} over a batch of 0; expected at least 1")
        results = [
            op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return run


def _of_shapes(flops: Callable[..., int]) -> Callable[..., int]:
    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return flops(*(arg.shape if isinstance(arg, Tensor) else arg for arg in args), **kwargs)

    return count


def _tell_flop_counters() -> None:
    """Register our FLOPs with active counters. Doing so at import would import torch's counter, and with it Triton."""
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(registry, dict):
            for op, count in FLOPS.items():
                registry.setdefault(op, count)
