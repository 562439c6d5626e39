"""The description of a checkpoint, ``state.json``: its step, its files with their hashes, its state, and its own hash."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.durable import sync_folder, write_durably

STATE_FILE = "state.json"
FORMAT = 2  # 1 had neither format nor layout; it is read as layout "whole"
WHOLE = "whole"  # <group>.safetensors for each group of tensors
SHARDED = "sharded"  # files of torch.distributed.checkpoint; names are <group>/<name>
FIRST_ENTRIES = {"step", "torch_version", "files", "state"}
ENTRIES = {*FIRST_ENTRIES, "format", "layout", "groups"}


class DamagedError(Exception):
    """Why a checkpoint cannot be used."""


@dataclass(frozen=True)
class Manifest:
    """What ``state.json`` says.

    Attributes:
        step: optimizer steps done.
        layout: WHOLE or SHARDED.
        groups: names of the groups of tensors, also of those without tensors.
        files: SHA-256 by file name.
        state: the state as JSON has it.
    """

    step: int
    layout: str
    groups: list[str]
    files: dict[str, str]
    state: dict[str, Any]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``state.json`` and wait until it and all entries of the folder are on disk.

    Raises:
        OSError: it cannot be written.
        TypeError: JSON cannot hold the state.
    """
    described = {**vars(manifest), "format": FORMAT, "torch_version": torch.__version__}
    described = json.loads(json.dumps(described))  # hash it as it will be read: keys as strings, tuples as lists
    text = json.dumps({**described, "sha256": hash_of(described)}, indent=1)
    write_durably(folder / STATE_FILE, text.encode())
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """The description of the checkpoint in ``folder``, verified by its own hash; the other files are not looked at.

    Raises:
        DamagedError: it is missing or changed; the text says why.
        PretrainError: a newer version of the library wrote it.
    """
    described = _described(folder)
    version = described.get("format", 1)
    if version not in range(1, FORMAT + 1):
        raise PretrainError(
            f"checkpoint {folder} has format {version}, which a newer vmf_kernels wrote; this one reads up to {FORMAT}: "
            "install the newer one."
        )
    if set(described) != (ENTRIES if version > 1 else FIRST_ENTRIES):
        raise DamagedError(f"{STATE_FILE} has the entries {sorted(described)}")
    names = [name.removesuffix(".safetensors") for name in described["files"]]
    return Manifest(
        described["step"],
        described.get("layout", WHOLE),
        described.get("groups", names),
        described["files"],
        described["state"],
    )


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Check that the files are those that the manifest lists, with the right hashes.

    Raises:
        DamagedError: a file is missing, surplus or changed; the text names it.
    """
    for name, expected in manifest.files.items():
        if not re.fullmatch(r"[\w-]+\.safetensors", name):
            raise DamagedError(f"{STATE_FILE} lists {name!r}, which is no plain file name")
        found, size = hash_file(folder / name)
        if found != expected:
            raise DamagedError(f"{name} ({size} bytes) has sha256 {found[:12]} instead of {str(expected)[:12]}")
    surplus = {path.name for path in folder.glob("*.safetensors")} - set(manifest.files)
    if surplus:  # a reader of all files in the folder would take its tensors
        raise DamagedError(f"{min(surplus)} is not listed in {STATE_FILE}")


def hash_file(path: Path) -> tuple[str, int]:
    """SHA-256 in hexadecimal and the size in bytes. Raises DamagedError if the file is missing or cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    except FileNotFoundError as error:
        raise DamagedError(f"{path.name} is missing") from error
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read: {error.strerror or error}") from error


def hash_of(described: dict[str, Any]) -> str:
    """The hash that ``state.json`` holds of its other entries."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _described(folder: Path) -> dict[str, Any]:
    try:
        described = json.loads((folder / STATE_FILE).read_bytes())
    except FileNotFoundError as error:
        raise DamagedError(f"{STATE_FILE} is missing") from error
    except OSError as error:
        raise DamagedError(f"{STATE_FILE} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{STATE_FILE} is not JSON: {error}") from error
    if not isinstance(described, dict) or described.pop("sha256", None) != hash_of(described):
        raise DamagedError(f"{STATE_FILE} does not match its own sha256")
    return described
