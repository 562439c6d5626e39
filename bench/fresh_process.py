"""One process: the first loss it forms, and those after it. Prints a JSON; ``bench_first_call`` starts it.

python -m bench.fresh_process native 1

"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path

CALLS = 1000
WARM_UP = 50
ROWS, PROTOTYPES, DIM = 4, 512, 16
COMPILER = ("torch._dynamo", "torch._inductor")


def peak_mib() -> float:
    """Most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def wake_ups() -> int:
    """Times that threads of this process have been put to sleep of their own accord: those that wait for work."""
    count = 0
    for status in Path("/proc/self/task").glob("*/status"):
        lines = status.read_text().splitlines()
        count += next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
    return count


def measure(backend: str, threads: int, calls: int = CALLS) -> dict[str, object]:
    import torch
    from torch.nn.functional import normalize

    from vmf_kernels import linear_prototypes, prototype_cross_entropy

    torch.set_num_threads(threads)
    student = normalize(torch.randn(ROWS, DIM), dim=1).requires_grad_()
    teacher = normalize(torch.randn(ROWS, DIM), dim=1)
    weight = torch.randn(PROTOTYPES, DIM, requires_grad=True)
    of_student, of_teacher, pairs = linear_prototypes(weight), linear_prototypes(weight.detach()), torch.ones(4, 4)

    def step() -> float:
        start = time.perf_counter()
        prototype_cross_entropy(student, of_student, teacher, of_teacher, pairs, backend=backend).loss.backward()
        return time.perf_counter() - start

    modules, before = len(sys.modules), peak_mib()
    (student * 2).sum().backward()  # autograd's own first call is not ours
    after_autograd = peak_mib()
    first = step()
    loaded, memory = len(sys.modules) - modules, peak_mib() - after_autograd
    for _ in range(WARM_UP):
        step()
    slept = wake_ups()
    seconds = [step() for _ in range(calls)]
    return {
        "first_seconds": first,
        "first_mib": round(memory, 1),
        "autograd_first_mib": round(after_autograd - before, 1),
        "later_mib": round(peak_mib() - before - memory, 1),
        "modules_loaded": loaded,
        "compiler_loaded": [name for name in COMPILER if name in sys.modules],
        "later_seconds": statistics.median(seconds),
        "least_seconds": min(seconds),
        "wake_ups_per_call": (wake_ups() - slept) / calls,
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
