"""Methods that start from weights in files as trainers write them."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.pretrain.methods.masked_runs import masked_config
from tests.pretrain.networks import published
from tests.pretrain.networks.published import DEPTH, HEADS, PATCH, WIDTH, backbone, drawn, head, under
from tests.pretrain.tiny import changed, digits_config
from vmf_pretrain.config.run import Config
from vmf_pretrain.engine.beginning import beginning
from vmf_pretrain.methods.method import Method, Place
from vmf_pretrain.methods.table import method_class

TOY = {"patch_size": PATCH, "width": WIDTH, "depth": DEPTH, "heads": HEADS}
HEAD = {"prototypes": published.PROTOTYPES, "hidden_dim": published.HIDDEN, "bottleneck_dim": published.BOTTLENECK}
HEAD |= {"batch_norm": False}


def config_of(
    method: str, weights: Path | str | None, *, backbone: dict[str, Any] | None = None, **sections: Any
) -> Config:
    start = None if weights is None else {"weights": str(weights), **sections.pop("start_from", {})}
    base = masked_config(method, Path()) if method in ("mae", "ijepa", "vjepa") else digits_config(head=HEAD)
    optional = {} if start is None else {"start_from": start}
    return changed(base, method=method, backbone={**TOY, **(backbone or {})}, **optional, **sections)


def started(config: Config) -> tuple[Method, str]:
    """The method after its start, in fp64, and what was said of it."""
    torch.manual_seed(0)
    said: list[str] = []
    method = method_class(config)(config, Place(0, 5, config.train.epochs)).double().eval()
    begin = beginning(config, said.append)
    assert begin is not None
    begin(method)
    return method, " ".join(said)


def saved(path: Path, entries: Any) -> Path:
    """A file of ``torch.save`` with what trainers keep beside tensors, of which reading would run code."""
    beside = {
        "args": argparse.Namespace(lr=np.float64(5e-4)),
        "epoch": 3,
        "optimizer": {"state": {0: {"step": torch.ones(())}}},
    }
    torch.save({**entries, **beside}, path)
    return path


def dino() -> dict[str, Any]:
    networks = {
        name: under("backbone.", drawn(backbone(), seed)) | under("head.", drawn(head(), seed + 1))
        for seed, name in ((1, "student"), (3, "teacher"))
    }
    center = OrderedDict(center=torch.ones(1, published.PROTOTYPES))
    return {"student": under("module.", networks["student"]), "teacher": networks["teacher"], "dino_loss": center}
