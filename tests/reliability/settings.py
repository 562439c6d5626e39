"""How much of a night's work the tests of this folder do: ``VMF_FAULTS=20 pytest tests/reliability`` does it twenty times over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.tiny import digits_config, photos_config
from vmf_pretrain.config.run import Config

FAULTS = int(os.environ.get("VMF_FAULTS", "1"))
NETWORK: dict[str, Any] = {
    "backbone": {"patch_size": 8, "width": 8, "depth": 1, "heads": 1},
    "head": {"prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8},
    "evaluate": {"every": 1, "max_images": 40},
}


def small_digits(**sections: Any) -> Config:
    """Two epochs of five steps, with a checkpoint after each."""
    return digits_config(**{**NETWORK, **sections})


def small_photos(folder: Path, **sections: Any) -> Config:
    return photos_config(folder, **{**NETWORK, "evaluate": {"max_images": 40, "neighbours": 3}, **sections})


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than the runs."""
    monkeypatch.setattr("vmf_pretrain.engine.run.draw_plots", lambda *arguments: None)
