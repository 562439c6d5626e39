"""A form, written whole or not at all, and compared with the network that it is of.

Legend: B images.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.export.form import Exportable, Form, Loading, require_packages
from vmf_pretrain.storage.durable import leads_out, remove, replace_durably, sync_folder, temporary

COMPARED = 3  # images
SEED = 0  # of them
TOLERANCE = 1e-5  # of a feature, as a share of the largest one, or of 1 if that is less: rounding of fp32
CARD = "README.md"


@dataclass(frozen=True)
class Written:
    """A form that is written.

    Attributes:
        folder: with its files.
        loading: how it is used.
        difference: the largest one of its features from those of the network, on random inputs; None if the library is not
            installed here.
    """

    folder: Path
    loading: Loading
    difference: float | None


def write_form(exported: Exportable, form: Form, folder: Path, card: Callable[[Written], str]) -> Written:
    """Write a network in a form, with a model card.

    Args:
        exported: the network.
        form: of which library.
        folder: to make; it must not exist, or be empty.
        card: makes the text of the card.

    Raises:
        PretrainError: the folder is taken or cannot be written, a package is missing, the library has no such network, or what
            it makes of the files differs from the network. Nothing is left behind.
    """
    require_packages(form)
    require_free_folder(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary(folder.with_name(f".{folder.name}.tmp-{os.getpid()}")) as unfinished:
            unfinished.mkdir()
            loading = form.write(exported, unfinished)
            written = Written(folder, loading, _difference(exported, form, unfinished))
            replace_durably(unfinished / CARD, card(written).encode())
            unfinished.replace(folder)
            try:
                sync_folder(folder.parent)
            except OSError:
                remove(folder)
                raise
    except OSError as error:
        raise PretrainError(f"{folder} cannot be written: {error.strerror or error}.") from None
    return written


def require_free_folder(folder: Path) -> None:
    """Raise PretrainError if something is there, or a symbolic link leads out of the folder around it."""
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken:
        raise PretrainError(f"{folder} already exists; remove it, or choose another folder with --out.")
    if leads_out(folder) or leads_out(folder.parent):
        raise PretrainError(f"{folder} leads elsewhere by a symbolic link; choose another folder with --out.")


@torch.no_grad()
def _difference(exported: Exportable, form: Form, folder: Path) -> float | None:
    """The largest difference of features. Raises PretrainError if it is more than rounding."""
    read = form.read(exported, folder)
    if read is None:
        return None
    inputs = torch.randn(COMPARED, *exported.input_shape, generator=torch.Generator().manual_seed(SEED))
    expected, got = exported.network(inputs), read(inputs)
    if got.shape != expected.shape:
        raise PretrainError(
            f"the {form.name} form gives features of shape {list(got.shape)}; the network's are {list(expected.shape)}."
        )
    difference = float((got - expected).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:  # also if it is NaN
        raise PretrainError(
            f"the {form.name} form differs from the network by {difference:.1e} in a feature; rounding is {allowed:.0e}."
        )
    return difference
