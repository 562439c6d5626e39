"""A map-style torch Dataset of the user's own, by import path. It runs code, so the command must allow it."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.decode import pixels_of

EXPECTED = "expected an image, or a tuple that begins with one: PIL, a tensor [C, H, W] or an array [H, W, C]"


class UserSource:
    """The images of a Dataset: items are a PIL image, a tensor or an array, alone or first in a tuple.

    Args:
        path: "module:attribute"; a class or a function that returns the Dataset.
        arguments: keyword arguments of that call.
        allow_code: whether the person who started the run allows it to import and call this.

    Raises:
        PretrainError: not allowed, not found, fails, or has no length.
    """

    def __init__(self, path: str, arguments: Mapping[str, Any], *, allow_code: bool) -> None:
        if not allow_code:
            raise PretrainError(
                f"data.dataset {path} runs code of its own; if you trust it and this configuration, add --allow-code."
            )
        self.path = path
        self.dataset = _built(path, arguments)
        self.skipped: Mapping[str, int] = {}
        self.notes: Sequence[str] = ()

    @property
    def names(self) -> Sequence[str]:
        """The import path and the place."""
        return _Numbered(self.path, len(self.dataset))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Zeros: a Dataset does not tell."""
        return np.zeros(len(self.dataset), dtype=np.int64)

    def read(self, index: int) -> bytes | Image.Image | Tensor:
        """The image of an item."""
        try:
            item = self.dataset[index]
        except Exception as error:  # the code of a stranger may raise anything
            raise UnreadableImageError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
        image = item[0] if isinstance(item, tuple | list) and item else item
        if isinstance(image, bytes | Image.Image):
            return image
        if isinstance(image, Tensor | np.ndarray):
            return pixels_of(image)
        raise UnreadableImageError(f"item {index} is {type(item).__name__}; {EXPECTED}")

    def stamp(self, index: int) -> None:
        """Nothing tells when an item changes."""
        return

    def labels(self) -> tuple[Tensor | None, list[str]]:
        """[N] int64 from the Dataset's ``targets``, as torchvision's have them, and the names of the classes."""
        targets = getattr(self.dataset, "targets", None)
        if targets is None or len(targets) != len(self.dataset):
            return None, []
        labels = torch.as_tensor(targets)
        if labels.ndim != 1 or labels.is_floating_point():
            return None, []
        known, places = torch.unique(labels.long(), return_inverse=True)
        return (places, [str(label) for label in known.tolist()]) if len(known) > 1 else (None, [])


class _Numbered(Sequence[str]):
    """Names by place, made when they are asked for."""

    def __init__(self, path: str, count: int) -> None:
        self._path, self._count = path, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return f"{self._path}[{index}]"


def _built(path: str, arguments: Mapping[str, Any]) -> Any:
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise PretrainError(f'data.dataset is {path}; expected "module:attribute".')
    try:
        made = getattr(importlib.import_module(module), attribute)(**arguments)
        count = len(made)
    except Exception as error:  # the code of a stranger may raise anything
        reason = " ".join(str(error).split())
        raise PretrainError(f"data.dataset {path} cannot be built ({type(error).__name__}: {reason}).") from error
    if count == 0:
        raise PretrainError(f"data.dataset {path} holds no image.")
    return made
