"""Cases run with the same code on gloo ranks and in one process that has everything: one spawn serves all of a file's.

A case takes a share, which says what of the data is this process's; its class is made of a rank, or of None when alone.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.spawn import start_processes

RANKS = 2
IMPORTED = (
    "pytest",
    "sklearn.datasets",
    "sklearn.linear_model",
    "torch.distributed.fsdp",
    "vmf_kernels.compat.dinov2",
    "vmf_kernels.testing",
    "vmf_pretrain.engine.run",
    "vmf_pretrain.evaluation.pictures",
    "vmf_pretrain.report.plots",
)  # once for the ranks of all files: what they would import one by one takes a rank eight seconds
Case = Callable[[Any], Any]


class Runs(NamedTuple):
    """What each case gave: on the ranks, and alone."""

    ranks: list[dict[str, Any]]
    alone: dict[str, Any]


def preload_server() -> None:
    """Say what the server of ranks imports; before anything forks from it, for that starts it."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([*IMPORTED])


def imported_after(*names: str) -> list[str]:
    """All modules of a process that has imported ``IMPORTED``, then ``names``, and nothing else."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply(_imported, (names,))


def _imported(names: tuple[str, ...]) -> list[str]:
    for name in names:
        importlib.import_module(name)
    return sorted(sys.modules)


def start_ranks(run: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """``run(rank, *arguments)`` in a process for each rank; waits for all, and raises what one raises.

    They are forked from a server that has imported torch, which takes a rank of its own seconds. Forks of this process would
    not do: autograd refuses to run in those.
    """
    start_processes(run, arguments, nprocs=ranks, start_method="forkserver")


def run_cases(
    folder: Path, cases: Sequence[Case], share: Callable[[int | None], Any], filters: str = "default"
) -> Runs:
    """All cases, results by name; ``filters`` is what the ranks do with warnings."""
    start_ranks(_run_rank, (str(folder), cases, share, filters), RANKS)
    return Runs(
        [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)],
        {case.__name__: case(share(None)) for case in cases},
    )


def _run_rank(rank: int, folder: str, cases: Sequence[Case], share: Callable[[int], Any], filters: Any) -> None:
    """All cases on one rank; what they gave goes to a file."""
    torch.set_num_threads(1)
    if filters != "default":
        warnings.simplefilter(filters)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save({case.__name__: case(share(rank)) for case in cases}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
