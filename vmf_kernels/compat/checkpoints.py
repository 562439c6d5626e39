"""Published training checkpoints, read without running pickled code and loaded strictly."""

from __future__ import annotations

import argparse
import struct
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

NETWORKS = ("teacher", "student")


def load_networks(
    checkpoint: str | PathLike[str] | Mapping[str, Any],
    network: str,
    modules: Mapping[str, nn.Module | None],
    losses: Mapping[str, nn.Module | None],
) -> None:
    """Load parts of one network, and losses, strictly.

    Args:
        checkpoint: its path or, already loaded, its mapping of entries. Keys may carry the prefix ``module.`` (DDP).
        network: "teacher" or "student", an entry.
        modules: by the prefix of their keys there ("backbone.", "head."); None is passed over.
        losses: by the name of their entry; None is passed over.

    Raises:
        ValueError: ``network`` is unknown, or the checkpoint lacks an entry or prefix; says which it has.
        RuntimeError: a tensor is missing, left over or of another shape (from ``load_state_dict``).
    """
    if network not in NETWORKS:
        raise ValueError(f"network is {network!r}; expected one of {', '.join(NETWORKS)}")
    entries = checkpoint if isinstance(checkpoint, Mapping) else _read(checkpoint)
    if not isinstance(entries, Mapping):
        raise ValueError(f"checkpoint holds {type(entries).__name__}; expected a mapping with the entry {network!r}")
    for prefix, module in modules.items():
        if module is not None:
            module.load_state_dict(_under(_entry(entries, network), prefix, network))
    for name, loss in losses.items():
        if loss is not None:
            loss.load_state_dict(dict(_entry(entries, name)))


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
