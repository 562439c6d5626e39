"""Pictures of what the network of a finished run makes of images: attention, patches, nearest neighbours, reconstructions."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batches import ViewBatches
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.load import load_images
from vmf_pretrain.evaluation.components import coloured_patches
from vmf_pretrain.evaluation.evaluated import Evaluated, load_evaluated
from vmf_pretrain.evaluation.features import extract_features
from vmf_pretrain.evaluation.nearest import nearest
from vmf_pretrain.evaluation.pictures import plot_neighbours, plot_pictures
from vmf_pretrain.evaluation.shown import spread
from vmf_pretrain.report.figures import sample_attention, sample_pictures
from vmf_pretrain.report.plots import plot_attention
from vmf_pretrain.report.views import VIDEO_AXES, draw_views

SHOWN = 10  # images that are shown, one of each class while there are as many
NEIGHBOURS = 8
COMPARED = 10_000  # training images that neighbours are looked for among, at most
BATCH = 256  # images a forward pass


def draw_gallery(run: Path, out: Path, *, weights: str = "last", allow_code: bool = False) -> list[Path]:
    """Write attention.png, pca.png, reconstructions.png, views.png and neighbours.png, each where the method has such.

    Images are held-out ones if there are any, and neighbours are training images.

    Args:
        run: folder of the run.
        out: folder for the pictures; made if it is not there.
        weights: "last" or "best".
        allow_code: whether the run's settings may name modules to import.

    Returns:
        What was written.

    Raises:
        PretrainError: there is no such run, no such weights, or the images are gone.
    """
    found = load_evaluated(str(run), device=torch.device("cpu"), weights=weights, allow_code=allow_code)
    config, method = found.config, found.method
    assert config is not None
    assert method is not None
    train, held_out, known = load_images(config, allow_code=allow_code)
    images = train if held_out is None else held_out
    chosen = _of_each_class(images)
    shown = images.subset(torch.tensor(chosen))
    out.mkdir(parents=True, exist_ok=True)
    drawn = list(_looks(found, config, shown, out))
    pictures = sample_pictures(config, method.evaluated, shown, method.pictures, count=SHOWN)
    if pictures:
        drawn.append(out / "reconstructions.png")
        plot_pictures(pictures, drawn[-1])
    drawn += [out / "views.png", out / "neighbours.png"]
    draw_views(ViewBatches(train, config, method.plan(config)), drawn[-2])
    _draw_neighbours(found, (shown, train), known.classes, drawn[-1], own=chosen if held_out is None else None)
    return drawn


def _looks(found: Evaluated, config: Config, shown: Images, out: Path) -> Iterator[Path]:
    """Attention and patches as colours, as far as the network has such."""
    attention = sample_attention(config, found.network, shown, count=SHOWN)
    if attention is not None:
        plot_attention(*attention, out / "attention.png")
        yield out / "attention.png"
    inputs = found.fed.of(shown.evaluation_pixels(range(len(shown))))
    with contextlib.suppress(PretrainError):  # no features of patches
        colours, _ = coloured_patches(found.network, inputs)
        plot_pictures({"image": found.fed.pixels(inputs), "first 3 components": colours}, out / "pca.png")
        yield out / "pca.png"


def _of_each_class(images: Images) -> list[int]:
    """Indices of a few images: of each class in turn, or evenly spread without classes."""
    if images.labels is None:
        return spread(len(images), SHOWN)
    labels = sorted(set(images.labels.tolist()))
    places = [(images.labels == label).nonzero().flatten().tolist() for label in labels]
    in_turn = [of_class[turn] for turn in range(SHOWN) for of_class in places if turn < len(of_class)]
    return sorted(in_turn[:SHOWN])


def _draw_neighbours(
    evaluated: Evaluated,
    images: tuple[Images, Images],
    classes: Sequence[str],
    path: Path,
    *,
    own: Sequence[int] | None = None,
) -> None:
    """Each shown image, and the other training images with the most similar features.

    Args:
        evaluated: the network.
        images: those that are shown, and those of training.
        classes: names of the classes, or none.
        path: file to write.
        own: places of the shown images among those of training; None if they are held out.
    """
    shown, train = images
    compared = spread(len(train), COMPARED)
    queries, features = (
        extract_features(evaluated.network, map(evaluated.fed.of, _pixels(some, indices)))
        for some, indices in ((shown, range(len(shown))), (train, compared))
    )
    rows = []
    for query, places in enumerate(nearest(queries, [features], NEIGHBOURS + 1)[1].tolist()):
        itself = None if own is None else own[query]
        row = [compared[place] for place in places if compared[place] != itself][:NEIGHBOURS]
        pixels = torch.cat([shown.evaluation_pixels([query]), train.evaluation_pixels(row)])
        if pixels.ndim == VIDEO_AXES:
            pixels = pixels[:, pixels.shape[1] // 2]  # of a clip, its middle frame
        rows.append((pixels, [_class(shown, query, classes), *(_class(train, index, classes) for index in row)]))
    plot_neighbours(rows, path)


def _pixels(images: Images, indices: Sequence[int]) -> Iterator[Tensor]:
    return (images.evaluation_pixels(indices[start : start + BATCH]) for start in range(0, len(indices), BATCH))


def _class(images: Images, index: int, classes: Sequence[str]) -> str:
    """Name of an image's class, nothing without classes."""
    return "" if images.labels is None or not classes else classes[int(images.labels[index])]
