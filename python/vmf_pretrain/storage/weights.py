"""Weights that others load: the tensors of a network, the input it is used with, and facts about the run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.storage.durable import replace_durably, sync_folder, temporary
from vmf_pretrain.storage.tensor_file import read_tensors, write_tensors

FACTS = "vmf_pretrain"  # entry of the file's own header: the same JSON as beside it


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights to write.

    Attributes:
        path: ``weights/<name>.safetensors``.
        tensors: by name: of the teacher, those of ``backbone.`` and ``head.``.
        fed: what the network is fed with.
        facts: anything that JSON can hold: step, accuracy, configuration.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    fed: NetworkInput
    facts: Mapping[str, Any]


def save_weights(weights: Weights) -> None:
    """Write ``<name>.safetensors`` and, for people, ``<name>.json`` with the network input (``input``) and the facts.

    The safetensors file has the same facts in its header, so it is complete alone. Each file is written whole or not at all.

    Raises:
        OSError: the disk is full or read-only; the files of before are intact.
    """
    described = json.dumps({**weights.facts, "input": weights.fed.facts()}, indent=2) + "\n"
    path = weights.path
    with temporary(path.with_name(f".{path.name}.tmp")) as unfinished:
        write_tensors(unfinished, weights.tensors, {"format": "pt", FACTS: described})
        unfinished.replace(path)
        sync_folder(path.parent)
    replace_durably(path.with_suffix(".json"), described.encode())


def load_weights(path: Path) -> tuple[dict[str, Tensor], NetworkInput]:
    """The tensors of a ``weights/<name>.safetensors`` file and the input of its network.

    Raises:
        PretrainError: the file cannot be read, is not well formed, or neither it nor the JSON beside it has ``input``.
    """
    tensors, facts = described_weights(path)
    return tensors, NetworkInput.from_facts(facts["input"])


def described_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of such a file, and its facts with ``input``. Raises as ``load_weights`` does."""
    tensors, metadata = read_tensors(path)
    beside = path.with_suffix(".json")
    try:
        # earlier versions wrote the facts beside the weights only
        facts = json.loads(metadata[FACTS] if FACTS in metadata else beside.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise PretrainError(
            f"weights {path} do not say what they were trained on, and {beside.name} beside them cannot be read: "
            f"{' '.join(str(error).split())}."
        ) from None
    if not isinstance(facts, dict) or not isinstance(facts.get("input"), dict):
        raise PretrainError(
            f"weights {path} do not say what they were trained on; expected input with size, channels, mean and deviation in "
            f"their header or in {beside.name}, which every version except the first writes."
        )
    return tensors, facts
