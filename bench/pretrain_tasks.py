"""What each task of ``vmf-pretrain eval`` prints of two short runs, as a table.

vmf-pretrain demo --out runs/digits
python -m bench.task_pictures runs/pictures
vmf-pretrain fit --config runs/pictures/recipe.yaml --data runs/pictures/classes/train --train.epochs 8 --out runs/pictures/run
python -m bench.pretrain_tasks --json bench/results/cpu/pretrain_tasks.json

The commands stand in the table as they are run, so it is started where ``runs`` is. What has finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.pretrain_tables import tasks_table
from vmf_bench.json_text import json_text
from vmf_pretrain.cli import DONE, main
from vmf_pretrain.evaluation.result import RESULT

DIGITS, PICTURES, FOLDERS = "runs/digits", "runs/pictures/run", "runs/pictures"
SHOWN = 3  # figures of a task in the table
RESULTS = Path("runs/tasks")


@dataclass(frozen=True)
class Planned:
    """One command.

    Attributes:
        task: its name.
        run: that is evaluated.
        options: on top.
    """

    task: str
    run: str
    options: str = ""

    @property
    def command(self) -> str:
        """As a person types it."""
        return f"vmf-pretrain eval {self.run} --task {self.task} {self.options}".rstrip()


PLAN = (
    Planned("knn", DIGITS),
    Planned("linear", DIGITS, "--linear.iterations 1000"),
    Planned("few_shot", DIGITS),
    Planned("transfer", DIGITS, "--transfer.metric mean_per_class"),
    Planned(
        "finetune",
        DIGITS,
        "--finetune.epochs 6 --finetune.warmup_epochs 1 --finetune.batch_size 64 --finetune.workers 0",
    ),
    Planned("prototypes", DIGITS),
    Planned("neighbours", DIGITS),
    Planned("pca", DIGITS),
    Planned("attention", PICTURES, f"--data {FOLDERS}/masks/val/images --attention.masks {FOLDERS}/masks/val/masks"),
    Planned("retrieval", PICTURES, f"--data {FOLDERS}/classes/test --retrieval.size 48 --retrieval.patch 8"),
    Planned(
        "copies", PICTURES, f'--data {FOLDERS}/classes/test --copies.size 48 --copies.made "[jpegqual/10, crops/50]"'
    ),
    Planned("video", PICTURES, f"--data {FOLDERS}/video"),
    Planned("dense", PICTURES, f"--data {FOLDERS}/masks"),
)


def printed(figure: Mapping[str, Any]) -> str:
    """A figure with its interval."""
    unit = f" {figure['unit']}" if figure["unit"] else ""
    value = f"{figure['value']:.1f}{unit}" if unit else f"{figure['value']:.3g}"
    between = "" if figure["low"] is None else f" ({figure['low']:.1f} to {figure['high']:.1f})"
    return f"{figure['name']}: {value}{between}"


def evaluated(planned: Planned, out: Path) -> dict[str, Any]:
    """A row: the task, its command, and its first figures.

    Raises:
        SystemExit: the task could not be done; it has said why.
    """
    words = shlex.split(planned.command)[1:]
    folder = out / planned.task
    if main([*words, "--out", str(folder)]) != DONE:
        raise SystemExit(f"{planned.command} has failed")
    (found,) = sorted(folder.glob(f"{planned.task}-*/{RESULT}"), key=lambda path: path.stat().st_mtime)[-1:]
    figures = json.loads(found.read_text())["figures"]
    return {"task": planned.task, "command": planned.command, "printed": [printed(one) for one in figures[:SHOWN]]}


def command_line(argv: Sequence[str] | None = None) -> None:
    """Run every command and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.pretrain_tasks", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the rows are written")
    parser.add_argument("--only", nargs="*", help="names of tasks")
    chosen = parser.parse_args(argv)
    from vmf_bench.machine import machine  # here, as it imports torch: a wrong option is answered before that

    rows = [evaluated(one, RESULTS) for one in PLAN if not chosen.only or one.task in chosen.only]
    chosen.json.write_text(json_text({"machine": machine(), "rows": rows}))
    print(tasks_table({"rows": rows}))


if __name__ == "__main__":
    command_line()
