"""The Python call: the same run as the command's."""

import functools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.file import python_layer
from vmf_pretrain.config.paths import expanded
from vmf_pretrain.config.resume import kinds_of
from vmf_pretrain.start import Wish, require_free, settings, settings_to_go_on, start

SIGINT_CODE = 130


@dataclass(frozen=True)
class Finished:
    """A run that is done.

    Attributes:
        folder: of the run: weights, plots, metrics.
        summary: the numbers of its ``summary.json``.
    """

    folder: Path
    summary: dict[str, Any]


def pretrain(
    data: str | os.PathLike[str] | None = None,
    method: str | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    recipe: str | None = None,
    config: str | os.PathLike[str] | None = None,
    resume: bool = False,
    allow_changed: Iterable[str] = (),
    allow_code: bool = False,
    quiet: bool = False,
    **fields: Any,
) -> Finished:
    """Pretrain, as ``vmf-pretrain fit`` does.

    Args:
        data: a folder of images, searched recursively.
        method: "dino", "dino-vmf", "ibot", "ibot-vmf", "dinov2", "dinov2-vmf", "mae", "ijepa", "vjepa", or "module:Class"; None
            takes that of the recipe.
        out: the run's folder; None takes the next free ``runs/fit``.
        recipe: settings by name; without ``recipe`` and ``config``, one is chosen by machine and images.
        config: settings as a YAML file.
        resume: go on with the run in ``out``.
        allow_changed: kinds of changes, as ``--allow-changed``, that a resumed run may make.
        allow_code: whether the settings may name modules to import.
        quiet: print nothing.
        fields: other settings, as sections (``optim={"learning_rate": 1e-3}``) or ``**{"optim.learning_rate": 1e-3}``.

    Returns:
        The folder and the summary of the run.

    Raises:
        PretrainError: settings, data or checkpoint do not fit, or the run cannot go on: one sentence that says what to do.
        KeyboardInterrupt: Ctrl-C during the training; a checkpoint is written, and ``resume=True`` goes on from it.
    """
    from vmf_pretrain.report.console import run_console

    console = run_console(quiet=quiet)
    short = {"data.folder": data, "method": method}
    layer = python_layer({**{name: value for name, value in short.items() if value is not None}, **fields})
    allowed = kinds_of(allow_changed)
    folder = None if out is None else expanded(os.fspath(out), "out")
    if resume:
        if folder is None or recipe is not None or config is not None:
            raise PretrainError("resume needs out, the folder of a run, and takes no recipe and no config.")
        chosen = settings_to_go_on(folder, layer, allow_changed=allowed, allow_code=allow_code)
    else:
        if folder is not None:
            require_free(folder)
        wish = Wish(recipe, None if config is None else Path(config), layer, allow_code)
        chosen = settings(wish, functools.partial(console.print, markup=False, highlight=False))
    started = start(
        chosen,
        folder,
        name="fit",
        resume=resume,
        console=console,
        allow_code=allow_code,
        allow_changed=allowed,
    )
    if started.code == SIGINT_CODE:
        raise KeyboardInterrupt(
            f"a checkpoint is written; go on with pretrain(out={str(started.folder)!r}, resume=True)"
        )
    if started.code != 0:
        raise PretrainError(
            f"the run was stopped by a signal, after a checkpoint; go on with pretrain(out={str(started.folder)!r}, "
            "resume=True)."
        )
    summary: dict[str, Any] = json.loads((started.folder / "summary.json").read_text(encoding="utf-8"))
    return Finished(started.folder, summary)
