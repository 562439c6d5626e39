"""What a run leaves to look at and to load: weights and plots."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vmf_pretrain.attention import attention_maps
from vmf_pretrain.config import Config
from vmf_pretrain.evaluate import HeadReport
from vmf_pretrain.images import Images
from vmf_pretrain.networks import Network
from vmf_pretrain.plots import plot_attention, plot_kappa, plot_knn, plot_loss, plot_usage
from vmf_pretrain.run_folder import RunFolder, read_metrics

SAMPLE_IMAGES = 6


def save_weights(folder: RunFolder, name: str, teacher: Network, facts: Mapping[str, Any]) -> None:
    """``weights/<name>.safetensors`` with the teacher's ``backbone.`` and ``head.``, and the facts beside it as JSON."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in teacher.state_dict().items()}
    path = folder.weights / f"{name}.safetensors"
    _replace(path, lambda temporary: save_file(tensors, str(temporary)))
    _replace(
        path.with_suffix(".json"), lambda temporary: temporary.write_text(json.dumps(dict(facts), indent=2) + "\n")
    )


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
    sample = images.evaluation_batch(_spread(len(images)))
    maps: Tensor = attention_maps(teacher.backbone, sample).cpu()
    plot_attention(sample, maps, folder.plots / "attention.png")


def _spread(count: int) -> list[int]:
    """Indices of a few images, evenly over all."""
    shown = min(SAMPLE_IMAGES, count)
    return [place * count // shown for place in range(shown)]


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)
