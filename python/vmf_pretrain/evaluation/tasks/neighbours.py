"""The nearest images of some, and near-duplicates among all.

Legend: M images, F features, k neighbours.
"""

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.neighbours import NeighboursTask
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.evaluation.bootstrap import mean_interval
from vmf_pretrain.evaluation.extract import Wanted
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.nearest import nearest
from vmf_pretrain.evaluation.pictures import plot_pictures
from vmf_pretrain.evaluation.result import Figure, Result
from vmf_pretrain.evaluation.shown import ordinal, pixels, spread
from vmf_pretrain.evaluation.stored import Features
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.views import CentreSquare


class Neighbours(Task[NeighboursTask]):
    """On the class feature, by cosine."""

    name = "neighbours"

    def images(self, given: Given, settings: NeighboursTask) -> dict[str, Images]:
        """All of them."""
        return {"all": given.all}

    def wants(self, settings: NeighboursTask, fed: NetworkInput) -> dict[str, Wanted]:
        """Their class features."""
        return {"all": Wanted(_view(fed.size, settings))}

    def run(self, subject: Subject, settings: NeighboursTask) -> Result:
        """Two pictures, and a row for each image with the nearest other one."""
        features, view = subject.features["all"], _view(subject.evaluated.fed.size, settings)
        if len(features) < 2:
            raise PretrainError("there is 1 image; expected at least 2, to compare.")
        cosines, places = others(features, min(settings.nearest, len(features) - 1))
        near = cosines[:, 0] >= settings.near
        queries = spread(len(features), settings.queries)
        pairs = _closest_pairs(cosines[:, 0], places[:, 0], settings.pairs)
        beside = {ordinal(rank): places[queries, rank].tolist() for rank in range(places.shape[1])}
        sheets = {
            "neighbours": _sheet(features, view, {"image": queries, **beside}),
            "pairs": _sheet(features, view, {"image": [one for one, _ in pairs], "nearest": [two for _, two in pairs]}),
        }
        share = 100 * near.double().numpy()
        names = features.names()
        rows = [
            {"image": names[place], "nearest": names[int(places[place, 0])], "cosine": float(cosines[place, 0])}
            for place in range(len(names))
        ]
        return Result(
            [
                Figure(
                    f"images with a near-duplicate, cosine {settings.near:g}",
                    float(share.mean()),
                    *mean_interval(share),
                ),
                Figure("cosine to the nearest image", float(cosines[:, 0].double().mean()), unit=""),
            ],
            rows,
            {name: _drawing(columns) for name, columns in sheets.items()},
            ["Near-duplicates are alike to this network; whether they are copies is for a person to see in pairs.png."],
        )


def others(features: Features, count: int) -> tuple[Tensor, Tensor]:
    """Cosines [M, k], descending, and places [M, k] of the nearest other images of each image."""
    cosines, places = nearest(features.last(), features.last_chunks(), count + 1)
    # an image is not always the first of its own list: a copy of it has the same cosine
    itself = places == torch.arange(len(places), device=places.device)[:, None]
    itself[:, -1] |= ~itself.any(dim=1)
    keep = (~itself).nonzero()[:, 1].reshape(len(places), -1)
    return cosines.gather(1, keep).cpu(), places.gather(1, keep).cpu()


def _closest_pairs(cosines: Tensor, places: Tensor, count: int) -> list[tuple[int, int]]:
    """Places of the most similar images and the nearest ones of them, each pair once."""
    found: dict[tuple[int, int], None] = {}
    for place in cosines.argsort(descending=True, stable=True).tolist():
        other = int(places[place])
        found.setdefault((min(place, other), max(place, other)))
        if len(found) == count:
            break
    return list(found)


def _sheet(features: Features, view: CentreSquare, columns: dict[str, list[int]]) -> dict[str, Tensor]:
    rows = features.rows
    return {title: pixels(features.images, rows[places].tolist(), view) for title, places in columns.items()}


def _drawing(columns: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    return lambda path: plot_pictures(columns, path)


def _view(size: int, settings: NeighboursTask) -> CentreSquare:
    return CentreSquare(size, round(size * settings.resize))
