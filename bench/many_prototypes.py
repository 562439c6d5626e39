"""One step of the loss with prototypes split over ranks: so many that their stored logits would not fit the machine.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=4 -m bench.many_prototypes --prototypes 1048576 --rows 4096 \
        --dim 64 --check --json bench/results/cpu/many_prototypes.json

Each rank holds a block of both networks' prototypes and the same rows. The report holds the time of a forward and a backward
pass, the peak resident memory of every rank, and what one fp32 copy of both networks' logits would take. With ``--check``,
rank 0 then does the same step alone with all prototypes, and the report says how far the results are apart.

Legend: R rows of either network, K prototypes, D embedding dim, P ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from vmf_kernels import Prototypes, multi_crop_weights, prototype_cross_entropy, weight_norm_vmf_prototypes

VIEWS = 2  # of either network: each learns from the other
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
VIEW_SPREAD = 0.5  # of an image's views around their common direction
TEACHER_SPREAD = 0.1  # of the student's prototypes around the teacher's, relative to their norm
MAGNITUDE_SPREAD = 0.05
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Sizes:
    """Sizes of one step; rank p holds block p of the prototypes."""

    prototypes: int
    rows: int
    dim: int
    ranks: int

    @property
    def images(self) -> int:
        """Images that the rows are views of."""
        return self.rows // VIEWS

    @property
    def logits_bytes(self) -> int:
        """What one fp32 copy of both networks' logits would take."""
        return 2 * self.rows * self.prototypes * 4

    def block(self, rank: int) -> int:
        """Prototypes of a rank, the remainder going to the first ones."""
        return self.prototypes // self.ranks + (rank < self.prototypes % self.ranks)


@dataclass(frozen=True)
class Outcome:
    """The results of one step."""

    seconds: float
    loss: float
    gradients: dict[str, Tensor]  # features [R, D], weight [K, D], magnitude [K, 1]


