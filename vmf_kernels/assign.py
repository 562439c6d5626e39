"""Which backend runs, and the forward-only ops on it.

Legend: R rows, K prototypes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.backends import reference, streaming
from vmf_kernels.backends.composed import ComposedBackend
from vmf_kernels.backends.contract import Backend
from vmf_kernels.backends.cuda import CudaBackend
from vmf_kernels.backends.native import NativeBackend
from vmf_kernels.backends.triton import TritonBackend
from vmf_kernels.operators import operator
from vmf_kernels.prepared import prepared_of
from vmf_kernels.prototypes import Prototypes, accumulation_dtype, refuse_freed
from vmf_kernels.ranks import group_named, name_of
from vmf_kernels.tensors import is_readable

_CUDA, _NATIVE = CudaBackend(), NativeBackend()
BACKENDS: dict[str, Backend] = {
    "reference": ComposedBackend(reference.assign, reference.column_log_sum_exp),
    "streaming": ComposedBackend(streaming.assign, streaming.column_log_sum_exp),
    "native": _NATIVE,
    "triton": TritonBackend(),
    "cuda": _CUDA,
}
PREFERENCE = {
    "cuda": ("cuda", "triton", "streaming"),
    "cpu": ("native", "streaming"),
}  # of "auto", best first; other devices go as "cpu"
MEASURED = {"cuda": _CUDA.wins, "native": _NATIVE.wins}  # these "auto" takes only where that says so of the tensors
ONE_DIM = ("cuda", "triton")  # their kernels give both networks' rows one width


def choose_backend(backend: str, rows: Tensor, *weights: Tensor) -> Backend:
    """The one that computes the operator on these tensors.

    Args:
        backend: "auto" takes the first that can run, "cuda" and "native" only where measurements show that it is the fastest;
            a name takes that one or raises.
        rows: [R, D] features.
        weights: [K, D] prototypes of each network.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend asked for cannot run on these tensors, or the prototypes' memory has been freed; says why.
    """
    refuse_freed(*weights)
    if backend == "auto":
        candidates = PREFERENCE.get(rows.device.type, PREFERENCE["cpu"])
        found = next((name for name in candidates if _auto_takes(name, rows, weights)), None)
        if found is not None:
            return BACKENDS[found]
        backend = candidates[-1]  # which takes everything, and would say why not below
    check_backend_name(backend)
    reason = _unsupported(backend, rows, weights)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    return BACKENDS[backend]


def prototype_usage(
    features: Tensor,
    prototypes: Prototypes,
    temperature: float | Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
    prototype_group: ProcessGroup | None = None,
) -> Tensor:
    """Mean probability that each prototype receives from a batch, without its [R, K] probabilities.

    Args:
        features: [R, D] rows, floating point, R >= 1.
        prototypes: K prototypes of dim D.
        temperature: positive; a float or a tensor of one element.
        bias: [K] nats added to the logits, e.g. ``center.bias(temperature)``, or None.
        backend: see ``choose_backend``.
        prototype_group: ranks that share out the prototypes, as in ``prototype_cross_entropy``; None for one that has all.

    Returns:
        [K] probabilities, fp32 (fp64 for fp64 features), summing to 1 (over all ranks of the group); no gradient.

    Raises:
        ValueError: shapes, temperature or backend name do not fit; says what was got and expected.
    """
    _check_rows(features, prototypes, bias)
    features = in_autocast_dtype(features)
    if features.shape[0] == 0:
        raise ValueError("features has 0 rows; expected at least one to take a mean over")
    tau = temperature_tensor(temperature, "temperature", features.device)
    usage: Tensor = _usage_op(*_flat(features, prototypes), _detached(bias), tau, backend, name_of(prototype_group))
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
    rows: Tensor = _row_op(*_flat(features, prototypes), _detached(bias), tau, backend, name_of(prototype_group))
    return rows


def column_log_sum_exp(
    features: Tensor,
    prototypes: Prototypes,
    temperature: float | Tensor,
    offset: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """[K] ``log sum_r exp(l_rk - offset_r)`` over the rows; -inf for 0 rows. Each prototype stands alone: no group is needed.

    Args:
        offset: [R] nats; the row log-sum-exp makes it the log of the summed probabilities.
        features, prototypes, temperature, backend: as in ``prototype_usage``, which also lists the errors.
    """
    _check_rows(features, prototypes, None)
    features = in_autocast_dtype(features)
    if tuple(offset.shape) != (features.shape[0],):
        raise ValueError(f"offset has shape {tuple(offset.shape)}; expected [{features.shape[0]}], one for each row")
    tau = temperature_tensor(temperature, "temperature", features.device)
    columns: Tensor = _column_op(*_flat(features, prototypes), tau, offset.detach(), backend)
    return columns


def temperature_tensor(value: float | Tensor, name: str, device: torch.device) -> Tensor:
    """[] float64 temperature on ``device``: a tensor, so that a schedule neither recompiles nor re-captures.

    Raises:
        ValueError: not positive (a CUDA tensor is not looked at: that would wait for the device), or not one element.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} has {value.numel()} elements; expected 1")
        if is_readable(value) and not value.item() > 0:
            raise ValueError(f"{name} is {value.item()}; expected a number > 0")
        return value.detach().reshape(()).to(device=device, dtype=torch.float64)
    if not value > 0:
        raise ValueError(f"{name} is {value}; expected a number > 0")
    return torch.full((), value, dtype=torch.float64, device=device)


