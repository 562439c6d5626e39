"""The model card beside exported weights: where they are from, how they are used, what is known of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmf_pretrain.config.file import config_text
from vmf_pretrain.config.paths import with_each_path
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.export.write import Written

LIBRARIES = {"timm", "transformers"}  # names of libraries that a page of models knows by the header
FIGURES = {
    "knn": "k-NN accuracy, held-out images, %",
    "knn_untrained": "the same network, untrained: k-NN, %",
    "knn_pixels": "raw pixels: k-NN, %",
    "linear": "linear probe, held-out images, %",
    "linear_untrained": "the same network, untrained: linear probe, %",
    "linear_pixels": "raw pixels: linear probe, %",
    "rankme": "effective rank of the features (RankMe)",
    "mutual_information": "mutual information of images and prototypes, nats",
    "steps": "optimizer steps",
}
NO_FIGURES = "The run has left no `summary.json`, so nothing is known of these features here."


@dataclass(frozen=True)
class Told:
    """What is known of a network.

    Attributes:
        network: which one it is, in words.
        source: its file, by name.
        step: optimizer steps after which it was saved, if known.
        config: of the run.
        fed: its input.
        summary: of the run; empty if there is none.
    """

    network: str
    source: str
    step: int | None
    config: Config
    fed: NetworkInput
    summary: Mapping[str, Any]


def summary_of(path: Path) -> dict[str, Any]:
    """The contents of a summary.json, or nothing if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def card_of(told: Told, written: Written) -> str:
    """The card as Markdown."""
    config = told.config
    parts = [
        _header(config, written),
        f"# {config.backbone.name}, pretrained with {config.method}\n",
        f"{_sentence(told)} {_compared(written)}".rstrip() + "\n",
        *(f"{note}\n" for note in written.loading.notes),
        f"## Use\n\n```python\n{written.loading.code.replace('FOLDER', written.folder.name)}\n```\n",
        _input(told.fed),
        _data(config),
        _figures(told.summary, told.step),
        f"## Settings\n\n```yaml\n{config_text(without_paths(config)).rstrip()}\n```\n",
        "## Licence\n\nTo be filled in by whoever publishes these weights; mind the licence of the images too.\n",
    ]
    return "\n".join(parts)


def without_paths(config: Config) -> Config:
    """The configuration with the last part of each path only: a card is read by strangers."""
    return with_each_path(config, lambda path: Path(path).name)


def _header(config: Config, written: Written) -> str:
    library = written.loading.library
    lines = [f"library_name: {library}"] if library in LIBRARIES else []
    tags = ["self-supervised", config.method.rsplit(":", 1)[-1].lower()]
    return "\n".join(["---", *lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---\n"])


def _sentence(told: Told) -> str:
    step = "" if told.step is None else f" after {told.step} steps"
    return f"Weights of {told.network}{step} (`{told.source}` of the run), without any head."


def _compared(written: Written) -> str:
    library = written.loading.library
    if written.difference is None:
        return f"They were not loaded with {library}, which was not installed where they were written."
    return f"Loaded back with {library}, their features are those of the run's network to {written.difference:.0e}."


def _input(fed: NetworkInput) -> str:
    mean, deviation = (", ".join(f"{value:g}" for value in values) for values in (fed.mean, fed.deviation))
    return (
        f"## Input\n\n{fed.channels} channel(s) of {fed.size} x {fed.size} pixels in [0, 1], minus {mean}, divided by "
        f"{deviation}. Photographs are resized by the shorter side to 256/224 of that size (bicubic), and the central square "
        "is cut out.\n"
    )


def _data(config: Config) -> str:
    data = config.data
    named = data.dataset if data.folder is None else Path(data.folder).name
    which = f"kind `{data.kind}`" if named is None else f"kind `{data.kind}`, `{named}`"
    return f"## Data\n\nImages of {which}. What they show is for you to say.\n"


def _figures(summary: Mapping[str, Any], step: int | None) -> str:
    """The table of the run's last network, and a sentence where the weights are of another step."""
    rows = [f"| {name} | {summary[key]:.4g} |" for key, name in FIGURES.items() if summary.get(key) is not None]
    if not rows:
        return f"## Figures\n\n{NO_FIGURES}\n"
    table = "\n".join(["| at the end of the run | |", "|---|---|", *rows])
    last = summary.get("steps")
    if step is None or last is None or step == last:
        return f"## Figures\n\n{table}\n"
    best = summary.get("best_knn")
    known = "" if best is None else f" The best k-NN accuracy during the run is {best:.4g} %."
    return (
        f"## Figures\n\nThese figures are of the network after {last} steps, not of these weights.{known}\n\n{table}\n"
    )
