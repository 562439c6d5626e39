"""Tables of ``bench.pretrain_methods``, medians over seeds with their range, and of ``bench.pretrain_tasks``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vmf_pretrain.report.bands import DEAD_INFORMATION

Run = Mapping[str, Any]
PATCH_HEADS = ("ibot", "dinov2")
METHOD_COLUMNS = (
    "| method | seeds | k-NN % | untrained | raw pixels | linear % | untrained | raw pixels | its own figure | bounds "
    "| minutes |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
NORM_COLUMNS = (
    "| prototypes | variant | k-NN % | MI nats | used | unique | largest set of duplicates | norms at the end: least, median, "
    "largest | collapsed |\n"
    "|---|---|---|---|---|---|---|---|---|"
)

TASK_COLUMNS = "| task | command | what it printed first |\n|---|---|---|"


class Bound(NamedTuple):
    """What a method has to reach on digits, in points of accuracy at the median.

    Attributes:
        figure: the accuracy of the evaluated network.
        rival: the accuracy that it is compared with.
        points: how much better it has to be.
    """

    figure: str
    rival: str
    points: float


ASSIGNING = (Bound("knn", "knn_untrained", 20), Bound("knn", "knn_pixels", 8))
PREDICTING = (Bound("linear", "linear_untrained", 10),)
BOUNDS = {"mae": PREDICTING, "ijepa": PREDICTING}  # all others are ASSIGNING
BOUND_DATA = "digits"


def methods_table(results: Mapping[str, Any]) -> str:
    """A table for each kind of images, below the machine and how many runs there are."""
    runs = results["runs"]
    lines = [_heading(results)]
    for data in dict.fromkeys(run["data"] for run in runs):
        lines += ["", f"{data.capitalize()}:", "", METHOD_COLUMNS]
        for name, mine in groups(run for run in runs if run["data"] == data):
            accuracies = [_spread(mine, key) for key in ("knn", "knn_untrained", "knn_pixels")]
            accuracies += [_spread(mine, key) for key in ("linear", "linear_untrained", "linear_pixels")]
            minutes = f"{statistics.median(run['seconds'] for run in mine) / 60:.0f}"
            cells = [name, str(len(mine)), *accuracies, own_figure(name, mine), _bounds(name, data, mine), minutes]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tasks_table(results: Mapping[str, Any]) -> str:
    """A row for each task of ``bench.pretrain_tasks``."""
    lines = [TASK_COLUMNS]
    for row in results["rows"]:
        lines.append(f"| {row['task']} | `{row['command']}` | {'; '.join(row['printed'])} |")
    return "\n".join(lines)


def own_figure(name: str, runs: Sequence[Run]) -> str:
    """The figures by which a method itself says whether it has learned."""
    if name == "mae":
        return f"error {_own(runs, 'relative_loss')} of that of the mean patch"
    if name == "ijepa":
        loss, variance = _own(runs, "relative_loss"), _own(runs, "image_variance")
        return f"loss {loss} of a constant's, variance over images {variance}"
    used = f"{_spread(runs, 'prototypes_used', '.0f')} of {runs[0]['prototypes']} used"
    text = f"MI {_spread(runs, 'mutual_information', '.2f')} nats, {used}"
    if name.startswith(PATCH_HEADS):
        accuracy, information = _own(runs, "masked_patch_accuracy"), _own(runs, "patch_mutual_information")
        text += f"; masked patches: accuracy {accuracy}, MI {information} nats"
    return text


def norms_table(results: Mapping[str, Any]) -> str:
    """One row for each number of prototypes and variant."""
    lines = [_heading(results), "", NORM_COLUMNS]
    for prototypes in sorted({run["prototypes"] for run in results["runs"]}):
        for name, mine in groups(run for run in results["runs"] if run["prototypes"] == prototypes):
            shares = _range([100 * run["largest_duplicate_share"] for run in mine], ".1f")
            ends = ", ".join(_range([run["norms"][-1][place] for run in mine], ".2f") for place in (1, 2, 3))
            cells = [f"{prototypes:,}", name, _spread(mine, "knn"), _spread(mine, "mutual_information", ".2f")]
            cells += [_spread(mine, key, ",.0f") for key in ("prototypes_used", "unique_prototypes")]
            cells += [f"{shares} %", ends, f"{sum(map(collapsed, mine))} of {len(mine)}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def collapsed(run: Run) -> bool:
    """Whether prototypes say nothing about an image, by the trainer's own bound."""
    return bool(run["mutual_information"] < DEAD_INFORMATION)


def groups(runs: Iterable[Run]) -> list[tuple[str, list[Run]]]:
    """Runs by name, in the order of the first of each."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["name"], []).append(run)
    return list(found.items())


def _bounds(name: str, data: str, runs: Sequence[Run]) -> str:
    """For each bound by how many points it was met or missed at the median; nothing where none is set."""
    if data != BOUND_DATA:
        return ""
    said = []
    for bound in BOUNDS.get(name, ASSIGNING):
        gain = statistics.median(run[bound.figure] - run[bound.rival] for run in runs)
        rival = "pixels" if bound.rival.endswith("pixels") else "untrained"
        verdict = "met" if gain >= bound.points else "missed"
        said.append(f"{gain:+.1f} over {rival} ({verdict}: {bound.points})")
    return ", ".join(said)


def _spread(runs: Sequence[Run], key: str, form: str = ".1f") -> str:
    return _range([run[key] for run in runs], form)


def _own(runs: Sequence[Run], key: str) -> str:
    return _range([run["own"].get(key) for run in runs], ".2f")


def _range(values: Sequence[float | None], form: str) -> str:
    """The median, with the lowest and the highest where they differ; a dash where a run has none."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    middle, low, high = (format(value, form) for value in (statistics.median(known), min(known), max(known)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _heading(results: Mapping[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    part = f"{machine['cpu']} (family/model {machine['cpu_family_and_model']}), a thread for each run"
    done = f"{len(results['runs'])} of {results['planned']} runs"
    return f"{part}; torch {machine['torch']}, {packages}; {done}. Medians over seeds (lowest to highest)."
