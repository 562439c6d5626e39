"""Tensors by their names in a file or folder from anywhere: of ``torch.save``, of safetensors, or of a run of ours.

Nothing in it is run. Tensors are read only when they are wanted: an optimizer's state costs neither time nor memory.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from vmf_kernels.compat.checkpoints import WHOLE_TENSORS
from vmf_kernels.compat.tensor_file import Placeholder, UnreadTensor, open_entries
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.checkpoint import checkpoint_at, load_checkpoint
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.step_folders import newest_first
from vmf_pretrain.storage.tensor_file import read_tensors

SAFE = ".safetensors"
Unread = Tensor | UnreadTensor  # ``whole`` makes a tensor of either


@contextmanager
def opened(path: Path) -> Iterator[dict[str, Unread]]:
    """Tensors by dotted name, entries of entries included; ``whole`` reads them, inside ``with`` only.

    Raises:
        PretrainError: there is nothing of that kind, or it is damaged, or holds a program in place of tensors.
    """
    if path.is_dir():
        yield _in_folder(path)
    elif path.suffix == SAFE:
        yield {**read_tensors(path)[0]}
    else:
        try:
            with open_entries(path) as entries:
                yield _flat(_mapping(entries, path))
        except OSError as error:
            raise PretrainError(f"weights {path} cannot be read: {error.strerror or error}.") from None
        except ValueError as error:
            raise PretrainError(f"weights {path}: {str(error).removeprefix(f'{path} ')}.") from None


def whole(tensor: Unread) -> Tensor:
    """The tensor, on the CPU.

    Raises:
        ValueError: the file is damaged there; inside ``opened`` it becomes a PretrainError.
    """
    return tensor.read() if isinstance(tensor, UnreadTensor) else tensor


def shape_of(tensor: Unread) -> tuple[int, ...]:
    """Its shape, for which it need not be read."""
    return tuple(tensor.size) if isinstance(tensor, UnreadTensor) else tuple(tensor.shape)


def _in_folder(path: Path) -> dict[str, Unread]:
    """A run of ours: its last weights, or else its newest checkpoint; or one checkpoint, or a folder of them."""
    run = RunFolder(path)
    last = run.weights / f"last{SAFE}"
    if last.is_file():
        return {**read_tensors(last)[0]}
    if (path / "state.json").is_file():
        return _flat(checkpoint_at(path).tensors)
    for folder in (run.checkpoints, path):
        if folder.is_dir() and newest_first(folder):
            return _flat(load_checkpoint(folder).tensors)
    raise PretrainError(
        f"weights {path} is a folder without a run of ours; expected a file, a run's folder or a checkpoint."
    )


def _mapping(entries: Any, path: Path) -> Mapping[Any, Any]:
    if isinstance(entries, Mapping):
        return entries
    kind = entries.stands_for if isinstance(entries, Placeholder) else type(entries).__name__
    raise PretrainError(
        f"weights {path} hold a pickled {kind}, and reading it would run code; where you trust it, save its state_dict() with "
        "torch.save and give that file."
    )


def _flat(entries: Mapping[Any, Any], above: str = "") -> dict[str, Unread]:
    found: dict[str, Unread] = {}
    for key, value in entries.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{key}.")
        elif f"{key}".endswith("flat_param") or (
            isinstance(value, Placeholder) and ".distributed." in value.stands_for
        ):
            raise ValueError(f"it has one rank's part of {above}{key}; {WHOLE_TENSORS}")
        elif isinstance(value, Tensor | UnreadTensor):
            found[f"{above}{key}"] = value
    return found
