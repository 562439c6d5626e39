"""Runs of this folder's tests: smaller still than those of the trainer's other tests, for each fault needs two of them.

``VMF_FAULTS=20 pytest tests/reliability`` tries twenty times as many faults as CI does.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tests.pretrain.tiny import digits_config, photos_config
from tests.reliability.disk import Call
from vmf_pretrain.config.run import Config

FAULTS = int(os.environ.get("VMF_FAULTS", "1"))
NETWORK: dict[str, Any] = {
    "backbone": {"patch_size": 8, "width": 8, "depth": 1, "heads": 1},
    "head": {"prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8},
}


class Ended(NamedTuple):
    """A run that nothing has stopped: what it asked of the disk, what it has learned, and its records."""

    calls: list[Call]
    state: dict[str, Tensor]
    records: list[dict[str, Any]]


def small_digits(**sections: Any) -> Config:
    """Two epochs of five steps, with a checkpoint after each."""
    return digits_config(**{**NETWORK, "evaluate": {"every": 1, "max_images": 40}, **sections})


def small_photos(folder: Path, **sections: Any) -> Config:
    """An epoch on photographs."""
    return photos_config(folder, **{**NETWORK, "evaluate": {"max_images": 40, "neighbours": 3}, **sections})


def copy_of(folder: Path, to: Path) -> Path:
    """The folder of a run, to be spoiled."""
    shutil.copytree(folder, to)
    return to
