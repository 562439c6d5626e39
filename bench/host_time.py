"""Counts and times Python's work around the Triton kernels of one step, without a GPU: launches do nothing.

    python -m bench.host_time

Prints the launches of a forward and backward pass at 640/128 rows, the torch operators inside the operator, and the host
time of both passes without the launches themselves. On a GPU each launch adds what Triton's launcher takes; the target
there is 150 us in all.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

CALLS = 300
IMAGES, CROPS, PROTOTYPES, DIM = 64, 10, 4096, 256  # few prototypes: their number costs no host time


class Operators(TorchDispatchMode):
    """Counts what reaches torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels are never run; this is what lets CPU tensors through to them
    from vmf_kernels import linear_prototypes, prototype_cross_entropy
    from vmf_kernels.backends.contract import LossInputs
    from vmf_kernels.backends.triton import launch, operator
    from vmf_kernels.pairing import Pairing, multi_crop_weights

    torch.set_num_threads(1)
    launched: Counter[str] = Counter()

    def nothing(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        launched[getattr(kernel, "__name__", str(kernel))] += 1

    launch.run = nothing
    student = normalize(torch.randn(IMAGES * CROPS, DIM), dim=1).requires_grad_()
    teacher = normalize(torch.randn(IMAGES * 2, DIM), dim=1)
    weight = torch.randn(PROTOTYPES, DIM, requires_grad=True)
    of_student, of_teacher = linear_prototypes(weight), linear_prototypes(weight.detach().clone())
    pairs = multi_crop_weights(2, CROPS)

    def step() -> None:
        student.grad = weight.grad = None
        prototype_cross_entropy(student, of_student, teacher, of_teacher, pairs, backend="triton").loss.backward()

    step()
    launched.clear()
    step()
    launches = dict(launched)
    tau = torch.tensor(0.1, dtype=torch.float64)
    inputs = LossInputs(
        student.detach(),
        of_student.detach(),
        teacher,
        of_teacher,
        None,
        Pairing(pairs.float(), None),
        tau,
        tau,
        True,
        True,
    )
    with Operators() as operators:
        operator.cross_entropy(inputs)
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    print(f"launches: {sum(launches.values())}  {launches}")
    print(f"torch operators inside the operator: {sum(operators.seen.values())}  {dict(operators.seen)}")
    print(
        f"host time without the launches: median {1e6 * statistics.median(seconds):.0f} us, least {1e6 * min(seconds):.0f} us"
    )


if __name__ == "__main__":
    main()
