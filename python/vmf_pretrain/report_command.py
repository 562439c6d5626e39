"""The sub-command ``vmf-pretrain report``."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.paths import expanded
from vmf_pretrain.storage.run_folder import RunFolder

NAME = "report"
FILE = "report.html"


@dataclass(frozen=True)
class Ask:
    """What a person asked for.

    Attributes:
        runs: their folders.
        out: the file; None takes ``report.html`` in the run's folder, or in the folder that several runs are in.
        pictures: whether pictures are drawn where there are none of the newest weights.
        allow_code: whether the settings of a run may name modules to import.
    """

    runs: Sequence[Path]
    out: Path | None = None
    pictures: bool = True
    allow_code: bool = False


def add_report(commands: Any) -> None:
    """Add the sub-command's options to argparse's sub-commands."""
    command = commands.add_parser(
        NAME, help="write a page on a run, or on several side by side: one file of HTML", allow_abbrev=False
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    command.add_argument("--out", type=Path, metavar="FILE", help=f"page to write (default: RUN/{FILE})")
    command.add_argument("--no-pictures", action="store_true", help="use the pictures that there are, and draw none")
    command.add_argument("--allow-code", action="store_true", help="let the settings of a run name modules to import")


def ask_of(chosen: argparse.Namespace) -> Ask:
    """What the command line asks for."""
    out = None if chosen.out is None else expanded(chosen.out, "--out")
    runs = [expanded(run, "RUN") for run in chosen.runs]
    return Ask(runs, out, not chosen.no_pictures, chosen.allow_code)


def run_report(ask: Ask) -> Path:
    """Write the page and say where it is.

    Raises:
        PretrainError: a folder is none of a run, or the page cannot be written. Pictures that cannot be drawn are said, on
            stderr and in the page.
    """
    from vmf_pretrain.report.page.page import write_page
    from vmf_pretrain.report.page.run_data import read_runs

    read_runs(ask.runs)  # before anything slow
    undrawn = "" if not ask.pictures else " ".join(filter(None, (_draw(run, ask.allow_code) for run in ask.runs)))
    out = ask.out or _default(ask.runs)
    try:
        write_page(ask.runs, out, undrawn=undrawn)
    except OSError as error:
        raise PretrainError(f"{out} cannot be written: {error.strerror or error}.") from None
    print(f"Report: {out}")
    return out


def _default(runs: Sequence[Path]) -> Path:
    if len(runs) == 1:
        return RunFolder(runs[0]).report
    return Path(os.path.commonpath([run.absolute().parent for run in runs])) / FILE


def _draw(run: Path, allow_code: bool) -> str:
    """Draw the pictures of a run, unless they are of its newest weights; why they could not be drawn, or nothing."""
    folder = RunFolder(run)
    if _newest(folder):
        return ""
    from vmf_pretrain.report.gallery import draw_gallery

    try:
        draw_gallery(run, folder.pictures, allow_code=allow_code)
    except (PretrainError, OSError) as error:
        said = f"Pictures of {run} could not be drawn: {error}"
        print(said, file=sys.stderr)
        return said
    return ""


def _newest(folder: RunFolder) -> bool:
    """Whether all pictures that there are were drawn after the newest weights; the last one to be drawn is among them."""
    drawn = [path.stat().st_mtime for path in folder.pictures.glob("*.png")]
    weights = folder.weights / "last.safetensors"
    if not (folder.pictures / "neighbours.png").is_file() or not weights.is_file():
        return False
    return min(drawn) >= weights.stat().st_mtime
