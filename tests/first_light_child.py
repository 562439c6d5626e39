"""The process of ``bench.first_light`` with faults: by embedding dim of the CUDA kernels, which the stand-in would do right."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from bench.light import child
from bench.light.stand import Stand


def halves_swapped(stand: Stand) -> None:
    """Both warpgroups' rows of every barycentre in each other's place: wrong, and nothing else is."""
    check_with(stand, lambda results: {name: swapped(name, tensor) for name, tensor in results.items()})


def swapped(name: str, tensor: Any) -> Any:
    return tensor.roll(tensor.shape[1] // 2, dims=1) if name == "barycentre" else tensor


def check_with(stand: Stand, change: Callable[[Any], Any]) -> None:
    launched = stand._launched
    with mock.patch.object(stand, "_launched", lambda case, call: launched(case, lambda: change(call()))):
        child.check_rows(stand)


def hang(stand: Stand) -> None:
    stand.say("launched", "made up")
    time.sleep(100)


def die(stand: Stand) -> None:
    stand.say("launched", "made up")
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGABRT)


def fail(stand: Stand) -> None:
    raise RuntimeError("the row pass failed: an illegal memory access was encountered")


FAULTS = {
    "cuda/rows-own/fp16/64": halves_swapped,
    "cuda/rows-keys/fp16/64": hang,
    "cuda/columns/fp16/64": die,
    "cuda/rows-scores/fp16/128": fail,
}
GUARDED = dict(child.FAMILIES)


def check(stand: Stand) -> None:
    FAULTS.get(stand.variant.name, GUARDED[stand.variant.family])(stand)


if __name__ == "__main__":
    child.FAMILIES.update(dict.fromkeys(child.FAMILIES, check))
    child.main(sys.argv[1:])
