"""First light of the kernels on a GPU: each is called by itself on integers with a known exact result, compared elementwise.

    python -m bench.first_light --out DIR --seconds 40 --kernels cuda
    python -m bench.first_light --out DIR --seconds 60 --kernels cuda --only columns/bf16 --module build/bounded/_cuda.so
    python -m bench.first_light --out DIR --seconds 60 --dry-run        on the CPU, at toy size, on stand-ins of the tests

DIR/first_light.txt gets a line for each variant as soon as its result is known, and DIR/first_light.json has all results. The
first wrong tensors are in DIR/first_light.npz (12 MiB at most; read it with ``numpy.load``). This process never uses the GPU:
its child processes do. One in which a kernel hangs, dies or is wrong is replaced (bench/light/crew.py).

Exit code 0: all are right; 1: one is wrong; 2: none is wrong, but not all were reached in time or can run here. Kernels that
this version of the library lacks are ignored ("absent").
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.light.crew import LIMITS, Crew, Orders, Result
from bench.light.differences import in_words
from bench.light.variants import Variant, variants

ROOT = Path(__file__).parents[1]
WORKERS = 12  # processes: a machine with one such GPU has 16 cores or more
DRY_WORKERS = 2
SAVED_BYTES = 12 * 2**20  # of wrong tensors in all
WRITING_SECONDS = 2.0  # kept of the time, to end processes and write
WORDS = 3  # wrong tensors that are described in a line
FINE = ("right", "absent")
UNDECIDED = ("not reached", "slow", "unavailable")


class Log:
    """The results as they come: lines, a record, and the wrong tensors."""

    def __init__(self, out: Path, wanted: list[Variant], about: Mapping[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.start = out, time.monotonic()
        self.data: dict[str, Any] = {**about, "wanted": len(wanted), "results": {}, "summary": {}}
        self.saved_bytes, self.said = 0, set[tuple[str, str] | None]()
        for name in ("first_light.txt", "first_light.npz"):
            (out / name).unlink(missing_ok=True)
        self.write()

    def put(self, name: str, result: Result) -> None:
        """One variant."""
        result["at_seconds"] = round(time.monotonic() - self.start, 1)
        if (saved := result.pop("saved", None)) is not None:
            result["saved"] = self.keep(name, Path(saved))
        self.data["results"][name] = result
        self.data["summary"] = self.summary()
        self.write()
        # one line for all that are not there for one reason
        reason = (name.split("/")[0], result["reason"]) if result["status"] in ("absent", "unavailable") else None
        if reason is None or reason not in self.said:
            self.say(line_of(name, result))
        self.said.add(reason)

    def keep(self, name: str, path: Path) -> bool:
        """Whether the arrays of a file fitted in with the others."""
        if not path.exists() or self.saved_bytes + path.stat().st_size > SAVED_BYTES:
            return False
        with (
            zipfile.ZipFile(path) as source,
            zipfile.ZipFile(self.out / "first_light.npz", "a", zipfile.ZIP_DEFLATED) as whole,
        ):
            for member in source.namelist():
                whole.writestr(f"{name}, {member}", source.read(member))
        self.saved_bytes += path.stat().st_size
        return True

    def summary(self) -> dict[str, dict[str, int]]:
        """Numbers by kernels and status."""
        found: dict[str, Counter[str]] = {}
        for name, result in self.data["results"].items():
            found.setdefault(name.split("/")[0], Counter())[result["status"]] += 1
        return {kernels: dict(counter) for kernels, counter in found.items()}

    def write(self) -> None:
        """The record, whole: a reader sees the old one or the new one."""
        partial = self.out / "first_light.json.partial"
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(partial, self.out / "first_light.json")

    def say(self, line: str) -> None:
        """A line, at once in the file and on the screen."""
        with (self.out / "first_light.txt").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def exit_code(self) -> int:
        """See the module."""
        statuses = {result["status"] for result in self.data["results"].values()}
        if statuses - {*FINE, *UNDECIDED}:
            return 1
        return 2 if statuses & {*UNDECIDED} or len(self.data["results"]) < self.data["wanted"] else 0


def line_of(name: str, result: Result) -> str:
    """A result in a line."""
    status = result["status"]
    head = f"{status if status in FINE else status.upper():11} {name:28}"
    if (before := result.get("after_others")) is not None:
        head += f" [in a process after others: {before['status']}]"
    if status == "right":
        return (
            f"{head} {len(result['cases'])} cases, largest error {result['largest_error']:.1e}, {result['seconds']} s"
        )
    if status != "wrong":
        return f"{head} {' '.join(result['reason'].split())}"
    differences = result["differences"]
    words = [*result["notes"][:WORDS], *(in_words(report) for report in differences[:WORDS])]
    more = len(differences) + len(result["notes"]) - len(words)
    wrong = list(dict.fromkeys(report["case"].partition(", launch")[0] for report in differences))
    right = [case for case in result["cases"] if case not in wrong]
    cases = f"wrong in {', '.join(wrong) or 'none'}; right in {', '.join(right) or 'none'}"
    return " ## ".join(
        [f"{head} {cases}", *filter(None, [result["verdict"], *words]), *([f"{more} more"] if more else [])]
    )


def orders_of(options: argparse.Namespace, folder: Path) -> Orders:
    """How the processes are started."""
    command = [sys.executable, "-m", options.child, "--folder", str(folder)]
    command += ["--module", str(options.module.resolve())] if options.module is not None else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if options.dry_run:
        command.append("--dry-run")
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return Orders(command, environment, folder, LIMITS | {"launched": options.hang_seconds})


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.first_light", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which nothing more is tried")
    parser.add_argument(
        "--module", type=Path, help="file to load as vmf_kernels._cuda, such as the one with bounded waits"
    )
    parser.add_argument("--kernels", choices=("cuda", "triton", "all"), default="all")
    parser.add_argument(
        "--only", nargs="+", default=[], help="parts of names, such as columns/bf16: others are omitted"
    )
    parser.add_argument("--workers", type=int, help=f"processes; default {WORKERS}, in a dry run {DRY_WORKERS}")
    parser.add_argument(
        "--hang-seconds", type=float, default=LIMITS["launched"], help="after its launch a kernel hangs"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy size")
    parser.add_argument(
        "--child", default="bench.light.child", help=argparse.SUPPRESS
    )  # the tests have one with faults
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Try what the command line asks for."""
    options = parse(arguments)
    deadline = time.monotonic() + options.seconds - WRITING_SECONDS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes are ended too
    wanted = variants(options.kernels, options.only, toy=options.dry_run)
    if not wanted:
        named = " or ".join(options.only)
        raise SystemExit(f"no variant of {options.kernels} has {named} in its name, such as cuda/columns/bf16/256")
    module = None if options.module is None else str(options.module)
    log = Log(options.out, wanted, {"dry_run": options.dry_run, "module": module, "seconds": options.seconds})
    workers = options.workers or (DRY_WORKERS if options.dry_run else WORKERS)
    with tempfile.TemporaryDirectory() as folder:
        Crew(orders_of(options, Path(folder)), workers, deadline).run([one.name for one in wanted], log.put)
    took = time.monotonic() - log.start
    log.say(f"{took:.0f} s: " + "; ".join(f"{name}: {counted(counts)}" for name, counts in log.data["summary"].items()))
    return log.exit_code()


def counted(counts: Mapping[str, int]) -> str:
    """{"right": 3, "hung": 1} -> "3 right, 1 hung"."""
    return ", ".join(f"{count} {status}" for status, count in counts.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
