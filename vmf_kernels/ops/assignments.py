"""Sums over soft assignments without a gradient: usage, and log-sum-exp over the prototypes or over the rows.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.arguments import check_bias, check_features, in_autocast_dtype, temperature_tensor
from vmf_kernels.backends.choice import choose_backend
from vmf_kernels.backends.contract import Backend, RowInputs, StoredSums, StoringBackend
from vmf_kernels.backends.prepared import prepared_of
from vmf_kernels.ops.operators import operator
from vmf_kernels.prototypes import Prototypes, accumulation_dtype
from vmf_kernels.ranks import group_named, name_of
from vmf_kernels.tensors import has_memory


def prototype_usage(
    features: Tensor,
    prototypes: Prototypes,
    temperature: float | Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
    prototype_group: ProcessGroup | None = None,
) -> Tensor:
    """Mean probability of each prototype over a batch, without storing the [R, K] probabilities.

    Args:
        features: [R, D] rows, floating point, R >= 1.
        prototypes: K prototypes of dim D.
        temperature: positive; a float or a tensor of one element.
        bias: [K] nats added to the logits, e.g. ``center.bias(temperature)``, or None.
        backend: see ``choose_backend``.
        prototype_group: ranks over which the prototypes are split, as in ``prototype_cross_entropy``, or None.

    Returns:
        [K] probabilities, fp32 (fp64 for fp64 features), which sum to 1 (over all ranks of the group); no gradient.

    Raises:
        ValueError: shapes, temperature or the backend's name do not fit; the text says what was given and expected.

    Example:
        >>> usage = prototype_usage(torch.randn(3, 4), linear_prototypes(torch.randn(512, 4)), temperature=0.1)
        >>> tuple(usage.shape), round(usage.sum().item(), 4)
        ((512,), 1.0)
    """
    _check_rows(features, prototypes, bias)
    features = in_autocast_dtype(features)
    if features.shape[0] == 0:
        raise ValueError("features has 0 rows; expected at least one to take a mean over")
    tau = temperature_tensor(temperature, "temperature", features.device)
    usage: Tensor = _usage_op(*_arguments(features, prototypes, tau, bias, backend, prototype_group))
    return usage


def row_log_sum_exp(
    features: Tensor,
    prototypes: Prototypes,
    temperature: float | Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
    prototype_group: ProcessGroup | None = None,
) -> Tensor:
    """[R] log-sum-exp over the prototypes of each row's logits; arguments and errors as ``prototype_usage``."""
    _check_rows(features, prototypes, bias)
    features = in_autocast_dtype(features)
    tau = temperature_tensor(temperature, "temperature", features.device)
    rows: Tensor = _row_op(*_arguments(features, prototypes, tau, bias, backend, prototype_group))
    return rows


def column_log_sum_exp(
    features: Tensor,
    prototypes: Prototypes,
    temperature: float | Tensor,
    offset: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """[K] ``log sum_r exp(l_rk - offset_r)`` over the rows; -inf for 0 rows. Prototypes do not interact, so no group is needed.

    Args:
        offset: [R] nats; with the row log-sum-exp, the result is the log of the summed probabilities.
        features, prototypes, temperature, backend: as in ``prototype_usage``, which also lists the errors.
    """
    _check_rows(features, prototypes, None)
    features = in_autocast_dtype(features)
    if tuple(offset.shape) != (features.shape[0],):
        raise ValueError(f"offset has shape {tuple(offset.shape)}; expected [{features.shape[0]}], one for each row")
    tau = temperature_tensor(temperature, "temperature", features.device)
    columns: Tensor = _column_op(*_arguments(features, prototypes, tau, None, backend, None), offset.detach())
    return columns


def stored_sums(
    features: Tensor,
    prototypes: Prototypes,
    temperature: float | Tensor,
    *,
    backend: str = "auto",
    prototype_group: ProcessGroup | None = None,
) -> StoredSums | None:
    """``row_log_sum_exp`` and ``column_log_sum_exp`` of one batch with many biases, from products that are formed once.

    Arguments as theirs. None if the backend has no such sums, the logits are too many to be stored, or the rows are traced;
    then each sum takes a pass of its own.
    """
    _check_rows(features, prototypes, None)
    features = in_autocast_dtype(features)
    if not has_memory(features) or not has_memory(prototypes.weight):
        return None
    tau = temperature_tensor(temperature, "temperature", features.device)
    arguments = _arguments(features, prototypes, tau, None, backend, prototype_group)
    chosen = arguments.run_by()
    return chosen.stored_sums(arguments.inputs()) if isinstance(chosen, StoringBackend) else None


def _check_rows(features: Tensor, prototypes: Prototypes, bias: Tensor | None) -> None:
    check_features(features, prototypes, "given")
    check_bias(bias, prototypes.count, "bias")


class _Arguments(NamedTuple):
    features: Tensor
    weight: Tensor
    magnitude: Tensor | None
    kind: str
    bias: Tensor | None
    temperature: Tensor
    backend: str
    group: str = ""

    def inputs(self) -> RowInputs:
        """The arguments for a backend."""
        prototypes = Prototypes(self.weight, self.magnitude, self.kind)
        return RowInputs(self.features, prototypes, self.temperature, self.bias, group_named(self.group))

    def run_by(self) -> Backend:
        """The backend that computes them."""
        return choose_backend(self.backend, self.features, self.weight)

    def new_sums(self, dim: int) -> Tensor:
        """An uninitialised sum for each row of the features (0) or of the weight (1)."""
        count = (self.features, self.weight)[dim].shape[0]
        return self.features.new_empty(count, dtype=accumulation_dtype(self.features.dtype))


class _Offset(NamedTuple):
    offset: Tensor  # [R] nats


def _arguments(
    features: Tensor,
    prototypes: Prototypes,
    tau: Tensor,
    bias: Tensor | None,
    backend: str,
    group: ProcessGroup | None,
) -> _Arguments:
    # prototypes with a store of prepared ones are detached already; detaching again would lose the store
    stored = prototypes.detach() if prepared_of(prototypes) is None else prototypes
    detached = None if bias is None else bias.detach()
    parts = stored.weight, stored.magnitude, prototypes.kind
    return _Arguments(features.detach(), *parts, detached, tau, backend, name_of(group))


def _flops(shapes: Any, *rest: Any) -> int:
    """Operations of one product with the prototypes."""
    return int(2 * shapes.features[0] * shapes.weight[0] * shapes.weight[1])


@operator("prototype_usage", _Arguments, fake=lambda args: args.new_sums(1), flops=_flops)
def _usage_op(args: _Arguments) -> Tensor:
    return args.run_by().usage(args.inputs())


@operator("row_log_sum_exp", _Arguments, fake=lambda args: args.new_sums(0), flops=_flops)
def _row_op(args: _Arguments) -> Tensor:
    return args.run_by().row_log_sum_exp(args.inputs())


@operator("column_log_sum_exp", _Arguments, _Offset, fake=lambda args, _: args.new_sums(1), flops=_flops)
def _column_op(args: _Arguments, rest: _Offset) -> Tensor:
    return args.run_by().column_log_sum_exp(args.inputs(), rest.offset)
