"""The folder of a run's checkpoints: how each is named, put in place, found and removed.

``step_00000123/`` is a checkpoint. ``LATEST`` names the newest, for people and scripts; loading reads the folders themselves.
"""

import os
import re
import shutil
import warnings
from pathlib import Path

from vmf_pretrain.storage.durable import leads_out, remove, replace_durably, sync_folder

LATEST = "LATEST"
TEMPORARY = ".tmp-"  # a checkpoint that is not yet whole; never read
REPLACED = ".old-"  # a whole checkpoint that another one of its step replaces; read if that one was never completed
STEP_FOLDER = re.compile(rf"(?P<replaced>{re.escape(REPLACED)})?step_(?P<step>\d{{8,}})")


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = STEP_FOLDER.fullmatch(path.name)
    assert match is not None, path
    return int(match["step"])


def clear_up(folder: Path) -> None:
    """Clean up after a killed process: remove half-written checkpoints; rename a replaced one back, or remove it."""
    if leads_out(folder):
        return
    for unfinished in folder.glob(f"{TEMPORARY}step_*"):
        remove(unfinished)
    for replaced in folder.glob(f"{REPLACED}step_*"):
        path = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if path.exists():
            remove(replaced)
        else:
            os.replace(replaced, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a whole checkpoint to its final name, and let ``LATEST`` name it; an older one of that name stays until then."""
    replaced = path.with_name(f"{REPLACED}{path.name}")
    if path.exists():
        os.replace(path, replaced)
    try:
        os.replace(temporary, path)
    except OSError:
        if replaced.exists():
            os.replace(replaced, path)
        raise
    sync_folder(path.parent)
    remove(replaced)  # if this fails, the next save tries again
    replace_durably(path.parent / LATEST, f"{path.name}\n".encode())


def remove_older(folder: Path, step: int, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints up to ``step``; warn about those that cannot be removed."""
    until_now = [path for path in newest_first(folder) if step_of(path) <= step]
    if leads_out(folder) and until_now[keep:]:
        names = ", ".join(path.name for path in until_now[keep:])
        warnings.warn(
            f"{folder} is a link out of the run folder, so old checkpoints in it stay: {names}; remove them by hand.",
            stacklevel=3,
        )
        return
    for path in until_now[keep:]:
        try:
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)
        except OSError as error:
            warnings.warn(f"Old checkpoint {path} could not be removed: {error.strerror or error}.", stacklevel=3)


def newest_first(folder: Path) -> list[Path]:
    """Every checkpoint, whole or not; of two of the same step, the replaced one comes last."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (-step_of(path), path.name.startswith(REPLACED)))


def promised(folder: Path) -> str | None:
    """The name in ``LATEST``; None if there is no such file, or if it does not name a checkpoint."""
    try:
        name = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return name if STEP_FOLDER.fullmatch(name) else None
