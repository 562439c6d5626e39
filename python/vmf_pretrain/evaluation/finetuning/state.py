"""How far a fine-tuning has come, on disk, so that one that was killed goes on.

No generator is kept: each step and each view draws from a stream of its own.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.storage.durable import replace_durably, temporary
from vmf_pretrain.storage.optimizer_state import flatten_optimizer, restore_optimizer
from vmf_pretrain.storage.tensor_file import read_tensors, write_tensors

SECONDS_BETWEEN = 60.0  # of two states: writing that of a ViT-L, 3.6 GB, takes some of them
OF, EPOCHS, FOUND = "of", "epochs", "found"  # texts in the files
WEIGHTS, OPTIMIZER = "weights.", "optimizer."  # how names of tensors begin


class Kept:
    """The state of one fine-tuning in a file.

    Args:
        path: of the file, whose folder is made when it is written.
        of: fingerprint of all that the state depends on. A file of anything else, or a damaged one, is as none.
    """

    def __init__(self, path: Path, of: str) -> None:
        self.path, self.of = path, of
        self._written = time.monotonic()

    def restore(self, classifier: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Fill in the state of the file; after how many epochs it is, 0 where there is none and nothing changes."""
        try:
            tensors, texts = read_tensors(self.path)
        except PretrainError:  # not there, or no whole file
            return 0
        if texts.get(OF) != self.of:
            return 0
        parts = {
            kind: {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
            for kind in (WEIGHTS, OPTIMIZER)
        }
        classifier.load_state_dict(parts[WEIGHTS])
        restore_optimizer(optimizer, parts[OPTIMIZER])
        return int(texts[EPOCHS])

    def epoch_ended(self, epochs: int, classifier: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the state after some epochs, unless one was kept less than SECONDS_BETWEEN ago.

        Raises:
            PretrainError: the disk is full or read-only.
        """
        if time.monotonic() - self._written < SECONDS_BETWEEN:
            return
        tensors = {f"{WEIGHTS}{name}": value for name, value in classifier.state_dict().items()}
        tensors |= {f"{OPTIMIZER}{name}": value for name, value in flatten_optimizer(optimizer).items()}
        try:
            self.path.parent.mkdir(exist_ok=True)
            with temporary(self.path.with_name(f".tmp-{self.path.name}")) as unfinished:
                write_tensors(unfinished, tensors, {OF: self.of, EPOCHS: str(epochs)})
                unfinished.replace(self.path)
        except OSError as error:
            raise PretrainError(f"{self.path} cannot be written ({error.strerror or error}).") from None
        self._written = time.monotonic()


def found_once(path: Path, of: str, work: Callable[[], float]) -> float:
    """The number that ``work`` returns, or returned when it was done before.

    Args:
        path: of the file that keeps it.
        of: fingerprint of all that the number depends on.
        work: what takes long.

    Raises:
        PretrainError: the disk is full or read-only.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if said[OF] == of:
            return float(said[FOUND])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or damaged
    found = work()
    try:
        path.parent.mkdir(exist_ok=True)
        replace_durably(path, json.dumps({OF: of, FOUND: found}).encode())
    except OSError as error:
        raise PretrainError(f"{path} cannot be written ({error.strerror or error}).") from None
    return found
