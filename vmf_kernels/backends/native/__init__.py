"""Native backend: the streaming operator in C++ (csrc/cpu), for CPUs, chosen by "auto" there."""

from __future__ import annotations

from torch import Tensor

from vmf_kernels.backends.native import operator
from vmf_kernels.backends.native.module import STORED, instruction_sets, why_absent


class NativeBackend:
    """``contract.Backend`` on packed micro-kernels for AVX-512, AVX2 or any other CPU; workspace of bounded size."""

    def unsupported(self, rows: Tensor, weight: Tensor) -> str | None:
        """Where the module is absent; devices and dtypes it does not know."""
        for name, tensor in (("features", rows), ("prototypes", weight)):
            if tensor.device.type != "cpu":
                return f"it runs on CPUs, but the {name} are on {tensor.device}"
            if tensor.dtype not in STORED:
                return f"it takes float32, bfloat16 or float16, but the {name} are {tensor.dtype}"
        return why_absent()

    def wins(self, rows: Tensor, weight: Tensor) -> bool:
        """Whether it is faster than plain torch here, asked where it can run: with AVX2 or better, not with portable code.

        Measured by ``bench/bench_head.py`` (bench/results/cpu/head.json) and, for each instruction set, bench/LOG.md.
        """
        return instruction_sets()[-1] != "portable"

    cross_entropy = staticmethod(operator.cross_entropy)
    usage = staticmethod(operator.usage)
    row_log_sum_exp = staticmethod(operator.row_log_sum_exp)
    column_log_sum_exp = staticmethod(operator.column_log_sum_exp)