def features_of(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """[R, D] unit rows of student and teacher, view-major, scattered around one direction for each image."""
    random = torch.Generator().manual_seed(0)
    direction_BD = torch.randn(sizes.images, sizes.dim, generator=random)
    views = [
        direction_BD + VIEW_SPREAD * torch.randn(VIEWS, *direction_BD.shape, generator=random)
        for _ in ("student", "teacher")
    ]
    student, teacher = (functional.normalize(rows.flatten(0, 1), dim=1) for rows in views)
    return student.requires_grad_(), teacher


def prototypes_of(sizes: Sizes, blocks: Sequence[int]) -> tuple[Prototypes, Prototypes]:
    """The student's prototypes (leaves of autograd) and the teacher's in these blocks; the same for any rank."""
    drawn = [_draw_block(sizes, block) for block in blocks]
    direction, magnitude, noise = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    teacher = weight_norm_vmf_prototypes(magnitude, direction)
    moved = noise.mul_(TEACHER_SPREAD).add_(direction).requires_grad_()
    return weight_norm_vmf_prototypes(magnitude.clone().requires_grad_(), moved), teacher


def run_step(sizes: Sizes, blocks: Sequence[int], group: ProcessGroup | None) -> Outcome:
    """Forward and backward pass over the prototypes of these blocks and those of the other ranks of the group."""
    student_rows, teacher_rows = features_of(sizes)
    student, teacher = prototypes_of(sizes, blocks)
    assert student.magnitude is not None
    if group is not None:
        torch.distributed.barrier(group)  # no rank's time includes another's preparation
    start = time.perf_counter()
    loss, _ = prototype_cross_entropy(
        student_rows,
        student,
        teacher_rows,
        teacher,
        multi_crop_weights(VIEWS, VIEWS) / sizes.images,
        student_temperature=STUDENT_TEMPERATURE,
        teacher_temperature=TEACHER_TEMPERATURE,
        backend="streaming",
        prototype_group=group,
    )
    leaves = {"features": student_rows, "weight": student.weight, "magnitude": student.magnitude}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return Outcome(time.perf_counter() - start, loss.item(), dict(zip(leaves, gradients, strict=True)))


def report_of(sizes: Sizes, shared: Outcome, group: ProcessGroup | None) -> dict[str, Any]:
    """Time and memory of the step on every rank, and the machine."""
    mine = (shared.seconds, peak_resident_mib())
    everyone: list[Any] = [mine] * sizes.ranks
    if group is not None:
        torch.distributed.all_gather_object(everyone, mine, group)
    peaks = [round(peak) for _, peak in everyone]
    return {
        "prototypes": sizes.prototypes,
        "dim": sizes.dim,
        "student_rows": sizes.rows,
        "teacher_rows": sizes.rows,
        "dtype": "float32",
        "ranks": sizes.ranks,
        "seconds": round(max(seconds for seconds, _ in everyone), 2),
        "peak_rss_mib": peaks,
        "peak_rss_mib_sum": sum(peaks),
        "logits_gib": round(sizes.logits_bytes / GIB, 3),
        "loss": shared.loss,
        "machine": machine_facts(),
    }


def machine_facts() -> dict[str, Any]:
    """Facts about this process and its machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "threads_per_rank": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def check_of(sizes: Sizes, shared: Outcome) -> dict[str, Any] | None:
    """On rank 0, the difference between its own step with all prototypes and the step over ranks; None on other ranks."""
    rank = torch.distributed.get_rank() if sizes.ranks > 1 else 0
    if rank > 0:
        for name in ("weight", "magnitude"):
            torch.distributed.send(shared.gradients[name].contiguous(), 0)
        return None
    blocks = [shared.gradients]
    for other in range(1, sizes.ranks):
        size = sizes.block(other)
        received = {"weight": torch.empty(size, sizes.dim), "magnitude": torch.empty(size, 1)}
        for gradient in received.values():
            torch.distributed.recv(gradient, other)
        blocks.append(received)
    alone = run_step(sizes, range(sizes.ranks), None)
    compared = {"features": shared.gradients["features"]}
    compared |= {name: torch.cat([block[name] for block in blocks]) for name in ("weight", "magnitude")}
    return {
        "seconds": round(alone.seconds, 2),
        "peak_rss_mib": round(peak_resident_mib()),
        "loss": alone.loss,
        "loss_relative_difference": abs(shared.loss - alone.loss) / abs(alone.loss),
        "gradients": {name: _difference(got, alone.gradients[name]) for name, got in compared.items()},
    }


def peak_resident_mib() -> float:
    """Peak memory of this process so far, including the interpreter and torch."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB


def arguments_of(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prototypes", type=int, default=1_048_576, help="K, over all ranks")
    parser.add_argument("--rows", type=int, default=4096, help="R of the student, and as many of the teacher")
    parser.add_argument("--dim", type=int, default=64, help="D")
    parser.add_argument("--check", action="store_true", help="repeat the step on rank 0 alone and compare")
    parser.add_argument("--json", type=Path, help="file for the report")
    arguments = parser.parse_args(given)
    if arguments.rows < VIEWS or arguments.rows % VIEWS:
        parser.error(f"--rows is {arguments.rows}; expected a positive multiple of {VIEWS}, the views of an image")
    return arguments


def main() -> None:
    arguments, ranks = arguments_of(), int(os.environ.get("WORLD_SIZE", "1"))  # what torchrun sets
    group = None
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
        group = torch.distributed.group.WORLD
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    sizes = Sizes(arguments.prototypes, arguments.rows, arguments.dim, ranks)
    run_step(Sizes(ranks, VIEWS, 2, ranks), [rank], group)  # what is loaded and connected by a first call
    shared = run_step(sizes, [rank], group)
    report = report_of(sizes, shared, group)
    if arguments.check:
        report["alone"] = check_of(sizes, shared)
    if rank == 0:
        print(json.dumps(report, indent=1))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if ranks > 1:
        torch.distributed.barrier()  # rank 0 may still be at work alone
        torch.distributed.destroy_process_group()


def _draw_block(sizes: Sizes, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """[K, D] directions of norm about 1, [K, 1] magnitudes about 1, and [K, D] noise like the directions."""
    random, count = torch.Generator().manual_seed(1 + block), sizes.block(block)
    direction, noise = (torch.randn(count, sizes.dim, generator=random) / sizes.dim**0.5 for _ in range(2))
    return direction, 1 + MAGNITUDE_SPREAD * torch.randn(count, 1, generator=random), noise


def _difference(got: Tensor, expected: Tensor) -> dict[str, float]:
    difference = got - expected
    return {
        "norm": expected.norm().item(),
        "largest": expected.abs().max().item(),
        "relative_difference": (difference.norm() / expected.norm()).item(),
        "largest_difference": difference.abs().max().item(),
    }


if __name__ == "__main__":
    main()
