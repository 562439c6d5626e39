"""The sub-command ``vmf-pretrain embed``."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import options_layer
from vmf_pretrain.config.paths import expanded
from vmf_pretrain.config.tasks.evaluation import EvaluationConfig
from vmf_pretrain.config.typed import made
from vmf_pretrain.launch import rank

NAME = "embed"
KIND_NAMES = ("class", "mean_patch", "patches")  # without torch, for --help
SECTIONS = ("features", "data", "weights")  # of an evaluation's settings that features depend on
RESIZED = 256 / 224  # shorter side over the side of the square that the network sees


@dataclass(frozen=True)
class Wish:
    """What a person asked for.

    Attributes:
        network: the folder of a run, a file of weights, or ``timm:NAME``.
        out: the file to write.
        kind: one of KIND_NAMES.
        config: which images, and how features are computed.
        allow_code: whether the settings of a run may name modules to import.
    """

    network: str
    out: Path
    kind: str
    config: EvaluationConfig
    allow_code: bool = False


def add_embed(commands: Any) -> None:
    """Add the sub-command's options to argparse's sub-commands."""
    epilog = "settings are options too: --features.dtype bfloat16, --features.size 224, --data.max_images 5000"
    command = commands.add_parser(NAME, help="write features of images to a file", epilog=epilog, allow_abbrev=False)
    command.add_argument(
        "network", metavar="RUN|FILE|timm:NAME", help="folder of a run, file of weights, or network of timm"
    )
    command.add_argument("--data", required=True, metavar="FOLDER", help="images, searched recursively")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="features.npz or features.parquet")
    command.add_argument("--kind", choices=KIND_NAMES, default="class", help="which features (default: class)")
    command.add_argument("--weights", help="last or best of a run (default: last)")
    command.add_argument("--allow-code", action="store_true", help="let the settings of a run name modules to import")


def wish_of(chosen: argparse.Namespace) -> Wish:
    """What the command line asks for.

    Raises:
        PretrainError: a setting is unknown or does not fit.
    """
    stray = [name for name in chosen.fields if name.split(".")[0] not in SECTIONS]
    if stray:
        raise PretrainError(f"--{stray[0]} does not go with embed; expected --features.NAME or --data.NAME.")
    short = {"data.folder": chosen.data, "weights": chosen.weights}
    config: EvaluationConfig = made(EvaluationConfig, options_layer(short, chosen.fields, EvaluationConfig))
    return Wish(chosen.network, expanded(chosen.out, "--out"), chosen.kind, config, chosen.allow_code)


def run_embed(wish: Wish) -> None:
    """Write the file, with the other ranks of torchrun or srun, if there are any; say how many images are in it.

    Raises:
        PretrainError: network, images or file do not fit.
    """
    from vmf_pretrain.engine.parallel import choose_device, process_group
    from vmf_pretrain.evaluation.evaluated import load_evaluated
    from vmf_pretrain.evaluation.extract import Extraction, Wanted
    from vmf_pretrain.evaluation.features_file import writer_for
    from vmf_pretrain.evaluation.given import Given
    from vmf_pretrain.evaluation.outputs import Kinds
    from vmf_pretrain.evaluation.views import CentreSquare
    from vmf_pretrain.storage.durable import remove

    write, config, settings = writer_for(wish.out), wish.config, wish.config.features
    if not wish.out.parent.is_dir():
        raise PretrainError(f"--out is {wish.out}, but there is no folder {wish.out.parent}.")
    with process_group(settings.device):
        evaluated = load_evaluated(
            wish.network,
            device=choose_device(settings.device),
            weights=config.weights,
            size=settings.size,
            allow_code=wish.allow_code,
        )
        size = evaluated.fed.size
        images = Given(config.data, None, size).all
        parts = frozenset() if wish.kind == "class" else frozenset({wish.kind})
        wanted = Wanted(CentreSquare(size, round(size * RESIZED)), Kinds(1, parts))  # type: ignore[arg-type]
        store = wish.out.with_name(f"{wish.out.name}.parts")  # stays after a kill, and is gone on from
        features = Extraction(evaluated, settings, store).features(images, wanted)
        if rank():
            return
        try:
            write(wish.out, features, wish.kind)
        except OSError as error:
            raise PretrainError(f"{wish.out} cannot be written: {error.strerror or error}.") from None
        remove(store)
    bad = f"; {len(features.bad)} cannot be read and are listed in it" if features.bad else ""
    print(f"{wish.out}: {wish.kind} features of {len(features)} images by {evaluated.name}{bad}.")
