"""Which backend computes the loss on stored logits."""

from __future__ import annotations

from vmf_kernels.backends.stored.contract import StoredBackend, StoredInputs
from vmf_kernels.backends.stored.streaming import StreamingStored
from vmf_kernels.backends.triton.logits import TritonStored

_STREAMING = StreamingStored()
STORED_BACKENDS: dict[str, StoredBackend] = {"torch": _STREAMING, "streaming": _STREAMING, "triton": TritonStored()}


def choose_stored_backend(backend: str, inputs: StoredInputs) -> StoredBackend:
    """The backend that computes the loss on these logits.

    Args:
        backend: "auto" takes "triton" on GPUs where it can run, else "torch"; a name takes that backend or raises.
        inputs: of the loss.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the named backend cannot run on these tensors; the text says why.
    """
    check_stored_backend_name(backend)
    if backend == "auto":
        # never on the CPU, where Triton is only interpreted
        on_gpu = inputs.student.logits.device.type == "cuda"
        triton = STORED_BACKENDS["triton"]
        return triton if on_gpu and triton.unsupported(inputs) is None else _STREAMING
    chosen = STORED_BACKENDS[backend]
    reason = chosen.unsupported(inputs)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    return chosen


def check_stored_backend_name(backend: str) -> None:
    """Raise ValueError unless ``backend`` is "auto" or a backend for stored logits; others need features and prototypes."""
    if backend != "auto" and backend not in STORED_BACKENDS:
        names = "auto, streaming, triton"  # and "torch", which is streaming under the name that only this loss knows
        raise ValueError(f"backend {backend!r} has no pass over stored logits; expected one of {names}")
