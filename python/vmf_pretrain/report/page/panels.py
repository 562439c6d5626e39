"""Which logged figures make a chart, in which section and with which words; of one run together, of several one by one."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vmf_pretrain.config.run import Config
from vmf_pretrain.report.bands import bands
from vmf_pretrain.report.page.chart import Band, Chart, Line
from vmf_pretrain.report.page.run_data import RunData

BAND = 0.025  # half-height of a band of collapse, as a share of ln K
STEP = "optimizer step"
TOO_MUCH = 0.2  # of the time in waiting for data: that of data/waiting.py, whose room imports torchvision
FAR = 2.0  # times the highest value: a band that begins there or later is not drawn
OPEN = 1.1  # the upper end of an open band, over its lower one, where no value lies above that
WIDE = 100.0  # ratio of the largest to the smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Panel:
    """Figures of one unit that are read together.

    Attributes:
        section: of the page.
        title: of the chart.
        unit: of the figures.
        keys: names in metrics.jsonl, and what people call them.
        note: a sentence on how to read it.
        bands: which bands it has beside those by which a run is judged: a key of ``ENTROPIES`` or ``FIXED``.
        wide: whether the axis is logarithmic if the values spread widely.
        absent: what is said if no run has any of them; nothing is said of panels that only some methods have.
    """

    section: str
    title: str
    unit: str
    keys: dict[str, str]
    note: str = ""
    bands: str = ""
    wide: bool = False
    absent: str = ""


PANELS = (
    Panel(
        "curves",
        "Loss and its parts",
        "nats or error",
        {"loss": "loss", "teacher_entropy": "teacher entropy H(q)", "kl": "KL(q || p)"},
        "Of methods with prototypes the loss is H(q) + KL; H(q) of a collapsed head ends in or near a band. The verdict goes "
        "by mutual information and the prototypes in use.",
        "entropy",
        absent="No step has been logged, so there is no loss.",
    ),
    Panel(
        "curves",
        "Mutual information of images and prototypes",
        "nats",
        {"mutual_information": "class token", "patch_mutual_information": "patches"},
        "What a prototype tells about an image; near 0 the head has collapsed.",
        absent="No mutual information was logged: the method has no prototypes, or no step was logged.",
    ),
    Panel(
        "curves",
        "Losses of class token and patches",
        "nats",
        {"class_loss": "class token", "patch_loss": "patches"},
    ),
    Panel(
        "curves",
        "Parts of the patches' loss",
        "nats",
        {"patch_teacher_entropy": "teacher entropy H(q)", "patch_kl": "KL(q || p)"},
        bands="patch entropy",
    ),
    Panel(
        "curves",
        "Loss as a share of what a constant prediction has",
        "share",
        {"relative_loss": "loss / loss of the mean"},
        "1 has learned nothing, 0 predicts everything.",
        "nothing learned",
        wide=True,
    ),
    Panel(
        "curves",
        "Masked patches whose prototype the student names",
        "share",
        {"masked_patch_accuracy": "right"},
    ),
    Panel("curves", "KoLeo", "nats", {"koleo": "KoLeo"}, "Minus the mean log distance to the nearest feature."),
    Panel(
        "curves",
        "Norm of the gradient",
        "norm",
        {"gradient_norm": "before clipping"},
        "Rising a hundredfold: the run diverges.",
        wide=True,
        absent="No norm of the gradient was logged.",
    ),
    Panel(
        "features",
        "Rank of the features",
        "dimensions",
        {"feature_rank": "of a training batch"},
        "Participation ratio of the covariance: how many directions the features of a batch differ in.",
    ),
    Panel(
        "features",
        "Variance of the features",
        "share of their size",
        {
            "feature_variance": "features",
            "target_variance": "target tokens",
            "predicted_variance": "predicted tokens",
            "image_variance": "images' means",
        },
        "Near 0 all are alike.",
        wide=True,
    ),
    Panel(
        "prototypes",
        "Prototypes in use",
        "prototypes",
        {"prototypes_in_use": "exp of the entropy of use"},
        "In a training batch: 1 after a one-hot collapse, all of them after a uniform one.",
    ),
    Panel(
        "prototypes",
        "Prototypes in use by masked patches",
        "prototypes",
        {"patch_prototypes_in_use": "exp of the entropy of use"},
    ),
    Panel(
        "prototypes",
        "Share of the prototype that is used most",
        "share",
        {"largest_share": "largest share"},
    ),
    Panel(
        "prototypes",
        "Norms of the prototypes",
        "norm",
        {"least_norm": "least", "median_norm": "median", "largest_norm": "largest"},
        "Divided by the temperature they are the concentrations kappa.",
        wide=True,
    ),
    Panel(
        "speed",
        "Images a second",
        "images / s",
        {"images_per_second": "images / s"},
        absent="No speed was logged.",
    ),
    Panel(
        "speed",
        "Share of the time spent waiting for data",
        "share",
        {"data_wait": "data wait"},
        f"Above {TOO_MUCH} it is worth doing something: data.workers, data.cache, fewer local views.",
        "waiting",
        absent="No waiting for data was logged.",
    ),
)
ENTROPIES = {
    "entropy": "teacher_entropy",
    "patch entropy": "patch_teacher_entropy",
}  # bands: the figure that they are of
FIXED = {
    "nothing learned": (Band(1.0, 1.0, "1 = nothing learned"),),
    "waiting": (Band(TOO_MUCH, TOO_MUCH, f"too much: {TOO_MUCH}"),),
}
SCHEDULES = ("learning_rate", "weight_decay", "teacher_momentum", "teacher_temperature", "patch_teacher_temperature")
KNOWN = {key for panel in PANELS for key in panel.keys}
NEVER = {"step", "epoch", "seconds", "total", "student_entropy", "patch_student_entropy"}


def charts_of(panel: Panel, runs: Sequence[RunData]) -> list[Chart]:
    """Of one run all figures of a panel in a chart; of several a chart for each figure, with a line for each run."""
    logged = [key for key in panel.keys if any(run.last(key) is not None for run in runs)]
    if not logged:
        return []
    if len(runs) == 1:
        lines = [Line(panel.keys[key], runs[0].series(key)) for key in logged]
        return [_chart(panel, panel.title, logged, lines, runs)]
    alone = len(panel.keys) == 1
    titles = {key: panel.title if alone else f"{panel.title}: {panel.keys[key]}" for key in logged}
    # the parts of the loss share its bands
    shared = {key: list(panel.keys) if panel.bands in ENTROPIES else [key] for key in logged}
    return [_chart(panel, titles[key], shared[key], lines_of(key, runs), runs) for key in logged]


def lines_of(key: str, runs: Sequence[RunData]) -> list[Line]:
    """A figure's line for each run that has it."""
    return [Line(run.name, run.series(key), place) for place, run in enumerate(runs) if run.last(key) is not None]


