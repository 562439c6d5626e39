"""What the form of a library says; writing, checking and the card are the same for all.

Legend: B images, F features.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.network_input import NetworkInput

WEIGHTS = "model.safetensors"
SETTINGS = "config.json"
CROPPED = 224 / 256  # of the shorter side: what the published evaluations cut out of a resized photograph
Features = Callable[[Tensor], Tensor]  # network inputs [B, ...] to features [B, F]


@dataclass(frozen=True, eq=False)
class Exportable:
    """A network to export.

    Attributes:
        network: network inputs [B, ...] to features [B, F], in evaluation mode.
        fed: its input.
        input_shape: of one image or clip, without B.
        facts: what is kept in the files' headers: where the network is from.
    """

    network: nn.Module
    fed: NetworkInput
    input_shape: tuple[int, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Loading:
    """How a written form is used, for the model card.

    Attributes:
        library: as the library's package is called.
        code: lines of Python that load it as ``model`` and apply it to ``inputs``; ``FOLDER`` stands for the path.
        notes: sentences about what differs from the network of the run.
    """

    library: str
    code: str
    notes: tuple[str, ...] = field(default_factory=tuple)


class Form(Protocol):
    """The form of one library. A new form is one file and a line in ``table.py``."""

    @property
    def name(self) -> str:
        """As ``--to`` takes it."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Packages without which nothing can be written."""
        ...

    def write(self, exported: Exportable, folder: Path) -> Loading:
        """Write the files into an empty folder.

        Raises:
            PretrainError: the library has no such network.
        """
        ...

    def read(self, exported: Exportable, folder: Path) -> Features | None:
        """What the library makes of the files, in evaluation mode; None if it is not installed.

        Args:
            exported: what ``write`` was given.
            folder: what it wrote.

        Raises:
            PretrainError: a tensor is missing or left over.
        """
        ...


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write what the library is told beside the weights."""
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """What ``write_settings`` wrote."""
    settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    return settings


def not_taken(library: str, reason: object) -> PretrainError:
    """That a library does not take the file that was written for it: its reason names what is missing or left over."""
    return PretrainError(f"{library} does not take the file: {' '.join(str(reason).split())}")


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return find_spec(package) is not None


def require_packages(form: Form) -> None:
    """Raise PretrainError if a package is missing that the form is written with."""
    missing = [package for package in form.needs if not installed(package)]
    if missing:
        raise PretrainError(
            f"--to {form.name} needs {' and '.join(missing)}; install with: pip install {' '.join(missing)}."
        )
