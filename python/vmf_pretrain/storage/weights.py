"""The results of a run to load or to look at: weights and plots."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.storage.run_folder import RunFolder


def save_weights(folder: RunFolder, name: str, teacher: nn.Module, fed: NetworkInput, facts: Mapping[str, Any]) -> None:
    """Write ``weights/<name>.safetensors`` with the teacher's ``backbone.`` and ``head.``, and beside it a JSON file with
    its network input (``input``) and the facts."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in teacher.state_dict().items()}
    path = folder.weights / f"{name}.safetensors"
    _replace(path, lambda temporary: save_file(tensors, str(temporary)))
    described = json.dumps({**facts, "input": fed.facts()}, indent=2) + "\n"
    _replace(path.with_suffix(".json"), lambda temporary: temporary.write_text(described))


def load_weights(path: Path) -> tuple[dict[str, Tensor], NetworkInput]:
    """The tensors of a ``weights/<name>.safetensors`` file and the input of its network.

    Raises:
        PretrainError: a file cannot be read, or the JSON beside the weights lacks ``input``.
    """
    beside = path.with_suffix(".json")
    try:
        tensors, facts = load_file(path), json.loads(beside.read_text())
    except (OSError, SafetensorError, ValueError) as error:
        raise PretrainError(
            f"weights {path} with {beside.name} cannot be read: {' '.join(str(error).split())}."
        ) from None
    if not isinstance(facts, dict) or not isinstance(facts.get("input"), dict):
        raise PretrainError(
            f"weights {path} do not say what they were trained on; expected input with size, channels, mean and deviation in "
            f"{beside.name}, which every version except the first writes."
        )
    return tensors, NetworkInput.from_facts(facts["input"])


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)
