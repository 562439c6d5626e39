"""The sections of figures over time: losses, features, prototypes, speed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from vmf_pretrain.report.page import chart, heat
from vmf_pretrain.report.page.chart import Band, Chart, Line
from vmf_pretrain.report.page.heat import Heat
from vmf_pretrain.report.page.markup import Html, number, text
from vmf_pretrain.report.page.panels import (
    PANELS,
    SCHEDULES,
    STEP,
    accuracy_keys,
    charts_of,
    lines_of,
    memory_keys,
    other_keys,
    plain_chart,
)
from vmf_pretrain.report.page.run_data import RunData

Runs = Sequence[RunData]

LEAST_SHARE = 1e-5  # of the largest singular value that is drawn: below it is what fp32 features have by rounding
SPECTRA = 4  # evaluations whose singular values are drawn
BASELINES = {"knn_untrained": "the same network, untrained", "knn_pixels": "raw pixels"}


def curves(runs: Runs) -> Html:
    """Losses and their parts, the schedules, and figures that no other section has."""
    rates = [plain_chart(key, runs) for key in SCHEDULES if any(run.last(key) is not None for run in runs)]
    others = [plain_chart(key, runs) for key in other_keys(runs)]
    folded = _folded("Schedules", rates) + _folded("Other logged figures", others)
    return Html(_grid(_panels("curves", runs)) + folded)


def features(runs: Runs) -> Html:
    """Accuracies, ranks and singular values over time."""
    return _grid([*_accuracies(runs), *_ranks(runs), *_panels("features", runs), *_spectra(runs)])


def prototypes(runs: Runs) -> Html:
    """How the prototypes are used, and how concentrated they are, over time."""
    parts = _panels("prototypes", runs)
    for key, title in (("usage", "Use of the prototypes"), ("kappa", "Concentrations kappa of the prototypes")):
        found = [_histograms(run, key, title, several=len(runs) > 1) for run in runs]
        drawn = [one for one in found if one is not None]
        parts += drawn or [
            absent(f"{title}: no histogram was logged; the method has no prototypes, or none was evaluated.")
        ]
    return _grid(parts)


def speed(runs: Runs) -> Html:
    """Images a second, waiting for data, memory, and the time in all."""
    memory = [chart.drawn(plain_chart(key, runs)) for key in memory_keys(runs)]
    memory = memory or [absent("No memory was logged.")]
    return Html("".join(map(_time, runs)) + _grid([*_panels("speed", runs), *memory]))


def absent(sentence: str) -> Html:
    """What stands in place of a figure that there is not."""
    return Html(f'<p class="absent">{text(sentence)}</p>')


def _time(run: RunData) -> str:
    """How long it took, in a sentence."""
    seconds = (run.summary or {}).get("seconds") or run.last("seconds")
    if not isinstance(seconds, int | float) or run.config is None:
        return ""
    seen = run.step * run.config.data.batch_size
    said = f"{run.name}: {run.step:,} steps, {seen:,} images seen, {_duration(seconds)}."
    return f"<p>{text(said)}</p>"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s" if minutes else f"{seconds:.1f} s"


def _panels(section: str, runs: Runs) -> list[Html]:
    parts: list[Html] = []
    for panel in PANELS:
        if panel.section != section:
            continue
        charts = charts_of(panel, runs)
        parts += map(chart.drawn, charts)
        if not charts and panel.absent:
            parts.append(absent(panel.absent))
    return parts


def _accuracies(runs: Runs) -> Iterator[Html]:
    """k-NN with what needs no training, and the other protocols."""
    keys = accuracy_keys(runs)
    if not any(run.last(key) is not None for run in runs for key in keys):
        yield absent("No accuracy was measured: the images have no classes, or there was no evaluation yet.")
        return
    for key in keys:
        lines = lines_of(key, runs) if len(runs) > 1 else [Line("this run", runs[0].series(key))]
        if lines and any(run.last(key) is not None for run in runs):
            bands = _baselines(runs[0]) if key == "knn" and len(runs) == 1 else []
            yield chart.drawn(Chart(f"{_called(key)} on held-out images", STEP, "percent", lines, bands))


def _called(key: str) -> str:
    kind, _, place = key.partition("/")
    names = {"knn": "k-NN accuracy", "linear": "Linear accuracy", "few_shot": "Few-shot accuracy"}
    return names[kind] + (f" ({place})" if place else "")


def _baselines(run: RunData) -> list[Band]:
    known = {label: (run.summary or {}).get(key) for key, label in BASELINES.items()}
    first = run.series("knn")[:1]
    if known[BASELINES["knn_untrained"]] is None and first and first[0][0] == 0:
        known[BASELINES["knn_untrained"]] = first[0][1]
    return [
        Band(value, value, f"{label}: {number(value)}")
        for label, value in known.items()
        if isinstance(value, int | float)
    ]


def _ranks(runs: Runs) -> Iterator[Html]:
    lines = []
    for place, run in enumerate(runs):
        points = [(found["step"], found["rankme"]) for found in run.histograms if _is_number(found.get("rankme"))]
        if points:
            lines.append(Line(run.name if len(runs) > 1 else "RankMe", points, place))
    if not lines:
        yield absent("The rank of the features over time was not logged.")
        return
    note = "Effective rank of the features of up to 2,048 training images, at each evaluation."
    yield chart.drawn(Chart("Rank of the features, evaluated", STEP, "dimensions", lines, [Band(1.0, 1.0, "1")], note))


def _spectra(runs: Runs) -> Iterator[Html]:
    """Singular values: of one run at a few evaluations, of several at the last one."""
    lines: list[Line] = []
    for place, run in enumerate(runs):
        known = [found for found in run.histograms if _has_values(found.get("singular_values"))]
        some = known[-1:] if len(runs) > 1 else [known[chosen] for chosen in _spread(len(known), SPECTRA)]
        for found in some:
            values = found["singular_values"]
            pairs = zip(values["ranks"], values["values"], strict=False)
            points = [(rank, value if value >= LEAST_SHARE else None) for rank, value in pairs]
            called, colour = (run.name, place) if len(runs) > 1 else (f"step {found['step']:,}", len(lines))
            lines.append(Line(called, points, colour))
    if not lines:
        yield absent("Singular values of the features were not logged.")
        return
    note = "As shares of the largest; the sooner they fall, the fewer directions the features use."
    title = "Singular values of the features"
    yield chart.drawn(Chart(title, "rank of the singular value", "share of the largest", lines, (), note, True, True))


def _histograms(run: RunData, key: str, title: str, *, several: bool) -> Html | None:
    columns = [(found["step"], found[key]) for found in run.histograms if _has_bins(found.get(key))]
    if not columns:
        return None
    called = f"{title}: {run.name}" if several else title
    if key == "kappa":
        note = "Norm over temperature, of each prototype; a column is an evaluation, the darker the more prototypes."
        return heat.drawn(Heat(called, "kappa", columns, None, note))
    dead = columns[-1][1].get("below", 0)
    note = (
        "Mean probability times their number; a column is an evaluation, the darker the more prototypes. "
        f"{dead:,} are used less than a ten-thousandth of uniform at the last one, and not drawn."
    )
    return heat.drawn(Heat(called, "mean probability times K", columns, (1.0, "1 = uniform use"), note))


def _has_bins(found: Any) -> bool:
    """Whether a record is a histogram that can be drawn."""
    if not isinstance(found, Mapping) or not found.get("counts"):
        return False
    low, high = found.get("low"), found.get("high")
    return _is_number(low) and _is_number(high) and 0 < low < high and max(found["counts"]) > 0


def _has_values(found: Any) -> bool:
    return (
        isinstance(found, Mapping) and bool(found.get("ranks")) and any(value > 0 for value in found.get("values", ()))
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _spread(count: int, shown: int) -> list[int]:
    """Places of at most ``shown`` of ``count``, the first and the last among them."""
    if count <= shown:
        return list(range(count))
    return [round(place * (count - 1) / (shown - 1)) for place in range(shown)]


def _grid(parts: Sequence[Html]) -> Html:
    said = [part for part in parts if part.startswith("<p")]
    drawn = [part for part in parts if not part.startswith("<p")]
    grid = f'<div class="grid">{"".join(drawn)}</div>' if drawn else ""
    return Html(grid + "".join(said))


def _folded(title: str, charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    return f"<details><summary>{text(title)}</summary>{_grid([chart.drawn(one) for one in charts])}</details>"
