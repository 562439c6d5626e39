"""The backends of the losses: which run here, why one does not, and whether each computes the published loss.

The check is that of ``vmf-bench``: value and gradients against the published loss in fp64, within an error budget.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from vmf_bench.attempts import FAULTS
from vmf_bench.check import check
from vmf_bench.variants import ON_GPU, OURS
from vmf_pretrain.doctor.finding import Finding, fine, note, problem

DTYPES = (torch.float32, torch.bfloat16)
# the fastest backend of each device that every machine can have: what is to be done where it does not run
EXPECTED = {
    ("native", "cpu"): "install vmf_kernels again where a C++17 compiler is found",
    ("triton", "cuda"): "install triton, and use a GPU of compute capability 8.0 or later",
}


def check_kernels(device: torch.device) -> list[dict[str, Any]]:
    """A record for each backend, pairing and dtype on a device, as ``vmf_bench.check.check``; a second or two."""
    return [{**record, "device": device.type} for record in check(OURS, DTYPES, device)]


def judge_kernels(records: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """A finding for each backend and device."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["name"], record["device"]), []).append(record)
    devices = {device for _, device in groups}
    shown = {
        place: group
        for place, group in groups.items()
        # with a GPU, what is for processors is judged there, and what is for GPUs on the GPU
        if len(devices) == 1 or (place[0] in ON_GPU) == (place[1] == "cuda") or _ran(group)
    }
    return [_judged(name, device, group) for (name, device), group in shown.items()]


def _judged(name: str, device: str, records: Sequence[Mapping[str, Any]]) -> Finding:
    subject = f"backend {name}"
    wrong = next((record for record in records if record["status"] in FAULTS), None)
    if wrong is not None:
        words = f"{wrong['status']} on {device} in {wrong['dtype']}: {wrong['reason']}"
        return problem(subject, words, "install vmf_kernels again on this machine; if that does not help, report it")
    if not _ran(records):
        words, advice = f"does not run on {device}: {records[0]['reason']}", EXPECTED.get((name, device))
        slower = f"{words}; plain torch computes instead, and slower"
        return fine(subject, words) if advice is None else note(subject, slower, advice)
    ran = [record for record in records if record["status"] == "ok"]
    dtypes = " and ".join(dict.fromkeys(record["dtype"] for record in ran))
    largest = max(record["errors"][key] / record["budget"][key] for record in ran for key in record["errors"])
    words = f"right on {device} in {dtypes}: loss and gradients are off by {largest:.0%} of the error budget at most"
    return fine(subject, words)


def _ran(records: Sequence[Mapping[str, Any]]) -> bool:
    return any(record["status"] == "ok" for record in records)
