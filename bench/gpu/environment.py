"""The environment of a measurement: GPU, driver, clocks, versions, commit. It only reads and sets nothing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
from typing import Any

import torch

from bench.gpu.settings import ROOT

PACKAGES = ("torch", "triton", "numpy", "pytest", "setuptools", "pybind11", "ninja", "liger-kernel")
SOURCES = ("csrc", "vmf_kernels")  # what results are results of
WRITTEN_FROM_RESULTS = "measured.json"
CLOCK_FIELDS = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "utilization.gpu",
    "memory.used",
)
REPLY_SECONDS = 20


def environment() -> dict[str, Any]:
    """Versions, device and commit, by name."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "cuda": torch.version.cuda,
        "driver": _query_gpu(("driver_version",)).get("driver_version"),
        "device": _device(),
        "commit": _reply(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        "sources": sources(),
        "uncommitted_changes": bool(_reply(["git", "-C", str(ROOT), "status", "--porcelain"])),
    }


def sources() -> str:
    """Digest of the library's sources, because a copy without git has no commit."""
    digest = hashlib.sha256()
    files = (path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.is_file())
    for path in sorted(files):
        if path.suffix in {".py", ".cu", ".cuh", ".h", ".cpp", ".json"} and path.name != WRITTEN_FROM_RESULTS:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def clocks() -> dict[str, str]:
    """Clocks, temperature and load from nvidia-smi; empty without it."""
    return _query_gpu(CLOCK_FIELDS)


def slug(name: str) -> str:
    """Lower-case name of a folder: "NVIDIA H200" to "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _device() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"name": platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _query_gpu(fields: tuple[str, ...]) -> dict[str, str]:
    reply = _reply(["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    return dict(zip(fields, (value.strip() for value in reply.split(",")), strict=False)) if reply else {}


def _reply(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=REPLY_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
