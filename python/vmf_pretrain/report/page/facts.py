"""The sections that are no curves: figures at the end, evaluations, data, machine, command and settings."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vmf_pretrain.report.page.curves import absent
from vmf_pretrain.report.page.markup import Html, csv_link, name, number, table, text, text_link
from vmf_pretrain.report.page.pictures import views
from vmf_pretrain.report.page.run_data import RunData

Runs = Sequence[RunData]

SHOWN = 20  # rows of a list; the whole is in the file and in the CSV
WAYS = {"": "this run", "_untrained": "same network, untrained", "_pixels": "raw pixels"}
HEAD = {
    "best_knn": ("best k-NN during the run", "%"),
    "mutual_information": ("mutual information of images and prototypes", "nats"),
    "teacher_entropy": ("mean entropy of an image's assignment", "nats"),
    "usage_entropy": ("entropy of the prototypes' use", "nats"),
    "rankme": ("rank of the features (RankMe)", "dimensions"),
    "prototypes_used": ("prototypes used (best for some image)", ""),
    "unique_prototypes": ("unique prototypes", ""),
    "largest_duplicate_share": ("largest set of duplicates", "% of the prototypes"),
    "bad_images": ("readings that met an image that cannot be read", ""),
    "steps": ("steps", ""),
    "seconds": ("wall time", "s"),
}


def figures(runs: Runs) -> Html:
    """What summary.json has: of one run accuracies and the rest, of several side by side."""
    known = [run for run in runs if run.summary is not None]
    parts = [
        absent(f"{run.name} has no summary.json: it is written at the end of a run.")
        for run in runs
        if run not in known
    ]
    if len(runs) == 1 and known:
        rows = [
            [label, *(_percent(known[0], f"{which}{way}") for which in ("knn", "linear"))]
            for way, label in WAYS.items()
        ]
        parts.append(table(["frozen features", "k-NN %", "linear %"], rows, "Accuracy on held-out images"))
    if not known:
        return Html("".join(parts))
    head, rows = _side_by_side(known, alone=len(runs) == 1)
    parts.append(table(head, rows, "Figures at the end (summary.json)"))
    return Html(f'<div class="tables">{"".join(parts)}</div><p class="below">{csv_link("figures.csv", head, rows)}</p>')


def evaluations(runs: Runs) -> Html:
    """Results of ``vmf-pretrain eval``."""
    parts: list[Html] = []
    for run in runs:
        found = sorted(run.folder.path.glob("evaluation/*/result.json"))
        if found:
            from vmf_pretrain.evaluation.result import read_result  # here, for it imports matplotlib

            results = [(path.parent.name, read_result(path.parent)) for path in found]
            parts += [_evaluation(run, task, result) for task, result in results if result is not None]
    return Html("".join(parts)) or absent("None was made; vmf-pretrain eval RUN --task knn,linear makes some.")


def data(runs: Runs) -> Html:
    """How many images there were, which could not be read, and how they are seen."""
    parts: list[str] = []
    for run in runs:
        parts.append(f"<h3>{name(run.name)}</h3>" if len(runs) > 1 else "")
        parts += [_counts(run), _bad(run), _skipped(run), views(run, several=len(runs) > 1)]
    return Html("".join(parts))


def surroundings(runs: Runs) -> Html:
    """Each start of each run: the command, when, on what, with which versions."""
    parts: list[str] = []
    for run in runs:
        parts.append(f"<h3>{name(run.name)}</h3>" if len(runs) > 1 else "")
        parts += list(_starts(run)) or [absent("The command and the machine were not written down.")]
    return Html("".join(parts))


def settings(runs: Runs) -> Html:
    """config.yaml of each run, and what differs."""
    parts = [_differing(runs)] if len(runs) > 1 else []
    for run in runs:
        title = f"config.yaml of {run.name}" if len(runs) > 1 else "config.yaml"
        unfit = absent(f"This version does not read these settings: {run.unfit}") if run.unfit else ""
        save = text_link(f"{run.name}-config.yaml", run.text, "save config.yaml")
        opened = " open" if len(runs) == 1 else ""
        parts.append(
            Html(
                f"{unfit}<details{opened}><summary>{text(title)}</summary><pre tabindex='0'>{text(run.text)}</pre></details>"
            )
        )
        parts.append(Html(f'<p class="below">{save}</p>'))
    return Html("".join(parts))


def _percent(run: RunData, key: str) -> str:
    value = (run.summary or {}).get(key)
    return f"{value:.1f}" if _known(value) else "no labels"


def _side_by_side(runs: Runs, *, alone: bool) -> tuple[list[str], list[list[str]]]:
    """Titles, and a row for each figure with a column for each run."""
    accuracies = {} if alone else {f"{which}{way}": f"{title}, {label}" for which, title in
        (("knn", "k-NN %"), ("linear", "linear %")) for way, label in WAYS.items()}  # fmt: skip
    rows: list[list[str]] = [[label, *(_percent(run, key) for run in runs)] for key, label in accuracies.items()]
    for key, (label, unit) in HEAD.items():
        values = [(run.summary or {}).get(key) for run in runs]
        if any(map(_known, values)):
            scale = 100 if key == "largest_duplicate_share" else 1
            percent = unit == "%"
            cells = [
                f"{value:.1f}" if percent and _known(value) else number(value and value * scale) for value in values
            ]
            rows.append([f"{label}, {unit}" if unit else label, *cells])
    return ["figure", *(["at the end"] if alone else [run.name for run in runs])], rows


def _evaluation(run: RunData, task: str, result: Any) -> Html:
    rows = [
        [one.name, number(one.value), one.unit, "" if one.low is None else f"{number(one.low)} to {number(one.high)}"]
        for one in result.figures
    ]
    notes = "".join(f"<li>{text(note)}</li>" for note in result.notes)
    shown = table(["figure", "value", "unit", "95 % interval"], rows, f"{run.name}: {task}")
    return Html(shown + (f"<ul>{notes}</ul>" if notes else ""))


def _counts(run: RunData) -> Html:
    found = next((start["images"] for start in reversed(run.starts) if isinstance(start.get("images"), Mapping)), None)
    if found is None:
        return absent("How many images were found was not written down.")
    skipped = [[f"skipped: {kind}", count] for kind, count in dict(found.get("skipped") or {}).items() if count]
    rows = [
        ["images", found.get("images")],
        ["held out for evaluation", found.get("held_out")],
        ["classes", found.get("classes") or "none"],
        *skipped,
    ]
    notes = "".join(f"<p>{text(note)}</p>" for note in found.get("notes") or ())
    return Html(table(["what", "count"], rows, f"Images in {found.get('where')}") + notes)


def _bad(run: RunData) -> Html:
    if not run.bad:
        return Html("<p>Every image that was read could be read.</p>" if run.step else "")
    names = Counter(str(record.get("name")) for record in run.bad)
    reasons = {str(record.get("name")): str(record.get("reason")) for record in run.bad}
    rows = [[name(file), count, reasons[file]] for file, count in names.most_common(SHOWN)]
    said = f"Images that could not be read: {len(names):,}; another image took the place of each"
    shown = table(["file", "times", "reason"], rows, said, numbers=False)
    save = csv_link("bad-files.csv", ["file", "times", "reason"], [[f, n, reasons[f]] for f, n in names.items()])
    more = f"<p>{len(names) - SHOWN:,} more are in bad_files.jsonl.</p>" if len(names) > SHOWN else ""
    return Html(f'{shown}{more}<p class="below">{save}</p>')


def _skipped(run: RunData) -> Html:
    if not run.skipped:
        return Html("")
    rows = [
        [number(record.get("step")), str(record.get("what")), ", ".join(map(str, list(record.get("images") or ())[:3]))]
        for record in run.skipped[-SHOWN:]
    ]
    said = f"Steps skipped because a number was not finite: {len(run.skipped):,}"
    return table(["step", "what", "first images"], rows, said, numbers=False)


def _starts(run: RunData) -> Iterator[Html]:
    for place, start in enumerate(run.starts):
        known = {key: value for key, value in start.items() if key not in ("event", "images", "command")}
        versions = known.pop("versions", None)
        if isinstance(versions, Mapping):
            known["versions"] = ", ".join(f"{key} {value}" for key, value in versions.items())
        rows = "".join(f"<dt>{text(key)}</dt><dd>{text(_words(value))}</dd>" for key, value in known.items())
        title = "Start" if place == 0 else f"Went on, start {place + 1}"
        opened = " open" if place == len(run.starts) - 1 else ""
        yield Html(
            f"<details{opened}><summary>{title} at step {text(number(start.get('step')))}</summary>"
            f"<pre class='command' tabindex='0'>{text(start.get('command'))}</pre><dl>{rows}</dl></details>"
        )


def _words(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _differing(runs: Runs) -> Html:
    values = [run.settings for run in runs]
    keys = dict.fromkeys(key for found in values for key in found)
    rows = [
        [key, *(str(found.get(key, "-")) for found in values)]
        for key in keys
        if any(found.get(key) != values[0].get(key) for found in values)
    ]
    if not rows:
        return absent("The settings of these runs do not differ.")
    head = ["setting", *(run.name for run in runs)]
    save = csv_link("settings.csv", head, rows)
    return Html(table(head, rows, "Settings that differ", numbers=False) + f'<p class="below">{save}</p>')


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
