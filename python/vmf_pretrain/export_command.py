"""The sub-command ``vmf-pretrain export``."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.paths import expanded

if TYPE_CHECKING:
    from vmf_pretrain.evaluation.evaluated import Evaluated
    from vmf_pretrain.export.form import Exportable

NAME = "export"
FORM_NAMES = ("timm", "torchvision", "transformers", "safetensors", "onnx")  # without the libraries, for --help
FOLDER = "export"  # of a run


@dataclass(frozen=True)
class Order:
    """What a person asked for.

    Attributes:
        network: the folder of a run, or a file of its weights.
        form: of which library.
        out: the folder to make; None takes ``export/FORM`` in the run's folder.
        weights: of a run: "last" or "best".
        allow_code: whether the settings of a run may name a module to import.
    """

    network: str
    form: str
    out: Path | None = None
    weights: str = "last"
    allow_code: bool = False


def add_export(commands: Any) -> None:
    """Add the sub-command's options to argparse's sub-commands."""
    command = commands.add_parser(
        NAME, help="write the evaluated network for another library, with a model card", allow_abbrev=False
    )
    command.add_argument("network", metavar="RUN|FILE", help="folder of a run, or file of its weights")
    command.add_argument("--to", required=True, metavar="FORM", help=f"one of {', '.join(FORM_NAMES)}")
    command.add_argument("--out", type=Path, help="folder to make (default: RUN/export/FORM)")
    command.add_argument("--weights", choices=("last", "best"), default="last", help="of a run (default: last)")
    command.add_argument("--allow-code", action="store_true", help="let the settings of a run name modules to import")


def order_of(chosen: argparse.Namespace) -> Order:
    """What the command line asks for.

    Raises:
        PretrainError: there is no such form.
    """
    if chosen.to not in FORM_NAMES:
        raise PretrainError(f"--to is {chosen.to}; expected one of {', '.join(FORM_NAMES)}.")
    out = None if chosen.out is None else expanded(chosen.out, "--out")
    return Order(chosen.network, chosen.to, out, chosen.weights, chosen.allow_code)


def run_export(order: Order) -> Path:
    """Write the form and say what it is; its folder.

    Raises:
        PretrainError: the network has no such form, or its folder cannot be made.
    """
    import torch

    from vmf_pretrain.evaluation.evaluated import load_evaluated
    from vmf_pretrain.export.card import Told, card_of, summary_of
    from vmf_pretrain.export.table import FORMS
    from vmf_pretrain.export.write import write_form

    found = load_evaluated(
        order.network, device=torch.device("cpu"), weights=order.weights, allow_code=order.allow_code
    )
    if found.config is None or found.method is None:
        raise PretrainError(
            f"{order.network} is no network of a run; expected the folder of one, or a file of its weights."
        )
    folder = order.out or _folder_of(found, order.form)
    exportable = exportable_of(found)
    file, step = Path(str(found.facts["file"])), found.facts["step"]
    summary = {} if found.run is None else summary_of(found.run.summary)
    told = Told(found.method.evaluated_name, file.name, step, found.config, found.fed, summary)
    written = write_form(exportable, FORMS[order.form], folder, lambda done: card_of(told, done))
    compared = "not compared" if written.difference is None else f"features differ by {written.difference:.0e} at most"
    print(f"Exported {told.network} ({file.name}, step {step}) to {folder} for {order.form}: {compared}.")
    print(f"{folder / 'README.md'} says how to load it; its licence is for you to fill in.")
    return folder


def exportable_of(found: "Evaluated") -> "Exportable":
    """A loaded network of a run as something to export."""
    from vmf_pretrain.export.form import Exportable

    assert found.config is not None
    image = (found.fed.channels, found.fed.size, found.fed.size)
    shape = (found.config.clips.frames, *image) if found.config.data.kind == "videos" else image
    facts = {"network": found.facts["method"], "step": found.facts["step"]}
    return Exportable(found.network, found.fed, shape, facts)


def _folder_of(found: "Evaluated", form: str) -> Path:
    if found.run is None:
        raise PretrainError("the file of weights is in no run; expected --out FOLDER.")
    return found.run.path / FOLDER / form
