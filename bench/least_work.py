"""The size of a product from which a second thread helps; ``backends.native.module.LEAST_WORK`` was chosen by it.

    python -m bench.least_work

Prints, for products of rising size, the least time of a loss with one thread and with two, which then share any work at all.
"""

from __future__ import annotations

import time

import torch
from torch.nn.functional import normalize

from vmf_kernels import linear_prototypes, prototype_cross_entropy
from vmf_kernels.backends.native import module

CALLS = 300
SIZES = [(4, k, 16) for k in (1024, 2048, 4096, 8192)] + [(16, k, 64) for k in (1024, 2048, 4096)] + [(32, 4096, 64)]


def least_seconds(rows: int, prototypes: int, dim: int, threads: int) -> float:
    torch.set_num_threads(threads)
    x = normalize(torch.randn(rows, dim), dim=1).requires_grad_()
    of = linear_prototypes(torch.randn(prototypes, dim, requires_grad=True))
    pairs = torch.ones(rows, rows)
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        prototype_cross_entropy(x, of, x.detach(), of, pairs, backend="native")
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    module.LEAST_WORK = 0
    print("products of a pass  one thread us  two threads us")
    for rows, prototypes, dim in SIZES:
        one, two = (least_seconds(rows, prototypes, dim, threads) for threads in (1, 2))
        print(f"{rows * prototypes * dim:18d}  {1e6 * one:13.0f}  {1e6 * two:14.0f}")


if __name__ == "__main__":
    main()
