"""The command ``vmf-bench``: are the losses right on this machine, and how fast beside others?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmf_bench.errors import BenchError

WRONG, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit codes; the last as shells report a SIGINT
DTYPES = ("float32", "bfloat16")
MADE = ("vmf-bench.json", "vmf-bench.html")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0 all right, 1 a loss of this library is wrong or fails, 2 bad input."""
    chosen = _parser().parse_args(arguments)
    try:
        return _run(chosen)
    except BenchError as error:
        print(f"vmf-bench: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("vmf-bench: stopped.", file=sys.stderr)
        return INTERRUPTED


def _run(asked: argparse.Namespace) -> int:
    from vmf_bench import table  # torch, which takes seconds: not before the arguments are known to be good
    from vmf_bench.plan import Options
    from vmf_bench.run import has_fault, run
    from vmf_bench.variants import chosen

    variants = chosen(asked.only)
    if asked.list:
        for name, variant in variants.items():
            print(f"{name:<30} {'this library: ' if variant.is_ours else ''}{variant.title}")
        return 0
    options = Options.of(
        rows=asked.rows, prototypes=asked.prototypes, dim=asked.dim, dtype=asked.dtype, quick=asked.quick
    )
    if asked.out is not None:
        _check_folder(asked.out)

    def say(record: dict[str, Any]) -> None:
        cases = record["cases"]
        first = f"{table.heading(record)}\n\n{table.checks_table(record['checks'])}"
        print(first if not cases else table.case_table(cases[-1]), end="\n\n", flush=True)

    record = run(options, variants, say)
    record["command"] = _command(asked)
    print(table.left_out(record["left_out"]))
    if asked.out is not None:
        _write(record, asked.out)
    return WRONG if has_fault(record) else 0


def _check_folder(folder: Path) -> None:
    """Make the folder, and see that files can be written there, before minutes are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / name for name in MADE):
            is_new = not path.exists()
            path.open("a").close()
            if is_new:
                path.unlink()  # a run that is stopped leaves nothing
    except OSError as error:
        raise BenchError(f"--out got {folder}, which cannot be written: {error.strerror}.") from error


def _write(record: dict[str, Any], folder: Path) -> None:
    from vmf_bench.json_text import json_text
    from vmf_bench.page import page

    data, html = (folder / name for name in MADE)
    try:
        data.write_text(json_text(record, indent=1) + "\n", encoding="utf-8")
        html.write_text(page(record), encoding="utf-8")
    except OSError as error:
        raise BenchError(f"--out got {folder}, which cannot be written: {error.strerror}.") from error
    print(f"{record['seconds']:.0f} s; {data} and {html} hold everything")


def _command(asked: argparse.Namespace) -> str:
    """The command with its options, but for the folder, which names places of this machine."""
    words = ["vmf-bench"]
    for name in ("rows", "prototypes", "dim", "dtype"):
        if getattr(asked, name) is not None:
            words += [f"--{name}", str(getattr(asked, name))]
    words += ["--quick"] if asked.quick else []
    return " ".join(words + (["--only", *asked.only] if asked.only else []))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vmf-bench", description=__doc__)
    parser.add_argument("--rows", type=int, metavar="N", help="student rows: 10 crops of N / 10 images, and N patches")
    parser.add_argument("--prototypes", type=int, metavar="K", help="prototypes of both networks")
    parser.add_argument("--dim", type=int, metavar="D", help="dimension of the rows (default: 256)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the features and products (default: both)")
    parser.add_argument("--quick", action="store_true", help="small sizes, 40 seconds instead of 145")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"write {' and '.join(MADE)} there")
    parser.add_argument("--only", nargs="+", metavar="LOSS", help="these losses alone; --list has the names")
    parser.add_argument("--list", action="store_true", help="name the losses and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
