"""``python -m tests.fuzz``: random cases of every public function against its formula in fp64.

Prints the smallest failing case as the line of a command that runs it again. Exit status 1 if a case failed.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tests.fuzz.cases import Case
from tests.fuzz.runner import Report, cases_of, faults_of, run
from tests.fuzz.subjects.table import SUBJECTS


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    if options.case is not None:
        case = Case.parse(options.case)
        found = faults_of(case)
        print("\n".join(found) or f"nothing is wrong with {case}")
        return int(bool(found))
    chosen = {name: SUBJECTS[name] for name in options.function or SUBJECTS}
    started = time.process_time()
    report = run(
        cases_of(chosen, options.seed, options.backend),
        count=options.count,
        seconds=options.seconds,
        most_failures=options.failures,
        tell=lambda line: print(line, flush=True),
    )
    print(_told(report, time.process_time() - started))
    return int(bool(report.failures))


def _told(report: Report, cpu_s: float) -> str:
    total = sum(report.ran.values())
    lines = [f"{total} cases in {cpu_s:.0f} CPU seconds: " + ", ".join(f"{n} {c}" for n, c in report.ran.items())]
    for case, found in report.failures:
        lines += [f"\npython -m tests.fuzz --case '{case}'", *(f"  {fault}" for fault in found)]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--seed", type=int, default=0, help="of the cases; the same seed gives the same ones (default 0)"
    )
    parser.add_argument("--count", type=int, default=1000, help="cases at most (default 1000)")
    parser.add_argument("--seconds", type=float, default=600.0, help="at most, without the shrinking (default 600)")
    parser.add_argument("--failures", type=int, default=1, help="stop at so many failing cases (default 1)")
    parser.add_argument("--backend", help="for every case, in place of a random one")
    parser.add_argument("--function", action="append", choices=list(SUBJECTS), help="only this one; may be repeated")
    parser.add_argument("--case", help="run this case alone, as a failure is printed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
