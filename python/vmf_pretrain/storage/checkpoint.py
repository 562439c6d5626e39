"""Checkpoints: folders of safetensors files and one JSON file. They are written whole or not at all, and verified when read.

``step_00000123/`` holds ``<group>.safetensors`` for every group of tensors and ``state.json`` (``manifest.py``).
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.durable import temporary
from vmf_pretrain.storage.manifest import (
    SHARDED,
    WHOLE,
    DamagedError,
    Manifest,
    read_manifest,
    verify_files,
    write_manifest,
)
from vmf_pretrain.storage.shards import outline_shards, read_shards
from vmf_pretrain.storage.step_folders import (
    LATEST,
    REPLACED,
    TEMPORARY,
    clear_up,
    folder_of,
    newest_first,
    promised,
    put_in_place,
    remove_older,
    step_of,
)
from vmf_pretrain.storage.tensor_file import read_header, read_tensors, write_tensors

GROUP_NAME = re.compile(r"[A-Za-z0-9_]+")
Groups = Mapping[str, Mapping[str, Tensor]]  # tensors by group, then by name
_Reader = Callable[[Path, Manifest], dict[str, dict[str, Tensor]]]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps done when it was written.
        tensors: by group, then by name; on the CPU, or on the meta device if only their shapes were read.
        state: the state as read from JSON: tuples have become lists, keys strings; floats are exact.
        layout: "whole" or "sharded".
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    layout: str = WHOLE


def save_checkpoint(folder: Path, step: int, tensors: Groups, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write ``folder/step_<step>``, point ``LATEST`` at it and remove older ones.

    Even if the process is killed at any moment, the folder holds a whole checkpoint if it held one before. Only one process
    at a time may save into a folder.

    Args:
        folder: the run's folder of checkpoints; created if missing.
        step: optimizer steps done, >= 0; a checkpoint of the same step is replaced.
        tensors: by group, one file each; any strides and devices, and storage may be shared.
        state: anything that JSON can hold.
        keep: how many checkpoints up to this step to keep, >= 1; later ones stay.

    Returns:
        The checkpoint's folder.

    Raises:
        PretrainError: the disk is full or read-only; earlier checkpoints and ``LATEST`` are unchanged.
        ValueError: ``step`` or ``keep`` is out of range, or a group's name is not a plain word.
    """
    check_arguments(step, tensors, keep)
    path = folder_of(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear_up(folder)
        with temporary(folder / f"{TEMPORARY}{path.name}") as unfinished:
            unfinished.mkdir()
            files = {f"{group}.safetensors": named for group, named in tensors.items()}
            hashes = {name: write_tensors(unfinished / name, named) for name, named in files.items()}
            write_manifest(unfinished, Manifest(step, WHOLE, list(tensors), hashes, dict(state)))
            put_in_place(unfinished, path)
    except OSError as error:
        raise PretrainError(not_written(path, error)) from error
    remove_older(folder, step, keep)
    return path


def load_checkpoint(folder: Path) -> Checkpoint:
    """The newest checkpoint in ``folder`` whose hashes verify, with a warning for every newer one that is damaged.

    Its tensors are whole and on the CPU, however many ranks wrote it.

    Raises:
        PretrainError: there is no checkpoint, or all are damaged; the error names them and says why.
    """
    return _newest(folder, _whole)


def outline_checkpoint(folder: Path) -> Checkpoint:
    """What ``load_checkpoint`` finds, verified like it, but with the shapes and dtypes of the tensors only."""
    return _newest(folder, _outline)


def check_arguments(step: int, tensors: Groups, keep: int) -> None:
    """Raises ValueError as ``save_checkpoint`` does."""
    if step < 0 or keep < 1:
        raise ValueError(f"step is {step} and keep is {keep}; expected step >= 0 and keep >= 1")
    for group in tensors:
        if not GROUP_NAME.fullmatch(group):
            raise ValueError(f"group {group!r} names a file; expected letters, digits and underscores only")


def not_written(path: Path, error: OSError) -> str:
    """The sentence on a checkpoint that could not be written."""
    return f"Checkpoint {path.name} could not be written to {path.parent}: {error.strerror or error}."


def require_same_tensors(group: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors of a checkpoint that are not exactly those of a module.

    Args:
        group: what they are called in the error.
        found: of the checkpoint; the meta device will do.
        expected: for example a module's state dict.

    Raises:
        PretrainError: the error lists every name that is missing or surplus, or whose shape or dtype differs.
    """
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is surplus" for name in found if name not in expected]
    for name in found.keys() & expected.keys():
        got, wanted = ((tuple(t.shape), t.dtype) for t in (found[name], expected[name]))
        if got != wanted:
            faults.append(f"{name} is {got[1]} of shape {got[0]} but must be {wanted[1]} of shape {wanted[0]}")
    if faults:
        raise PretrainError(f"The checkpoint's {group} does not fit this configuration: {'; '.join(sorted(faults))}.")


def outline_of(path: Path) -> Checkpoint:
    """The checkpoint at ``path`` with the shapes and dtypes of its tensors only; its files are not hashed.

    Raises:
        DamagedError: its description or a header is damaged.
        PretrainError: a newer version of the library wrote it.
    """
    return _checkpoint(path, read_manifest(path), _outline)


def checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, verified, with whole tensors on the CPU.

    Raises:
        PretrainError: it is damaged, or a newer version of the library wrote it.
    """
    try:
        manifest = read_manifest(path)
        verify_files(path, manifest)
        return _checkpoint(path, manifest, _whole)
    except DamagedError as damage:
        raise PretrainError(f"checkpoint {path} is damaged: {damage}.") from None


def _newest(folder: Path, tensors: _Reader) -> Checkpoint:
    candidates = newest_first(folder)
    if not candidates:
        raise PretrainError(f"{folder} holds no checkpoint; expected a folder in it named like step_00000123.")
    damages: list[str] = []
    name = promised(folder)
    if name is not None and name not in {path.name.removeprefix(REPLACED) for path in candidates}:
        damages.append(f"{name}: {LATEST} names it but it is missing")
    for path in candidates:
        try:
            manifest = read_manifest(path)
            verify_files(path, manifest)  # every file is hashed before any tensor is parsed
            checkpoint = _checkpoint(path, manifest, tensors)
        except DamagedError as damage:
            damages.append(f"{path.name}: {damage}")
            continue
        for damage_text in damages:
            warnings.warn(f"Passed over a damaged checkpoint, {damage_text}; using {path.name} instead.", stacklevel=3)
        return checkpoint
    raise PretrainError(f"{folder} holds no usable checkpoint ({'; '.join(damages)}).")


def _checkpoint(path: Path, manifest: Manifest, tensors: _Reader) -> Checkpoint:
    if manifest.step != step_of(path):
        raise DamagedError(f"state.json is of step {manifest.step}")
    try:
        return Checkpoint(path, manifest.step, tensors(path, manifest), manifest.state, manifest.layout)
    except PretrainError as error:
        raise DamagedError(f"its tensors cannot be parsed: {str(error).rstrip('.')}") from error


def _whole(path: Path, manifest: Manifest) -> dict[str, dict[str, Tensor]]:
    if manifest.layout == SHARDED:
        return read_shards(path, manifest.groups)
    return {Path(name).stem: read_tensors(path / name)[0] for name in manifest.files}


def _outline(path: Path, manifest: Manifest) -> dict[str, dict[str, Tensor]]:
    if manifest.layout == SHARDED:
        return outline_shards(path, manifest.groups)
    return {Path(name).stem: read_header(path / name).specs() for name in manifest.files}
