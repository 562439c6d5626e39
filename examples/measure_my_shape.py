"""Time one loss at a size of yours, inside a process of yours, beside the usual formula.

python examples/measure_my_shape.py --students 640 --teachers 128 --prototypes 65536 --dim 256

For tables over many sizes, checks against fp64, memory and other libraries, use ``vmf-bench``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vmf_kernels import linear_prototypes, prototype_cross_entropy

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04


def usual(student: Tensor, teacher: Tensor, weight: Tensor, pairs: Tensor) -> Tensor:
    """The loss with stored logits and one log-softmax a row."""
    targets = (teacher @ weight.detach().T / TEACHER_TEMPERATURE).softmax(1)
    logs = (student @ weight.T / STUDENT_TEMPERATURE).log_softmax(1)
    return -((pairs.T @ targets) * logs).sum() if len(pairs) < len(student) else -(targets * (pairs @ logs)).sum()


def ours(student: Tensor, teacher: Tensor, weight: Tensor, pairs: Tensor) -> Tensor:
    """The same without stored logits."""
    return prototype_cross_entropy(
        student,
        linear_prototypes(weight),
        teacher,
        linear_prototypes(weight.detach()),
        pairs,
        student_temperature=STUDENT_TEMPERATURE,
        teacher_temperature=TEACHER_TEMPERATURE,
    ).loss


def seconds(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Seconds of forward and backward, and the loss. On a GPU the clock stops when the GPU has finished."""
    for tensor in inputs:
        tensor.grad = None
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    value = loss(*inputs)
    value.backward()
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, value.item()


def main() -> None:
    """Interleave the two, so that a machine that slows down slows both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("students", 640), ("teachers", 128), ("prototypes", 65536), ("dim", 256), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    student = normalize(torch.randn(asked.students, asked.dim, device=device), dim=1).requires_grad_()
    teacher = normalize(torch.randn(asked.teachers, asked.dim, device=device), dim=1)
    weight = normalize(torch.randn(asked.prototypes, asked.dim, device=device), dim=1).requires_grad_()
    pairs = torch.rand(asked.teachers, asked.students, device=device) / (asked.teachers * asked.students)
    inputs = (student, teacher, weight, pairs)
    found: dict[str, list[float]] = {"usual": [], "vmf_kernels": []}
    values = {}
    for round_ in range(asked.rounds + 1):
        for name, loss in (("usual", usual), ("vmf_kernels", ours)):
            taken, values[name] = seconds(loss, inputs)
            if round_ > 0:  # the first round warms up
                found[name].append(taken)
    for name, times in found.items():
        middle, fastest = 1e3 * statistics.median(times), 1e3 * min(times)
        print(f"{name}: {middle:.1f} ms (fastest {fastest:.1f}), loss {values[name]:.6f}")
    sizes = f"{asked.students}/{asked.teachers} rows, K {asked.prototypes}, D {asked.dim}"
    print(f"{device}, {torch.get_num_threads()} threads, {sizes}, fp32")


if __name__ == "__main__":
    main()