def check_backend_name(backend: str) -> None:
    """Raise ValueError unless ``backend`` is "auto" or the name of one."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(('auto', *BACKENDS))}")


def check_features(features: Tensor, prototypes: Prototypes, name: str) -> None:
    """Raise ValueError unless ``features`` is a floating-point [R, D] matrix that fits the prototypes."""
    if not isinstance(prototypes, Prototypes):
        raise ValueError(
            f"{name} prototypes are a {type(prototypes).__name__}; expected Prototypes, for example "
            "linear_prototypes(weight)"
        )
    if hasattr(prototypes.weight, "placements"):
        raise ValueError(
            f"{name} prototypes are sharded (a DTensor): they are read outside the head's forward pass; expected "
            "head.unshard() before, or prototypes of weight.full_tensor()"
        )
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f"{name} features are {features.dtype} of shape {tuple(features.shape)}; "
            "expected a floating-point matrix [rows, D]"
        )
    if features.shape[1] != prototypes.dim:
        raise ValueError(
            f"{name} features have {features.shape[1]} columns but the {name} prototypes have "
            f"{prototypes.dim}; both must be the embedding dim D"
        )
    if features.device != prototypes.weight.device:
        raise ValueError(
            f"{name} features are on {features.device} but the {name} prototypes on "
            f"{prototypes.weight.device}; expected one device"
        )


def check_bias(bias: Tensor | None, count: int, name: str) -> None:
    """Raise ValueError unless ``bias`` is None or has one element for each of ``count`` prototypes."""
    if bias is not None and bias.numel() != count:
        raise ValueError(f"{name} has {bias.numel()} elements; expected one for each of the {count} prototypes")


def in_autocast_dtype(features: Tensor) -> Tensor:
    """The features as the last layer of a head would see them: fp32 ones cast where a region of autocast is on.

    Only on a GPU, where 16-bit products are what the region asks for; on a CPU fp32 features keep fp32 products.
    """
    kind = features.device.type
    if kind == "cuda" and features.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return features.to(torch.get_autocast_dtype(kind))
    return features


def _unsupported(name: str, rows: Tensor, weights: Sequence[Tensor]) -> str | None:
    dims = sorted({weight.shape[1] for weight in weights})
    if name in ONE_DIM and len(dims) > 1:
        return f"it needs one embedding dim, but the networks have {' and '.join(map(str, dims))}"
    reasons = (BACKENDS[name].unsupported(rows, weight) for weight in weights)
    return next((reason for reason in reasons if reason is not None), None)


def _auto_takes(name: str, rows: Tensor, weights: Sequence[Tensor]) -> bool:
    if _unsupported(name, rows, weights) is not None:
        return False
    return name not in MEASURED or MEASURED[name](rows, weights[0])


def _check_rows(features: Tensor, prototypes: Prototypes, bias: Tensor | None) -> None:
    check_features(features, prototypes, "given")
    check_bias(bias, prototypes.count, "bias")


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _flat(features: Tensor, prototypes: Prototypes) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """The leading arguments of every op: torch.library takes tensors, not a dataclass."""
    # those that something is kept for are detached already, and would lose it
    stored = prototypes.detach() if prepared_of(prototypes) is None else prototypes
    return features.detach(), stored.weight, stored.magnitude, prototypes.kind


def _flops(features: Sequence[int], weight: Sequence[int], *rest: object) -> int:
    """Of one product with the prototypes."""
    return 2 * features[0] * weight[0] * weight[1]


def _fake_usage(
    features: Tensor,
    weight: Tensor,
    magnitude: Tensor | None,
    kind: str,
    bias: Tensor | None,
    temperature: Tensor,
    backend: str,
    group: str = "",
) -> Tensor:
    return features.new_empty(weight.shape[0], dtype=accumulation_dtype(features.dtype))


@operator("prototype_usage", fake=_fake_usage, flops=_flops)
def _usage_op(
    features: Tensor,
    weight: Tensor,
    magnitude: Tensor | None,
    kind: str,
    bias: Tensor | None,
    temperature: Tensor,
    backend: str,
    group: str = "",
) -> Tensor:
    run = choose_backend(backend, features, weight)
    return run.usage(features, Prototypes(weight, magnitude, kind), temperature, bias, group_named(group))


def _fake_row(
    features: Tensor,
    weight: Tensor,
    magnitude: Tensor | None,
    kind: str,
    bias: Tensor | None,
    temperature: Tensor,
    backend: str,
    group: str = "",
) -> Tensor:
    return features.new_empty(features.shape[0], dtype=accumulation_dtype(features.dtype))


@operator("row_log_sum_exp", fake=_fake_row, flops=_flops)
def _row_op(
    features: Tensor,
    weight: Tensor,
    magnitude: Tensor | None,
    kind: str,
    bias: Tensor | None,
    temperature: Tensor,
    backend: str,
    group: str = "",
) -> Tensor:
    run = choose_backend(backend, features, weight)
    return run.row_log_sum_exp(features, Prototypes(weight, magnitude, kind), temperature, bias, group_named(group))


def _fake_column(
    features: Tensor,
    weight: Tensor,
    magnitude: Tensor | None,
    kind: str,
    temperature: Tensor,
    offset: Tensor,
    backend: str,
) -> Tensor:
    return features.new_empty(weight.shape[0], dtype=accumulation_dtype(features.dtype))


@operator("column_log_sum_exp", fake=_fake_column, flops=_flops)
def _column_op(
    features: Tensor,
    weight: Tensor,
    magnitude: Tensor | None,
    kind: str,
    temperature: Tensor,
    offset: Tensor,
    backend: str,
) -> Tensor:
    run = choose_backend(backend, features, weight)
    return run.column_log_sum_exp(features, Prototypes(weight, magnitude, kind), temperature, offset)
