"""CUDA backend: the streaming operator in CUDA C++ for Hopper GPUs, compute capability 9.0.

The kernels of csrc/cuda prepare the prototypes, run the row pass and the column pass, and pull the gradient back to the stored
prototypes. The steps between them (packing rows, merging parts, summing losses) are small and run on Triton's kernels. The
compiled module and Triton are imported at first use, so the library works if either is absent.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vmf_kernels.backends.cuda import binding, measured
from vmf_kernels.backends.cuda.layouts import MAX_DIM, width_of
from vmf_kernels.backends.triton import TritonBackend, launch


class CudaBackend(TritonBackend):
    """A ``contract.Backend`` on csrc/cuda: no logits in memory, no atomics, no host synchronisation.

    The first call of each width, dtype and mode (which gradients, usage or log sums) on a device must not happen while a CUDA
    graph is captured: it loads code and reserves its shared memory, and Triton compiles the steps between.
    """

    def unsupported(self, rows: Tensor, weight: Tensor) -> str | None:
        """Why it cannot run, or None: no kernel for the dtype or D, another device, or the module or Triton is absent."""
        if rows.dtype not in binding.ELEMENTS:
            return f"it computes in bfloat16 or float16, but the features are {rows.dtype}"
        if weight.shape[1] > MAX_DIM:
            return f"the embedding dim is {weight.shape[1]}; it goes up to {MAX_DIM}"
        return binding.unsupported_device(rows.device)

    def wins(self, rows: Tensor, weight: Tensor) -> bool:
        """Whether measurements show that it is faster than Triton on such tensors. Call if it can run on them.

        Only the loss was measured, forward and backward; the answer is used for all four operations. It is no if K is less
        than half of the measured K.
        """
        arch, (prototypes, dim) = launch.target_of(rows.device).arch, weight.shape
        return measured.wins(arch, binding.ELEMENTS[rows.dtype], width_of(dim), rows.shape[0], prototypes)

    def _kernels(self) -> Any:
        from vmf_kernels.backends.cuda.passes import CUDA

        return CUDA
