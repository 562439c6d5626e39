"""CUDA backend: the streaming operator in CUDA C++ for Hopper GPUs, compute capability 9.0.

Prototypes are prepared and read by the kernels of csrc/cuda: the row pass, the column pass, and the gradient's way back to what
is stored. What lies between (rows packed, parts merged, losses summed) is small, and runs on Triton's kernels. The compiled
module and Triton are imported when they are first wanted: the library works where either is absent.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vmf_kernels.backends.cuda import binding, measured
from vmf_kernels.backends.cuda.layouts import MAX_DIM, width_of
from vmf_kernels.backends.triton import TritonBackend, launch


class CudaBackend(TritonBackend):
    """``contract.Backend`` on csrc/cuda: no logits in memory, no atomics, no host synchronisation.

    The first call of each width, dtype and mode (which gradients, usage or log sums) on a device must not be inside the capture
    of a CUDA graph: code is loaded and given its shared memory then, and Triton compiles what lies between.
    """

    def unsupported(self, rows: Tensor, weight: Tensor) -> str | None:
        """Dtypes and embedding dims there are no kernels for, other devices, and what is not built or installed."""
        if rows.dtype not in binding.ELEMENTS:
            return f"it computes in bfloat16 or float16, but the features are {rows.dtype}"
        if weight.shape[1] > MAX_DIM:
            return f"the embedding dim is {weight.shape[1]}; it goes up to {MAX_DIM}"
        return binding.unsupported_device(rows.device)

    def wins(self, rows: Tensor, weight: Tensor) -> bool:
        """Whether measurements show that it is faster than Triton on such tensors, which it can run on.

        They are of the loss, forward and backward, at the K they record; it decides for all four operations. With less than
        half of that K the answer is no.
        """
        arch, (prototypes, dim) = launch.target_of(rows.device).arch, weight.shape
        return measured.wins(arch, binding.ELEMENTS[rows.dtype], width_of(dim), rows.shape[0], prototypes)

    def _kernels(self) -> Any:
        from vmf_kernels.backends.cuda.passes import CUDA

        return CUDA
