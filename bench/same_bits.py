"""Shows whether a refactoring has changed a bit of any loss, gradient, centre, state or statistic.

python -m bench.same_bits write OUT.json
python -m bench.same_bits compare BEFORE.json AFTER.json

``write`` runs every public class and function on fixed seeds, on the CPU with one thread, and keeps a SHA-256 of each result;
``compare`` prints a line for each difference and exits with 1 if there is any. Only public names of the library are imported,
so this file and ``bench/bits`` can be copied into an older checkout, and run there with the same command.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

THREADS = 1  # sums are formed in another order on more
IN_PROCESS = ("operators", "elements", "heads", "losses", "drop_ins", "newcomers")  # modules of bench.bits
ON_RANKS = "ranks"
DROP_INS = ("dino", "ibot", "dinov2", "dinov3", "lightly", "solo")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.same_bits", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="run all cases and keep what came out")
    write.add_argument("out", type=Path)
    compare = commands.add_parser("compare", help="print what differs between two files")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "write":
        return write_file(options.out)
    return compare_files(options.before, options.after)


def write_file(out: Path) -> int:
    # before Triton's first import: its kernels then run in Python, on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(THREADS)
    library = importlib.import_module("vmf_kernels").__file__
    print(f"{library} under torch.set_num_threads({THREADS})")
    unexercised = missing_names()
    if unexercised:
        print(f"no case exercises {', '.join(unexercised)}: a change of theirs would go unseen")
        return 1
    started = time.monotonic()
    content = run_everything()
    out.write_text(json.dumps(content, indent=1))
    for name, reason in content["skipped"].items():
        print(f"skipped {name}: {reason}")
    cases = content["cases"].values()
    seconds = time.monotonic() - started
    print(f"{len(cases)} cases of {sum(map(len, cases))} quantities in {seconds:.0f} s: {out}")
    return 0


def run_everything() -> dict[str, Any]:
    """What a file holds: the environment, the records of all cases, and why others were skipped."""
    from bench.bits import ranks, record

    with warnings.catch_warnings():
        # of the interpreter: a padding's weight is 0, and its logarithm is meant to be -inf
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        parts = [record.run_cases(cases_of(IN_PROCESS)), ranks.run_on_ranks(THREADS)]
    return {
        "environment": record.environment(),
        "public": public_names(),
        "covers": {case.name: case.covers for case in cases_of((*IN_PROCESS, ON_RANKS))},
        "cases": {name: records for part in parts for name, records in part.cases.items()},
        "skipped": {name: reason for part in parts for name, reason in part.skipped.items()},
    }


def cases_of(modules: Sequence[str]) -> list[Any]:
    """All cases of some modules of ``bench.bits``; imported here, after Triton's interpreter has been chosen."""
    found = [importlib.import_module(f"bench.bits.{module}").cases() for module in modules]
    return list(itertools.chain.from_iterable(found))


def public_names() -> list[str]:
    """Every name of the library's ``__all__``, and of the drop-ins' as "dinov2.DINOLoss"."""
    names = list(importlib.import_module("vmf_kernels").__all__)
    for drop_in in DROP_INS:
        names += [f"{drop_in}.{name}" for name in importlib.import_module(f"vmf_kernels.compat.{drop_in}").__all__]
    return names


def missing_names() -> list[str]:
    """Public names that no case exercises."""
    from bench.bits import record

    return record.missing_names(cases_of((*IN_PROCESS, ON_RANKS)), public_names())


def compare_files(before: Path, after: Path) -> int:
    from bench.bits import record

    one, other = (json.loads(path.read_text()) for path in (before, after))
    for line in record.newcomers(one, other):
        print(line)
    found = record.differences(one, other)
    for line in found:
        print(line)
    if found:
        print(f"{len(found)} differences")
        return 1
    skipped = len(one["skipped"])
    print(
        f"no bit differs in {len(one['cases'])} cases" + (f"; {skipped} were skipped on both sides" if skipped else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
