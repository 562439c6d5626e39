"""How an operator becomes one of torch's: kernel, shapes without values, gradient, ``vmap`` and FLOPs.

``torch.library.custom_op`` would do the same, but brings in torch's compiler: a second and 150 MiB in the first call of a
process, and tens of microseconds in every call.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from vmf_kernels.tensors import PLAIN, has_memory, is_transforming, no_autocast

NAMESPACE = "vmf_kernels"
# of this process, for as long as it lives: torch drops what a library holds with the library
LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
KERNELS: dict[Any, Callable[..., Any]] = {}  # by operator
FLOPS: dict[Any, Callable[..., int]] = {}  # by operator, as ``torch.utils.flop_counter`` keeps them


class OperatorFunction(torch.autograd.Function):
    """The gradient of an operator, recorded inside torch's dispatcher."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As ``torch.autograd.Function.apply`` without its detour for ``torch.func``, whose wrapping is undone by then."""
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def operator(
    name: str,
    *arguments: type[Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    gradient: type[OperatorFunction] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated kernel as ``torch.ops.vmf_kernels.<name>``, which takes its place.

    Args:
        name: of the operator.
        arguments: NamedTuples of tensors and scalars, whose fields end to end are the operator's arguments; the kernel,
            ``fake`` and ``flops`` take one of each. Defaults count in the last one only.
        fake: its outputs without their values.
        flops: floating-point operations, with shapes in the place of tensors.
        gradient: whose ``forward(ctx, *args)`` calls the operator by ``below_autograd``; None for one without gradient.
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


def below_autograd(op: Any, *args: Any) -> Any:
    """The operator's results; no gradient of its own is recorded."""
    if is_transforming():
        # autograd is off in an autograd.Function, and torch.func's next level outwards would record nothing
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    eager = has_memory(args[0]) and not torch._C._len_torch_dispatch_stack()
    if eager and all(type(arg) in PLAIN or not isinstance(arg, Tensor) for arg in args):
        return KERNELS[op](*args)  # where nobody else has a say, past the dispatcher: that saves some ten microseconds
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel with autocast off: a region of the caller's would round its fp32 sums to half precision."""

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
    """``function``, which takes one of each NamedTuple, as one that takes their fields end to end."""
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
        args += defaults[len(args) :]  # the dispatcher takes off what equals them
        if not torch._C._are_functorch_transforms_active():
            return gradient.apply(*args)
        with enable_single_level_autograd_function():
            return gradient.apply(*args)  # torch.func's dispatch has come down to one of its levels

    return run


def _refuse_tangents(op: Any, args: Sequence[Any]) -> None:
    """Raise RuntimeError where forward-mode differentiation would take a gradient of 0 from the operator without a word."""
    if forward_ad._current_level < 0:
        return
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:  # type: ignore[no-untyped-call]
            raise RuntimeError(
                f"{op} has no forward-mode gradient (torch.func.jvp, jacfwd, hessian, forward_ad); expected reverse mode: "
                "backward(), torch.func.grad, vjp or jacrev"
            )


def _one_by_one(op: Any) -> Callable[..., Any]:
    """The rule of ``torch.vmap``: one call for each element of the batch, whose results are stacked."""

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
    """Give our FLOPs to the counters at work. Registering them at import would import Triton with torch's counter."""
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(registry, dict):
            for op, count in FLOPS.items():
                registry.setdefault(op, count)
