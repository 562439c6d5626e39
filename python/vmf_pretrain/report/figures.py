"""Every PNG of a run folder."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.evaluation.attention import attention_maps
from vmf_pretrain.evaluation.features import device_of, evaluating
from vmf_pretrain.evaluation.prototypes import HeadReport
from vmf_pretrain.evaluation.shown import spread
from vmf_pretrain.storage.metrics import read_metrics
from vmf_pretrain.storage.run_folder import RunFolder

SAMPLE_IMAGES = 6


def draw_plots(
    folder: RunFolder,
    config: Config,
    head: HeadReport | None,
    attention: tuple[Tensor, Tensor] | None,
    baselines: Mapping[str, float],
    pictures: Mapping[str, Tensor],
) -> None:
    """Every PNG of the run folder; those of prototypes, class token and pictures only where there are such.

    Args:
        folder: of the run.
        config: of the run.
        head: how the head assigns images.
        attention: from ``sample_attention``.
        baselines: accuracies of k-NN without training, percent, by name.
        pictures: from ``sample_pictures``.
    """
    # here, for matplotlib takes seconds to import, and only the first rank draws
    from vmf_pretrain.evaluation.pictures import plot_pictures
    from vmf_pretrain.report.plots import plot_attention, plot_kappa, plot_knn, plot_loss, plot_usage

    records = read_metrics(folder)
    losses = [record for record in records if record.get("teacher_entropy") is not None]
    if losses:
        plot_loss(losses, config.head.prototypes, folder.plots / "loss.png")
    evaluations = [record for record in records if record.get("knn") is not None]
    plot_knn(evaluations, baselines, folder.plots / "knn.png")
    if head is not None:
        plot_usage(head.usage.cpu(), folder.plots / "usage.png")
        plot_kappa(head.norms.cpu() / config.loss.teacher_temp, folder.plots / "kappa.png")
    if attention is not None:
        plot_attention(*attention, folder.plots / "attention.png")
    if pictures:
        plot_pictures(pictures, folder.plots / "reconstructions.png")


def sample_attention(
    config: Config, backbone: nn.Module, images: Images, *, count: int = SAMPLE_IMAGES
) -> tuple[Tensor, Tensor] | None:
    """A few images [n, C, H, W] in [0, 1] and their attention maps [n, heads, h, w]; None without a class token.

    Every rank that has a part of the backbone must call it.
    """
    fed = network_input(config)
    sample = fed.of(images.evaluation_pixels(spread(len(images), count)))
    try:
        return fed.pixels(sample), attention_maps(backbone, sample).cpu()
    except PretrainError:  # no class token, or no plain attention
        return None


def sample_pictures(
    config: Config,
    backbone: nn.Module,
    images: Images,
    pictures: Callable[[Tensor], Mapping[str, Tensor]],
    *,
    count: int = SAMPLE_IMAGES,
) -> dict[str, Tensor]:
    """A few images [n, C, H, W] in [0, 1], and a method's pictures of them, by title; empty if it has none.

    Every rank that has a part of the backbone must call it.
    """
    fed = network_input(config)
    sample = fed.of(images.evaluation_pixels(spread(len(images), count)))
    with evaluating(backbone), torch.no_grad():
        beside = pictures(sample.to(device_of(backbone)))
    columns = {"image": sample, **beside} if beside else {}
    return {name: fed.pixels(rows.cpu()) for name, rows in columns.items()}
