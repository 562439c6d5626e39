"""A process in which variants are tried, one after the other: names come in by the line, what happens goes out by the line.

A line out is a JSON object with "state" and, where it belongs to a variant, "name": ready; preparing, compiling, launched,
returned (of each case); done, with the result. All else that is printed goes to stderr. After anything but a right result the
process is not to be trusted: whoever started it ends it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from bench.gpu.module import load
from bench.light.columns import check_columns
from bench.light.differences import verdict
from bench.light.prototypes import check_pack, check_pull_back
from bench.light.rows import check_merge, check_rows
from bench.light.stand import Stand
from bench.light.variants import KERNELS, Variant, parsed

FAMILIES: dict[str, Callable[[Stand], None]] = {
    "rows-scores": check_rows,
    "rows-keys": check_rows,
    "rows-own": check_rows,
    "columns": check_columns,
    "usage": check_columns,
    "pack": check_pack,
    "pull-back": check_pull_back,
    "merge": check_merge,
}
SAVED_ELEMENTS = 2**17  # of a wrong tensor, from its start
SAVED_PLACES = 2**16  # of wrong elements
SAVED_TENSORS = 2  # of a variant
TRACEBACK_LINES = 8


class AbsentError(RuntimeError):
    """There is no such kernel; says why."""


class UnavailableError(RuntimeError):
    """There is one, and it does not run here; says why."""


def kernels_of(variant: Variant, toy: bool) -> Any:
    """The object that launches them.

    Raises:
        AbsentError: there is none.
        UnavailableError: it does not run here.
    """
    source = KERNELS[variant.kernels]
    found = getattr(importlib.import_module(source.module), source.attribute, None)
    if found is None:
        raise AbsentError(f"{source.module} has no {source.attribute}")
    if source.backend == "cuda" and not toy:
        from vmf_kernels.backends.cuda import binding

        if (reason := binding.unsupported_device(torch.device("cuda", 0))) is not None:
            raise UnavailableError(reason)
    return found


def attempt(variant: Variant, device: torch.device, say: Callable[..., None], folder: Path) -> dict[str, Any]:
    """The result of one variant: "right"; "wrong" with where and how; "failed", "absent" or "unavailable" with the reason."""
    start = time.monotonic()
    try:
        kernels = kernels_of(variant, device.type == "cpu")
        stand = Stand(variant, kernels, device, lambda state, case: say(state, name=variant.name, case=case))
        FAMILIES[variant.family](stand)
    except AbsentError as reason:
        return {"status": "absent", "reason": str(reason)}
    except UnavailableError as reason:
        return {"status": "unavailable", "reason": str(reason)}
    except Exception as error:  # whatever fails is what gets recorded
        lines = "".join(traceback.format_exception(error)[-TRACEBACK_LINES:])
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:1000], "traceback": lines[-4000:]}
    wrong = bool(stand.differences or stand.notes)
    return {
        "status": "wrong" if wrong else "right",
        "cases": stand.cases,  # their names
        "largest_error": stand.largest_error,  # of what is right: rounding
        "differences": [difference.report for difference in stand.differences],
        "verdict": verdict(stand.tensors, {difference.tensor for difference in stand.differences}),
        "notes": stand.notes,
        "saved": save(stand, folder) if stand.differences else None,
        "seconds": round(time.monotonic() - start, 2),
    }


def save(stand: Stand, folder: Path) -> str:
    """The first wrong tensors, cut to size, in a file of the folder; its path."""
    arrays: dict[str, Any] = {}  # numpy declares one keyword, and that a flag
    for difference in stand.differences[:SAVED_TENSORS]:
        name = f"{difference.case}, {difference.tensor}"
        for which, tensor in (("got", difference.got), ("expected", difference.expected)):
            arrays[f"{name}, {which}"] = tensor.astype(np.float32).ravel()[:SAVED_ELEMENTS]
        arrays[f"{name}, shape"] = np.array(difference.got.shape)
        arrays[f"{name}, wrong"] = difference.wrong[:SAVED_PLACES].astype(np.int32)
    path = folder / f"{stand.variant.name.replace('/', ' ')}.npz"
    np.savez_compressed(path, **arrays)
    return str(path)


def serve(names: TextIO, out: TextIO, device: torch.device, folder: Path) -> None:
    """Try each variant whose name comes, until no more do."""

    def say(state: str, **more: Any) -> None:
        print(json.dumps({"state": state} | more), file=out, flush=True)

    if device.type == "cuda":
        torch.cuda.init()
        torch.zeros(1, device=device)
    say("ready")
    for line in names:
        name = line.strip()
        say("preparing", name=name, case="")
        say("done", name=name, result=attempt(parsed(name), device, say, folder))


def end_with_the_parent() -> None:
    """A kernel that hangs would outlive whoever started this."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


@contextmanager
def stand_ins() -> Iterator[None]:
    """A rehearsal on the CPU: the tests' stand-in for the CUDA module, Triton's kernels interpreted."""
    from tests.backends.cuda_stand_in import standing_in
    from tests.backends.interpreted import correct_bf16

    with np.errstate(divide="ignore", invalid="ignore"), standing_in(), correct_bf16():  # padding's weight is 0
        yield


def main(arguments: list[str]) -> None:
    """Serve on stdin and stdout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--module", type=Path, help="file to load as vmf_kernels._cuda")
    parser.add_argument("--folder", type=Path, required=True, help="where wrong tensors are put")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    end_with_the_parent()
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anyone else prints is not for the protocol
    if options.module is not None:
        load(options.module)
    with stand_ins() if options.dry_run else nullcontext():
        serve(sys.stdin, out, torch.device("cpu" if options.dry_run else "cuda:0"), options.folder)


if __name__ == "__main__":
    main(sys.argv[1:])
