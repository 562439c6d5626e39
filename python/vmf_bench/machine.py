"""What a measurement ran on; it only reads."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

# of /proc/cpuinfo: those that products and softmaxes are written with
INSTRUCTION_SETS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "sve",
    "sve2",
    "bf16",
    "i8mm",
    "sme",
)


def machine() -> dict[str, Any]:
    """Processor, instruction sets, threads, GPU and versions, by name; no name of a host or a user."""
    facts = _cpu_facts()
    sets = set((facts.get("flags") or facts.get("Features") or "").split())
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cpu_family_and_model": _family(facts),
        "threads": torch.get_num_threads(),
        "cores": usable_cores(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in sets],
        "amx": "amx_tile" in sets if sets else None,  # None where the system does not tell
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def part(device: torch.device) -> str:
    """The part that a row runs on, for a reader."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads, facts = torch.get_num_threads(), _cpu_facts()
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def free_gib(device: torch.device) -> float:
    """Memory that can still be taken; infinite where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch gives it out again
        return (torch.cuda.mem_get_info(device)[0] + cached) / 2**30
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kib[0] / 2**20 if kib else math.inf


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_facts() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _family(facts: dict[str, str]) -> str | None:
    """Virtual machines often hide the model's name, but not these numbers."""
    return f"{facts['cpu family']}/{facts['model']}" if {"cpu family", "model"} <= facts.keys() else None
