"""Which backend computes an operator on given tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vmf_kernels.backends import reference, streaming
from vmf_kernels.backends.composed import ComposedBackend
from vmf_kernels.backends.contract import Backend
from vmf_kernels.backends.cuda import CudaBackend
from vmf_kernels.backends.native import NativeBackend
from vmf_kernels.backends.triton import TritonBackend
from vmf_kernels.prototypes import refuse_freed

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
}  # order in which "auto" tries them; other devices use the entry of "cpu"
MEASURED = {"cuda": _CUDA.wins, "native": _NATIVE.wins}  # "auto" takes these only if the function returns True
ONE_DIM = ("cuda", "triton")  # their kernels need the same D for both networks


def choose_backend(backend: str, rows: Tensor, *weights: Tensor) -> Backend:
    """The backend that computes the operator on these tensors.

    Args:
        backend: "auto" takes the first that can run, but "cuda" and "native" only where measurements show that they are
            fastest. A name takes that backend or raises.
        rows: [R, D] features.
        weights: [K, D] prototypes of each network.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the named backend cannot run on these tensors (the text says why), or the prototypes have been freed.
    """
    refuse_freed(*weights)
    if backend == "auto":
        candidates = PREFERENCE.get(rows.device.type, PREFERENCE["cpu"])
        found = next((name for name in candidates if _auto_takes(name, rows, weights)), None)
        if found is not None:
            return BACKENDS[found]
        backend = candidates[-1]  # it supports everything; if not, the error below says why
    check_backend_name(backend)
    reason = _unsupported(backend, rows, weights)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    return BACKENDS[backend]


def check_backend_name(backend: str) -> None:
    """Raise ValueError unless ``backend`` is "auto" or the name of a backend."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(('auto', *BACKENDS))}")


def _unsupported(name: str, rows: Tensor, weights: Sequence[Tensor]) -> str | None:
    if name in ONE_DIM and len(dims := sorted({weight.shape[1] for weight in weights})) > 1:
        return f"it needs one embedding dim, but the networks have {' and '.join(map(str, dims))}"
    for weight in weights:
        reason = BACKENDS[name].unsupported(rows, weight)
        if reason is not None:
            return reason
    return None


def _auto_takes(name: str, rows: Tensor, weights: Sequence[Tensor]) -> bool:
    if _unsupported(name, rows, weights) is not None:
        return False
    return name not in MEASURED or MEASURED[name](rows, weights[0])
