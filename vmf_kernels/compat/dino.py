"""Drop-in for facebookresearch/dino: ``DINOHead`` and ``DINOLoss`` with its signatures, defaults, buffers and keys.

Two lines of its ``main_dino.py`` change (README); its checkpoints load, in its own code by ``load_state_dict`` and here by
``load_checkpoint``.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from vmf_kernels.heads import DINOHead
from vmf_kernels.losses import DINOLoss, DINOvMFLoss

__all__ = ["DINOHead", "DINOLoss", "DINOvMFLoss", "load_checkpoint"]

NETWORKS = ("teacher", "student")


def load_checkpoint(
    checkpoint: str | PathLike[str] | Mapping[str, Any],
    *,
    network: str = "teacher",
    backbone: nn.Module | None = None,
    head: nn.Module | None = None,
    loss: nn.Module | None = None,
) -> None:
    """Load a published training checkpoint into our modules, strictly.

    Args:
        checkpoint: its path or, already loaded, its mapping with the entries ``teacher``, ``student`` and ``dino_loss``.
            Keys may carry the prefix ``module.`` (DDP). A file is read without running pickled code.
        network: "teacher" or "student": which one ``backbone`` and ``head`` take.
        backbone: takes the keys under ``backbone.``, or None.
        head: takes the keys under ``head.``, or None.
        loss: takes the entry ``dino_loss``, the centre, or None.

    Raises:
        ValueError: ``network`` is unknown, or the checkpoint lacks an entry or prefix; says which it has.
        RuntimeError: a tensor is missing, left over or of another shape (from ``load_state_dict``).
    """
    if network not in NETWORKS:
        raise ValueError(f"network is {network!r}; expected one of {', '.join(NETWORKS)}")
    entries = checkpoint if isinstance(checkpoint, Mapping) else _read(checkpoint)
    if not isinstance(entries, Mapping):
        raise ValueError(f"checkpoint holds {type(entries).__name__}; expected a mapping with the entry {network!r}")
    for module, prefix in ((backbone, "backbone."), (head, "head.")):
        if module is not None:
            module.load_state_dict(_under(_entry(entries, network), prefix, network))
    if loss is not None:
        loss.load_state_dict(dict(_entry(entries, "dino_loss")))


def _read(path: str | PathLike[str]) -> Mapping[str, Any]:
    # published checkpoints carry their command line as an argparse.Namespace, the one class beside tensors let through
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            entries: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (struct.error, EOFError) as error:  # how torch meets a file that is no checkpoint at all
            raise ValueError(
                f"{path} is not a torch checkpoint ({error}); expected a file that torch.save wrote"
            ) from None
    return entries


def _entry(entries: Mapping[str, Any], name: str) -> Mapping[str, Tensor]:
    if name not in entries:
        raise ValueError(f"checkpoint has the entries {', '.join(map(str, entries))}; expected {name!r} among them")
    entry = entries[name]
    if not isinstance(entry, Mapping):
        raise ValueError(f"checkpoint entry {name!r} is {type(entry).__name__}; expected a mapping of names to tensors")
    return entry


def _under(state: Mapping[str, Tensor], prefix: str, network: str) -> dict[str, Tensor]:
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    found = {key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)}
    if not found:
        heads = sorted({key.split(".")[0] for key in plain})
        raise ValueError(f"the {network} entry has keys under {', '.join(heads)}; expected some under {prefix!r}")
    return found
