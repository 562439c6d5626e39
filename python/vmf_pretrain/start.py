"""From what a person asked for to a run: settings in layers, checks of the run folder, and the ranks that take part.

The command and the Python call are two doors to this. Nothing here imports torch before the settings are known to be good.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import (
    check_sections,
    config_of,
    config_text,
    python_layer,
    read_config,
    read_layer,
    text_config,
)
from vmf_pretrain.config.layers import layered
from vmf_pretrain.config.method import is_import_path
from vmf_pretrain.config.paths import expanded, with_absolute_paths
from vmf_pretrain.config.resume import refuse_changes
from vmf_pretrain.config.run import Config
from vmf_pretrain.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console

LEAST_SPACE = 64 << 20  # bytes: the demo's run folder has 20 MiB


@dataclass(frozen=True)
class Wish:
    """What a person asked for.

    Attributes:
        recipe: name of a recipe, or None.
        config: file of settings, or None.
        fields: settings that win over both, fitted and nested.
        allow_code: whether the settings may name modules to import.
    """

    recipe: str | None = None
    config: Path | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    allow_code: bool = False


@dataclass(frozen=True)
class Started:
    """A run that has ended, or was stopped.

    Attributes:
        code: 0 done, 130 or 143 stopped by a signal after a checkpoint.
        folder: of the run.
    """

    code: int
    folder: Path


def settings(wish: Wish, say: Callable[[str], None]) -> Config:
    """The configuration of a new run. Without recipe and file, one is chosen by machine and images, and ``say`` gets why.

    Raises:
        PretrainError: the settings do not fit, or there is nothing to choose by.
    """
    from vmf_pretrain.recipes.table import recipe_layer, recipe_path

    if wish.recipe is not None and wish.config is not None:
        raise PretrainError("--recipe and --config are both given; expected one of them, and single fields beside it.")
    if wish.recipe is not None:
        base = recipe_layer(wish.recipe)
    elif wish.config is not None:
        base = read_layer(expanded(wish.config, "--config"), recipe_path)
    else:
        base = _chosen(wish, say)
    config = with_absolute_paths(config_of(base, wish.fields))
    _require_allowed(config.method, _dataset(config), wish.allow_code)
    return config


def settings_to_go_on(
    out: Path, fields: Mapping[str, Any], *, allow_changed: frozenset[str], allow_code: bool
) -> Config:
    """The configuration of the run in ``out``, with the fields that may change.

    Raises:
        PretrainError: there is no run, or a field may not change.
    """
    path = out / "config.yaml"
    if not path.is_file():
        raise PretrainError(f"run folder {out} holds no run to resume; expected a config.yaml in it.")
    before = read_config(path)
    after = with_absolute_paths(config_of(read_layer(path), fields))
    _require_allowed(after.method, _dataset(after), allow_code)
    refuse_changes(before, after, allow_changed)
    return after


def free_folder(name: str) -> Path:
    """``runs/name``, or the first of ``runs/name-2``, ``-3``, ... that does not exist."""
    parent = Path("runs")
    candidates = itertools.chain([parent / name], (parent / f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in candidates if not path.exists())


def require_free(out: Path) -> None:
    """A new run can be written to ``out``; makes nothing.

    Raises:
        PretrainError: it is taken, is no folder, cannot be made, or its disk is full.
    """
    try:
        if out.exists() and not out.is_dir():
            raise PretrainError(f"--out {out} is a file; expected a new folder.")
        RunFolder.refuse_existing(out)
        above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
        if not above.is_dir():
            raise PretrainError(f"--out {out} cannot be made: {above} is a file.")
        if not os.access(above, os.W_OK | os.X_OK):
            raise PretrainError(f"--out {out} cannot be made: {above} may not be written to.")
        free = shutil.disk_usage(above).free
    except OSError as error:
        raise PretrainError(f"--out {out} cannot be made: {error.strerror}.") from None
    if free < LEAST_SPACE:
        raise PretrainError(
            f"--out {out} is on a disk with {free >> 20} MiB left; a run needs at least {LEAST_SPACE >> 20}."
        )


def start(
    config: Config,
    out: Path | None,
    *,
    name: str,
    resume: bool,
    console: "Console",
    allow_code: bool = False,
    allow_changed: frozenset[str] = frozenset(),
    began: Callable[[Path], None] = lambda folder: None,
) -> Started:
    """Run to the end, or until a signal, with the other ranks of torchrun or srun, if there are any.

    The first rank's settings and folder are those of all: a recipe chosen by memory, or the next free folder, could differ.

    Args:
        config: the settings.
        out: the run's folder; None takes the next free ``runs/name``.
        name: of the folder without ``out``.
        resume: go on with the run in ``out``.
        console: where progress and summary are printed.
        allow_code: whether the settings may name modules to import.
        allow_changed: kinds of changes that a resumed run may make although its steps then mean something else.
        began: gets the folder before anything is written to it.

    Raises:
        PretrainError: the settings, the data or the checkpoint do not fit, or the run cannot go on.
    """
    from vmf_pretrain.engine.history import trained
    from vmf_pretrain.engine.parallel import process_group
    from vmf_pretrain.engine.run import Run
    from vmf_pretrain.networks import ranks

    with process_group(config.train.device):
        agreed = text_config(ranks.from_first(config_text(config)))
        folder = Path(ranks.from_first(str(out if out is not None else free_folder(name))))
        resume = ranks.from_first(str(resume)) == str(
            True
        )  # a shared disk may show ranks a new folder at different times
        began(folder)
        run = Run(agreed, folder, resume=resume, console=console, allow_code=allow_code, allow_changed=allow_changed)
        return Started(trained(run), folder)


def _dataset(config: Config) -> str | None:
    """The data set of the user's own that settings name, or None."""
    return str(config.data.dataset) if config.data.kind == "dataset" else None


def _require_allowed(method: str, dataset: str | None, allow_code: bool) -> None:
    """Settings run no code unless a person has allowed it."""
    own = [method] if is_import_path(method) else []
    own += [dataset] if dataset is not None else []
    if own and not allow_code:
        raise PretrainError(f"{own[0]} runs code of yours; add --allow-code if you trust it.")


def _chosen(wish: Wish, say: Callable[[str], None]) -> dict[str, Any]:
    """The layer of the recipe that fits this machine and the images."""
    data, train = wish.fields.get("data", {}), wish.fields.get("train", {})
    kind = data.get("kind", "folder")
    if kind not in ("folder", "shards"):
        raise PretrainError(f"no recipe is chosen by itself for data.kind {kind}; name one with --recipe or --config.")
    if data.get("folder") is None:
        raise PretrainError(
            "fit got no images; expected --data FOLDER, --recipe NAME, --config FILE, or --resume --out RUN."
        )
    check_sections(wish.fields)
    _require_allowed(wish.fields.get("method", ""), None, wish.allow_code)
    # all of the above before these imports, which are slow
    from vmf_pretrain.recipes.choose import Asked, choose
    from vmf_pretrain.recipes.machine import photos_in, this_machine
    from vmf_pretrain.recipes.table import recipe_layer

    photos = photos_in(Path(data["folder"]))
    machine = this_machine(train.get("device", "auto"))
    size = wish.fields.get("views", {}).get("global_size")
    asked = Asked(data.get("batch_size"), train.get("epochs"), wish.fields.get("method"), size)
    choice = choose(machine, photos, asked)
    for line in choice.reason:
        say(line)
    return layered(recipe_layer(choice.recipe), python_layer(choice.fields))
