"""Small checkpoints for the tests, and how they are compared."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from vmf_pretrain.storage import checkpoint
from vmf_pretrain.storage.checkpoint import load_checkpoint, save_checkpoint


def some_tensors(value: float = 0.0) -> dict[str, dict[str, Tensor]]:
    return {
        "student": {"weight": torch.randn(3, 4) + value, "bias": torch.full((4,), value)},
        "rng": {"state": torch.get_rng_state()},
    }


def save(folder: Path, step: int, *, keep: int = 2, value: float | None = None) -> Path:
    """A checkpoint that can be told from others by ``value``, its step by default."""
    told = float(step) if value is None else value
    return save_checkpoint(folder, step, some_tensors(told), {"value": told}, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys(), f"got {sorted(got)}; expected {sorted(expected)}"
    for name, tensor in expected.items():
        same = got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        same = same and got[name].contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes()
        assert same, f"{name} came back as {got[name].dtype} {tuple(got[name].shape)}, or with other bits"


def quiet_load(folder: Path) -> checkpoint.Checkpoint:
    """Load; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_checkpoint(folder)
