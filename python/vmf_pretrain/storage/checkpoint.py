"""Checkpoints: folders of safetensors files and one JSON file. They are written whole or not at all, and verified when read.

``step_00000123/`` holds ``<group>.safetensors`` for every group of tensors and ``state.json`` with the SHA-256 of each file and
of itself. ``LATEST`` names the newest one, for people and scripts; loading reads the folders themselves.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as tensor_files
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError

LATEST = "LATEST"
STATE_FILE = "state.json"
TEMPORARY = ".tmp-"  # a checkpoint or LATEST that is not yet whole; never read
REPLACED = ".old-"  # a whole checkpoint that another one of its step replaces; read if that one was never completed
STEP_FOLDER = re.compile(rf"(?P<replaced>{re.escape(REPLACED)})?step_(?P<step>\d{{8,}})")
GROUP_NAME = re.compile(r"[A-Za-z0-9_]+")
ADAMW_STATE = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps done when it was written.
        tensors: by group, then by name; on the CPU.
        state: the state as read from JSON: tuples have become lists, keys strings; floats are exact.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class _DamagedError(Exception):
    """Why a checkpoint cannot be used."""


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], *, keep: int
) -> Path:
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
    if step < 0 or keep < 1:
        raise ValueError(f"step is {step} and keep is {keep}; expected step >= 0 and keep >= 1")
    for group in tensors:
        if not GROUP_NAME.fullmatch(group):
            raise ValueError(f"group {group!r} names a file; expected letters, digits and underscores only")
    path = folder / f"step_{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_up(folder)
        with _temporary(folder / f"{TEMPORARY}{path.name}") as temporary:
            temporary.mkdir()
            _write_contents(temporary, step, tensors, state)
            _put_in_place(temporary, path)
        with _temporary(folder / f"{TEMPORARY}{LATEST}") as temporary:
            _write_durably(temporary, f"{path.name}\n".encode())
            os.replace(temporary, folder / LATEST)
            _sync_folder(folder)
    except OSError as error:
        raise PretrainError(
            f"Checkpoint {path.name} could not be written to {folder}: {error.strerror or error}."
        ) from error
    _remove_older(folder, step, keep)
    return path


def load_checkpoint(folder: Path) -> Checkpoint:
    """The newest checkpoint in ``folder`` whose hashes verify, with a warning for every newer one that is damaged.

    Raises:
        PretrainError: there is no checkpoint, or all are damaged; the error names them and says why.
    """
    candidates = _newest_first(folder)
    if not candidates:
        raise PretrainError(f"{folder} holds no checkpoint; expected a folder in it named like step_00000123.")
    damages: list[str] = []
    promised = _promised(folder)
    if promised is not None and promised not in {path.name.removeprefix(REPLACED) for path in candidates}:
        damages.append(f"{promised}: {LATEST} names it but it is missing")
    for path in candidates:
        try:
            checkpoint = _read(path)
        except _DamagedError as damage:
            damages.append(f"{path.name}: {damage}")
            continue
        for damage_text in damages:
            warnings.warn(f"Passed over a damaged checkpoint, {damage_text}; using {path.name} instead.", stacklevel=2)
        return checkpoint
    raise PretrainError(f"{folder} holds no usable checkpoint ({'; '.join(damages)}).")


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by ``"<index>.<name>"``: the parameter's index over all groups, and a name of ``ADAMW_STATE``.

    A parameter that has not been updated yet has no entry. The tensors are the optimizer's own, not copies.

    Raises:
        ValueError: the state is not AdamW's (or is AMSGrad's, which has more).
    """
    flat: dict[str, Tensor] = {}
    for index, (parameter, _) in enumerate(_parameters(optimizer)):
        state = optimizer.state.get(parameter, {})
        if state and set(state) != set(ADAMW_STATE):
            raise ValueError(f"parameter {index} has the state {sorted(state)}; expected AdamW's {list(ADAMW_STATE)}")
        flat.update({f"{index}.{name}": state[name] for name in ADAMW_STATE if state})
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state that ``flatten_optimizer`` returned, bit for bit; parameters without entries have no state then.

    Raises:
        PretrainError: names, shapes or dtypes do not fit the optimizer's parameters; the error lists them, nothing changes.
    """
    parameters = _parameters(optimizer)
    faults = _optimizer_faults([parameter for parameter, _ in parameters], tensors)
    if faults:
        raise PretrainError(f"The checkpoint's optimizer state does not fit this model: {'; '.join(faults)}.")
    for index, (parameter, group) in enumerate(parameters):
        optimizer.state.pop(parameter, None)
        if f"{index}.step" not in tensors:
            continue
        # AdamW keeps its step count on the host unless the update itself reads it on the device
        on_device = group.get("capturable") or group.get("fused")
        step = tensors[f"{index}.step"].to(parameter.device if on_device else "cpu", copy=True)
        moments = {
            name: torch.empty_like(parameter, requires_grad=False).copy_(tensors[f"{index}.{name}"])
            for name in ("exp_avg", "exp_avg_sq")
        }
        optimizer.state[parameter] = {"step": step, **moments}


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """Every parameter with its group, in the order of the optimizer's own state dict."""
    return [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_faults(parameters: list[Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Why ``tensors`` cannot be the state of ``parameters``: one text per fault, which names the tensor."""
    expected = {f"{index}.{name}": parameter for index, parameter in enumerate(parameters) for name in ADAMW_STATE}
    faults = [f"{name} belongs to none of the {len(parameters)} parameters" for name in tensors if name not in expected]
    for name, parameter in expected.items():
        index, kind = name.split(".")
        if name not in tensors:
            if any(f"{index}.{other}" in tensors for other in ADAMW_STATE):
                faults.append(f"{name} is missing")
            continue
        got = tensors[name]
        shape, dtype = ((), torch.float32) if kind == "step" else (tuple(parameter.shape), parameter.dtype)
        if tuple(got.shape) != shape or got.dtype != dtype:
            faults.append(f"{name} is {got.dtype} of shape {tuple(got.shape)} but must be {dtype} of shape {shape}")
    return faults


def _write_contents(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write all files of a checkpoint; they are on disk when this returns."""
    hashes = {}
    for group, named in tensors.items():
        # a copy of each: safetensors refuses strided and shared storage
        copies = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in named.items()}
        content = tensor_files.save(copies)
        hashes[f"{group}.safetensors"] = hashlib.sha256(content).hexdigest()
        _write_durably(folder / f"{group}.safetensors", content)
    described = {"step": step, "torch_version": torch.__version__, "files": hashes, "state": state}
    described = json.loads(json.dumps(described))  # hash it as it will be read: keys as strings, tuples as lists
    text = json.dumps({**described, "sha256": _hash_of(described)}, indent=1)
    _write_durably(folder / STATE_FILE, text.encode())
    _sync_folder(folder)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename a whole checkpoint to its final name; until then, an older one of that name stays readable."""
    replaced = path.with_name(f"{REPLACED}{path.name}")
    if path.exists():
        os.replace(path, replaced)
    try:
        os.replace(temporary, path)
    except OSError:
        if replaced.exists():
            os.replace(replaced, path)
        raise
    _sync_folder(path.parent)
    _remove(replaced)  # if this fails, the next save tries again


def _clear_up(folder: Path) -> None:
    """Clean up after a killed process: remove half-written checkpoints; rename a replaced one back, or remove it."""
    for unfinished in folder.glob(f"{TEMPORARY}step_*"):
        _remove(unfinished)
    for replaced in folder.glob(f"{REPLACED}step_*"):
        path = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if path.exists():
            _remove(replaced)
        else:
            os.replace(replaced, path)


def _remove_older(folder: Path, step: int, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints up to ``step``; warn about one that cannot be removed."""
    until_now = [path for path in _newest_first(folder) if _step_of(path) <= step]
    for path in until_now[keep:]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            warnings.warn(f"Old checkpoint {path} could not be removed: {error.strerror or error}.", stacklevel=3)


def _newest_first(folder: Path) -> list[Path]:
    """Every checkpoint, whole or not; of two of the same step, the replaced one comes last."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (-_step_of(path), path.name.startswith(REPLACED)))


def _step_of(path: Path) -> int:
    match = STEP_FOLDER.fullmatch(path.name)
    assert match is not None, path
    return int(match["step"])


def _promised(folder: Path) -> str | None:
    """The name in ``LATEST``; None if there is no such file, or if it does not name a checkpoint."""
    try:
        name = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return name if STEP_FOLDER.fullmatch(name) else None


def _read(path: Path) -> Checkpoint:
    """The checkpoint at ``path``; every file is hashed before any tensor is parsed.

    Raises:
        _DamagedError: the checkpoint is damaged; the text names the file and the reason.
    """
    described = _read_description(path)
    contents = {}
    for name, expected in described["files"].items():
        if Path(name).name != name:
            raise _DamagedError(f"{STATE_FILE} lists {name!r}, which is no plain file name")
        content = _read_bytes(path / name)
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise _DamagedError(
                f"{name} ({len(content)} bytes) has sha256 {found[:12]} instead of {str(expected)[:12]}"
            )
        contents[name] = content
    try:
        tensors = {name.removesuffix(".safetensors"): tensor_files.load(content) for name, content in contents.items()}
    except SafetensorError as error:
        raise _DamagedError(f"its tensors cannot be parsed: {error}") from error
    return Checkpoint(path, described["step"], tensors, described["state"])


def _read_description(path: Path) -> dict[str, Any]:
    """The contents of ``state.json``, verified by its own hash."""
    try:
        described = json.loads(_read_bytes(path / STATE_FILE))
    except ValueError as error:
        raise _DamagedError(f"{STATE_FILE} is not JSON: {error}") from error
    if not isinstance(described, dict) or described.pop("sha256", None) != _hash_of(described):
        raise _DamagedError(f"{STATE_FILE} does not match its own sha256")
    if set(described) != {"step", "torch_version", "files", "state"}:
        raise _DamagedError(f"{STATE_FILE} has the entries {sorted(described)}")
    if described["step"] != _step_of(path):
        raise _DamagedError(f"{STATE_FILE} is of step {described['step']}")
    return described


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise _DamagedError(f"{path.name} is missing") from error
    except OSError as error:
        raise _DamagedError(f"{path.name} cannot be read: {error.strerror or error}") from error


def _hash_of(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yields ``path``; on exit, its file or folder is removed unless it was renamed."""
    try:
        yield path
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on disk."""
    if os.name == "nt":  # cannot open a folder; NTFS journals its entries
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
