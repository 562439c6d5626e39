"""Native backend: the streaming operator in C++ (csrc/cpu), for CPUs."""

from __future__ import annotations

from torch import Tensor

from vmf_kernels.backends.contract import RowInputs, StoredSums
from vmf_kernels.backends.native import operator
from vmf_kernels.backends.native.module import STORED, instruction_sets, why_absent
from vmf_kernels.backends.native.stored_sums import NativeStoredSums, fits
from vmf_kernels.ranks import has_all_prototypes


class NativeBackend:
    """A ``contract.Backend`` on packed micro-kernels for AVX-512, AVX2 or any other CPU; workspace of bounded size."""

    def unsupported(self, rows: Tensor, weight: Tensor) -> str | None:
        """Why it cannot run on these tensors, or None: another device or dtype, or the module is absent."""
        for name, tensor in (("features", rows), ("prototypes", weight)):
            if not tensor.is_cpu:
                return f"it runs on CPUs, but the {name} are on {tensor.device}"
            if tensor.dtype not in STORED:
                return f"it takes float32, bfloat16 or float16, but the {name} are {tensor.dtype}"
        return why_absent()

    def wins(self, rows: Tensor, weight: Tensor) -> bool:
        """Whether it is faster than plain torch here: with AVX2 or better, not with portable code. Call if it can run.

        Measured by ``bench/bench_head.py`` (bench/results/cpu/head.json); for each instruction set, see bench/LOG.md.
        """
        return instruction_sets()[-1] != "portable"

    def stored_sums(self, inputs: RowInputs) -> StoredSums | None:
        """As ``contract.StoringBackend``."""
        if not has_all_prototypes(inputs.prototype_group) or not fits(len(inputs.features), inputs.prototypes.count):
            return None
        return NativeStoredSums(inputs, operator.products_of(inputs.features))

    cross_entropy = staticmethod(operator.cross_entropy)
    usage = staticmethod(operator.usage)
    row_log_sum_exp = staticmethod(operator.row_log_sum_exp)
    column_log_sum_exp = staticmethod(operator.column_log_sum_exp)
