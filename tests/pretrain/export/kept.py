"""Run folders as runs leave them, without a run: random weights, saved as every run saves them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vmf_pretrain.config.file import config_text
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.methods.method import Place
from vmf_pretrain.methods.table import method_class
from vmf_pretrain.storage.run_folder import RunFolder
from vmf_pretrain.storage.weights import Weights, save_weights

STEP = 7
KNN = 61.5  # percent, of the summary


def kept_run(config: Config, out: Path) -> Path:
    """A folder with settings, summary and the last weights, all of whose tensors are far from their initialisation."""
    torch.manual_seed(3)
    method = method_class(config)(config, Place(0, 5, config.train.epochs))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (out / "weights").mkdir(parents=True)
    RunFolder(out).write_config(config_text(config))
    facts: dict[str, Any] = {"network": config.method, "step": STEP, "knn": None, "config": asdict(config)}
    path = out / "weights" / "last.safetensors"
    save_weights(Weights(path, method.exported.state_dict(), network_input(config), facts))
    (out / "summary.json").write_text(json.dumps({"knn": KNN, "linear": None, "steps": STEP}))
    return out
