"""The numbers at the end of a run, and what they mean."""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vmf_pretrain.config.data import BUNDLED
from vmf_pretrain.config.run import Config


def comparison(figures: Mapping[str, Any]) -> str:
    """Whether the log and the summary agree about the mutual information, in words."""
    if figures["mutual_information_agrees"] is None:
        return "Log and summary were not compared: too few batches were logged, or too few images judged."
    logged, tolerance = figures["mutual_information_logged"], figures["mutual_information_tolerance"]
    low, high = sorted(figures["mutual_information_judged"])
    said = f"{logged:.2f} nats in the last training batches, {low:.2f} to {high:.2f} in batches as large of the images judged"
    if figures["mutual_information_agrees"]:
        return f"Log and summary agree on the mutual information: {said}."
    return (
        f"LOG AND SUMMARY DISAGREE on the mutual information: {said}, and batches differ by {tolerance:.2f} at most. What is "
        "judged is not to the network what it was trained on, so distrust the figures above: train longer if batch "
        "normalisation has not settled, use milder views if they are unlike the images, and report it as a fault otherwise."
    )


def summary_text(figures: Mapping[str, Any]) -> str:
    """The contents of summary.json; numbers that are not finite become null."""
    plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in figures.items()}
    return json.dumps(plain, indent=2) + "\n"


def next_command(config: Config, folder: Path) -> str:
    """What to type after a run: the demo with the other loss, or what shows the curves of the run in ``folder``."""
    if config.data.kind in BUNDLED:
        other = "dino" if config.method == "dino-vmf" else "dino-vmf"
        data = "" if config.data.kind == BUNDLED[0] else f" --data {config.data.kind}"
        return f"vmf-pretrain demo{data} --method {other}"
    quoted = shlex.quote(str(folder))
    return f"tensorboard --logdir {quoted}" if config.log.tensorboard else f"ls {quoted}/plots"


def print_summary(
    console: Console, figures: Mapping[str, Any], prototypes: int, folder: Path, next_command: str
) -> None:
    """Print the table at the end of a run, the verdict, where the files are, and what to type next."""
    table = Table(
        title=f"{figures['method']}, seed {figures['seed']}, {figures['seconds']:.0f} s", title_justify="left"
    )
    table.add_column("frozen features, held-out images")
    table.add_column("k-NN %", justify="right")
    table.add_column("linear %", justify="right")
    rows = {"teacher": "", "same network, untrained": "_untrained", "raw pixels": "_pixels"}
    for name, which in rows.items():
        table.add_row(name, _percent(figures[f"knn{which}"]), _percent(figures[f"linear{which}"]))
    console.print(table)
    head = Table(title="head", title_justify="left", show_header=False)
    if figures["mutual_information"] is None:
        head.add_row("rank of the features (RankMe)", f"{figures['rankme']:.1f}")
    else:
        _add_head(head, figures, prototypes)
    console.print(head)
    _print_verdict(console, figures["verdict"])
    if figures["mutual_information"] is not None:
        console.print(comparison(figures), soft_wrap=True, highlight=False)
    if figures["bad_images"]:
        console.print(
            f"{figures['bad_images']} readings met an image that cannot be read, and another took its place: bad_files.jsonl.",
            soft_wrap=True,
            highlight=False,
        )
    console.print(
        f"Run folder: {folder} (summary.json, metrics.jsonl, plots/, weights/)",
        soft_wrap=True,
        markup=False,
    )
    console.print(f"Next: {next_command}", soft_wrap=True, highlight=False, markup=False)


def _print_verdict(console: Console, found: Mapping[str, Any]) -> None:
    """``Verdict.plain``: the words, then a line for each piece of evidence and each thing to try."""
    lines = [f"  {said}" for said in found["evidence"]] + [f"  Try: {tried}." for tried in found["advice"]]
    for line in (found["words"], *lines):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _add_head(head: Table, figures: Mapping[str, Any], prototypes: int) -> None:
    head.add_row("mutual information of images and prototypes", f"{figures['mutual_information']:.2f} nats")
    head.add_row("rank of the features (RankMe)", f"{figures['rankme']:.1f}")
    head.add_row("prototypes used (best for some image)", f"{figures['prototypes_used']} of {prototypes}")
    head.add_row("entropy of their usage", f"{figures['usage_entropy']:.2f} nats (ln K = {math.log(prototypes):.2f})")
    head.add_row("unique prototypes", f"{figures['unique_prototypes']} of {prototypes}")
    head.add_row("largest set of duplicates", f"{100 * figures['largest_duplicate_share']:.1f} % of the prototypes")


def _percent(value: float | None) -> str:
    return "no labels" if value is None else f"{value:.1f}"
