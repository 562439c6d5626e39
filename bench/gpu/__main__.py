"""A call on a GPU: the stages of a plan (``plan.py``), one JSON, one log that grows as they run.

    bash bench/run_gpu.sh first [OUT_DIR]
    python -m bench.gpu first --dry-run --out OUT_DIR     every stage at toy sizes on the CPU; measures nothing
    python -m bench.report OUT_DIR/head.json

Each stage is a process with a limit (in a dry run mostly a call); ``head.json`` is rewritten whenever something becomes known.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from bench.gpu import plan
from bench.gpu.call import drive
from bench.gpu.environment import slug
from bench.gpu.jobs import run_stage
from bench.gpu.record import Record
from bench.gpu.settings import ROOT, Settings
from bench.gpu.tables import gpu_table, short_table


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("call", choices=sorted(plan.PLANS), help="which plan")
    parser.add_argument("--out", type=Path, help="folder of the results; default bench/results/<name of the GPU>")
    parser.add_argument("--after", type=Path, help="folder of the first call's results; default that of --out")
    parser.add_argument("--seconds", type=float, help="limit of the call; default the plan's")
    parser.add_argument(
        "--backend", help='of the library; default "triton", in a dry run "streaming" unless Triton interprets'
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--stage", help="run one stage in this process")
    parser.add_argument("--part", type=Path, help="where a stage puts its results")
    parser.add_argument("--skip", action="append", default=[], help="variant that a head stage leaves out")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is visible to torch; --dry-run runs every stage at toy sizes on the CPU")
    if (options.stage is None) != (options.part is None):
        parser.error("--stage and --part go together")
    return options


def first_results(options: argparse.Namespace, name: str) -> Path | None:
    """``head.json`` of the first call, named, in the folder of the results or committed; None, and a word, without one."""
    folders = [options.after, options.out, ROOT / "bench" / "results" / name]
    for folder in filter(None, folders):
        if (folder / "head.json").exists():
            return Path(folder / "head.json")
    looked = ", ".join(str(folder) for folder in folders if folder is not None)
    print(f"no head.json of a first call in {looked}: going on without, first light first", flush=True)
    return None


def main(arguments: list[str]) -> None:
    """Run what the command line asks for."""
    options = parse(arguments)
    name = "dry-run" if options.dry_run else slug(torch.cuda.get_device_name())
    on_triton = not options.dry_run or os.environ.get("TRITON_INTERPRET") == "1"
    seconds, stages = plan.PLANS[options.call]
    reserve = 0.0 if options.stage is not None else plan.RESERVE
    settings = Settings(
        backend=options.backend or ("triton" if on_triton else "streaming"),
        dry=options.dry_run,
        deadline=time.monotonic() + (options.seconds or seconds) - reserve,
        out=options.out or ROOT / "bench" / "results" / name,
        call=options.call,
    )
    if options.stage is not None:
        run_stage(options.stage, settings, Record(options.part), tuple(options.skip))
        return
    earlier = first_results(options, name) if options.call == "second" else None
    record = drive(settings, stages, earlier)
    (settings.out / "report.md").write_text(gpu_table(record.data) + "\n")
    print(short_table(record.data))
    print(f"results: {record.path}, every table: {settings.out / 'report.md'}, what was printed: {settings.log}")


if __name__ == "__main__":
    main(sys.argv[1:])
