"""Drop-in for facebookresearch/dino: ``DINOHead`` and ``DINOLoss`` with its signatures, defaults, buffers and keys.

Change two lines of its ``main_dino.py`` (README). Its checkpoints load: in its own code by ``load_state_dict``, elsewhere by
``load_checkpoint``.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from vmf_kernels.compat.checkpoints import load_networks
from vmf_kernels.heads.dino import DINOHead
from vmf_kernels.losses.dino import DINOLoss, DINOvMFLoss

__all__ = ["DINOHead", "DINOLoss", "DINOvMFLoss", "load_checkpoint"]


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
        checkpoint: its path, or its mapping, already loaded, with the entries ``teacher``, ``student`` and ``dino_loss``.
            Keys may contain the names of wrappers, ``module.`` (DDP) or ``_orig_mod.`` (torch.compile). Reading a file runs no
            pickled code: values that are not tensors (command line, configuration, numpy scalars) are skipped.
        network: "teacher" or "student": the network from which ``backbone`` and ``head`` are loaded.
        backbone: loads the keys under ``backbone.``, or None.
        head: loads the keys under ``head.``, or None. Its last layer may be stored plain or in either form of weight norm.
        loss: loads the entry ``dino_loss``, the centre, or None.

    Raises:
        ValueError: ``network`` is unknown, ``torch.save`` did not write the file, or the checkpoint lacks an entry or prefix;
            the text lists those that it has.
        OSError: the file cannot be opened; FileNotFoundError if it does not exist.
        RuntimeError: a tensor is missing, left over or of another shape (from ``load_state_dict``).

    Example:
        >>> saved, head = (DINOHead(8, 512, hidden_dim=16, bottleneck_dim=4) for _ in range(2))
        >>> run = {"teacher": {f"head.{key}": value for key, value in saved.state_dict().items()}}  # or the path of a file
        >>> load_checkpoint(run, network="teacher", head=head)
        >>> torch.equal(head.last_layer.weight, saved.last_layer.weight)
        True
    """
    load_networks(checkpoint, network, {"backbone.": backbone, "head.": head}, {"dino_loss": loss})
