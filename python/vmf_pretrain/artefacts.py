"""The results of a run to load or to look at: weights and plots."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vmf_pretrain.attention import attention_maps
from vmf_pretrain.config import Config
from vmf_pretrain.errors import PretrainError
from vmf_pretrain.evaluate import HeadReport
from vmf_pretrain.images import Images
from vmf_pretrain.network_input import NetworkInput, network_input
from vmf_pretrain.networks import Network
from vmf_pretrain.plots import plot_attention, plot_kappa, plot_knn, plot_loss, plot_usage
from vmf_pretrain.run_folder import RunFolder, read_metrics

SAMPLE_IMAGES = 6


def save_weights(folder: RunFolder, name: str, teacher: Network, fed: NetworkInput, facts: Mapping[str, Any]) -> None:
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


def draw_plots(
    folder: RunFolder, config: Config, head: HeadReport, teacher: Network, images: Images, baselines: dict[str, float]
) -> None:
    """Every PNG of the run folder."""
    records = read_metrics(folder)
    losses = [record for record in records if record.get("loss") is not None]
    if losses:
        plot_loss(losses, config.head.prototypes, folder.plots / "loss.png")
    evaluations = [record for record in records if record.get("knn") is not None]
    plot_knn(evaluations, baselines, folder.plots / "knn.png")
    plot_usage(head.usage.cpu(), folder.plots / "usage.png")
    plot_kappa(head.norms.cpu() / config.loss.teacher_temp, folder.plots / "kappa.png")
    fed = network_input(config)
    sample = fed.of(images.evaluation_pixels(_spread(len(images))))
    maps: Tensor = attention_maps(teacher.backbone, sample).cpu()
    plot_attention(fed.pixels(sample), maps, folder.plots / "attention.png")


def _spread(count: int) -> list[int]:
    """Indices of a few images, evenly spread over all."""
    shown = min(SAMPLE_IMAGES, count)
    return [place * count // shown for place in range(shown)]


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)