def memory_keys(runs: Sequence[RunData]) -> list[str]:
    """Figures of memory, whatever they are called: their names say the unit."""
    return sorted({key for run in runs for record in run.records for key in record if "memory" in key or "_mib" in key})


def other_keys(runs: Sequence[RunData]) -> list[str]:
    """Figures of training steps that no other chart has, such as those of a method of one's own."""
    taken = KNOWN | NEVER | {*SCHEDULES, *memory_keys(runs), *accuracy_keys(runs)}
    found = dict.fromkeys(key for run in runs for record in run.records for key in record)
    return [key for key in found if key not in taken and any(run.last(key) is not None for run in runs)]


def accuracy_keys(runs: Sequence[RunData]) -> list[str]:
    """Accuracies of evaluations during training, percent: of the run's own images, and of other sets."""
    found = dict.fromkeys(key for run in runs for record in run.records for key in record)
    return [key for key in found if key.partition("/")[0] in ("knn", "linear", "few_shot")]


def plain_chart(key: str, runs: Sequence[RunData]) -> Chart:
    """A figure under its own name."""
    lines = lines_of(key, runs) if len(runs) > 1 else [Line(key, runs[0].series(key))]
    return Chart(key, STEP, "GiB" if key.endswith("_gib") else "value", lines)


def _chart(panel: Panel, title: str, keys: Collection[str], lines: Sequence[Line], runs: Sequence[RunData]) -> Chart:
    values = [y for line in lines for _, y in line.points if y is not None]
    wide = panel.wide and min(values) > 0 and max(values) > WIDE * min(values)
    return Chart(title, STEP, panel.unit, lines, _bands(panel, keys, lines, runs), panel.note, log_y=wide)


def _bands(panel: Panel, keys: Collection[str], lines: Sequence[Line], runs: Sequence[RunData]) -> list[Band]:
    """What the values mean: the panel's own bands, and those by which a run is judged."""
    if panel.bands in FIXED:
        return list(FIXED[panel.bands])
    known = {run: run.config for run in runs if run.config is not None}
    if panel.bands in ENTROPIES:
        figure = ENTROPIES[panel.bands]
        shown = [config for run, config in known.items() if figure in keys and run.last(figure) is not None]
        return _entropies({_prototypes(config, panel.bands) for config in shown})
    highest = max((y for line in lines for _, y in line.points if y is not None), default=0.0)
    found = [
        band
        for run, config in known.items()
        for band in bands(config)
        if band.figure in keys and run.last(band.figure) is not None
    ]
    near = [band for band in found if band.low is None or band.low < FAR * highest]  # others would flatten the line
    ends = ((band.low or 0.0, band.high, band.what) for band in near)
    drawn = (Band(low, max(highest, OPEN * low) if high is None else high, what) for low, high, what in ends)
    return list(dict.fromkeys(drawn))


def _entropies(counts: set[int]) -> list[Band]:
    """Where the entropy of a collapsed head lies, for numbers of prototypes."""
    if not counts:
        return []
    half = BAND * math.log(max(counts))
    levels = [(math.log(count), f"uniform collapse: ln {count:,} = {math.log(count):.2f}") for count in sorted(counts)]
    return [Band(at - half, at + half, label) for at, label in [(0.0, "one-hot collapse: 0"), *levels]]


def _prototypes(config: Config, kind: str) -> int:
    return config.head.prototypes if kind == "entropy" else config.patch_prototypes
