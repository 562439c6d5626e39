"""The machine: processor, memory, GPUs, shared memory, and settings of the environment that slow a run down."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmf_bench.machine import machine
from vmf_pretrain.data.loader import SHARED_MEMORY
from vmf_pretrain.doctor.finding import Finding, fine, note, size_text
from vmf_pretrain.recipes.machine import this_machine

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processor time in a period, and the period; or "max"
LITTLE_SHARED = 256 << 20  # bytes; Docker gives 64 MiB, which one batch of photographs fills
BUSY = 1.5  # programs a core from which they slow each other down


@dataclass(frozen=True)
class Host:
    """What was read.

    Attributes:
        facts: part, instruction sets and versions, as ``vmf-bench`` records them.
        cores: that this process may use.
        quota: cores' worth of time that a container allows; None where there is no such limit.
        memory: of the machine or its container, bytes.
        gpus: name and bytes of each GPU that torch can use.
        driver: whether NVIDIA's driver is installed.
        shared: free shared memory, bytes; None where the system has no such place.
        wanted_threads: the environment's OMP_NUM_THREADS.
        threads: that torch computes with.
        load: programs that want a core at once, on average over the last minute; 0 where the system does not tell.
    """

    facts: dict[str, Any]
    cores: int
    quota: float | None
    memory: int
    gpus: tuple[tuple[str, int], ...]
    driver: bool
    shared: int | None
    wanted_threads: str | None
    threads: int
    load: float = 0.0


def read_host() -> Host:
    """This machine; it only reads."""
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    parts = [torch.cuda.get_device_properties(number) for number in range(usable)]
    on_cpu = this_machine("cpu")
    return Host(
        facts=machine(),
        cores=on_cpu.cores,
        quota=_quota(),
        memory=on_cpu.memory,
        gpus=tuple((part.name, part.total_memory) for part in parts),
        driver=shutil.which("nvidia-smi") is not None,
        shared=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        wanted_threads=os.environ.get("OMP_NUM_THREADS"),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    )


def judge_host(host: Host) -> list[Finding]:
    """What the machine means for a run."""
    sets = ", ".join(host.facts["instruction_sets"]) or "unknown instruction sets"
    found = [
        fine("processor", f"{host.facts['cpu']}, cores: {host.cores}, {size_text(host.memory)} of memory ({sets})"),
        _gpu(host),
    ]
    if host.quota is not None and host.quota < host.cores:
        found.append(
            note(
                "processor",
                f"this container may use the time of {host.quota:g} cores but sees {host.cores}",
                f"set OMP_NUM_THREADS to {max(1, round(host.quota))}, and data.workers to no more",
            )
        )
    if host.load > BUSY * host.cores:
        words = f"other programs are computing here: {host.load:.0f} want one of {host.cores} cores"
        found.append(
            note("processor", words, "wait for them, or expect less speed; the figures below are of this moment")
        )
    found.append(_threads(host))
    if host.shared is not None:
        free = f"{size_text(host.shared)} are free in {SHARED_MEMORY}, through which workers hand over batches"
        enough = host.shared >= LITTLE_SHARED
        advice = "make it larger (Docker: --shm-size 2g), or set data.workers to 0"
        found.append(fine("shared memory", free) if enough else note("shared memory", free, advice))
    return found


def _gpu(host: Host) -> Finding:
    if host.gpus:
        each = ", ".join(f"{name} ({size_text(memory)})" for name, memory in host.gpus)
        return fine("GPU", f"{len(host.gpus)} that torch can use: {each}")
    if not host.driver:
        return fine("GPU", "none here; runs use the processor")
    built = host.facts["cuda"]
    if built is None:
        words = (
            f"NVIDIA's driver is here, but torch {host.facts['torch']} is built without CUDA, so runs use the processor"
        )
        return note("GPU", words, "install a build of torch for CUDA: pytorch.org has the command")
    words = f"NVIDIA's driver is here, but torch {host.facts['torch']} for CUDA {built} finds no GPU"
    return note(
        "GPU", words, "see whether nvidia-smi lists one, CUDA_VISIBLE_DEVICES hides it, or the driver is too old"
    )


def _threads(host: Host) -> Finding:
    wanted, cores = host.wanted_threads, host.cores
    if wanted is None:
        return fine("threads", f"torch computes with {host.threads}")
    if not wanted.isdecimal() or int(wanted) == 0:
        return note("threads", f'OMP_NUM_THREADS is "{wanted}", which is no number', "unset it, or give a number")
    if int(wanted) > cores:
        words = f"OMP_NUM_THREADS is {wanted}, but there are {cores} cores, so threads wait for each other"
        return note("threads", words, f"unset it, or set it to {cores}")
    if int(wanted) < cores and not host.gpus:
        words = f"OMP_NUM_THREADS is {wanted}, so a step uses {wanted} of {cores} cores"
        return note("threads", words, "unset it, unless the other cores are for other programs")
    return fine("threads", f"OMP_NUM_THREADS is {wanted}")


def _quota() -> float | None:
    try:
        time, period = QUOTA.read_text().split()
        return int(time) / int(period)
    except (OSError, ValueError):  # no such limit, or "max"
        return None
