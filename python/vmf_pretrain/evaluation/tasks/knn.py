"""k-NN on frozen features, as DINO and DINOv2 have it.

Legend: N training images, M test images.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from vmf_pretrain.config.tasks.knn import KnnTask
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.evaluation.accuracy import accuracies
from vmf_pretrain.evaluation.extract import Wanted
from vmf_pretrain.evaluation.knn import TOP, Voted, voted
from vmf_pretrain.evaluation.nearest import nearest
from vmf_pretrain.evaluation.result import Figure, Result
from vmf_pretrain.evaluation.splits import drawn_per_class
from vmf_pretrain.evaluation.stored import Features, rows_at
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.views import CentreSquare


class Knn(Task[KnnTask]):
    """Top-1 and top-5 accuracy of the k nearest training images' votes.

    Source: facebookresearch/dino and facebookresearch/dinov2, their k-NN evaluations; few images a class as in the latter.
    """

    name = "knn"

    def wants(self, settings: KnnTask, fed: NetworkInput) -> dict[str, Wanted]:
        """The class feature of both splits."""
        wanted = Wanted(CentreSquare(fed.size, round(fed.size * settings.resize)))
        return {"train": wanted, "test": wanted}

    def run(self, subject: Subject, settings: KnnTask) -> Result:
        """Accuracies on the test split, in the order of k; then those with few images of each class."""
        train, test = subject.features["train"], subject.features["test"]
        device = subject.evaluated.device
        rows, labels = test.last().to(device), test.labels.to(device)
        found = _votes(rows, labels, train.last_chunks(), train.labels.to(device), settings.neighbours, settings)
        figures = [figure for count, votes in found.items() for figure in accuracies(f"k {count}", [votes], (1, TOP))]
        for each in settings.per_class:
            figures += _few(rows, labels, train, each, settings)
        classes = subject.given.labelled.classes
        return Result(
            figures,
            _rows(test, found, classes),
            notes=_notes(len(train), settings),
            facts={"train_images": len(train), "test_images": len(test), "classes": len(classes)},
        )


def _votes(
    rows: Tensor,
    labels: Tensor,
    train: Iterable[Tensor],
    train_labels: Tensor,
    counts: Sequence[int],
    settings: KnnTask,
) -> dict[int, Voted]:
    cosines, places = nearest(rows, train, max(counts))
    return voted(cosines, train_labels[places], labels, counts=counts, temperature=settings.temperature)


def _few(rows: Tensor, labels: Tensor, train: Features, each: int, settings: KnnTask) -> list[Figure]:
    """Accuracies with ``each`` training images of every class, over all tries."""
    counts = sorted({count for count in settings.neighbours if count <= each} | {each})
    tries: list[dict[int, Voted]] = []
    for number in range(settings.tries):
        chosen = drawn_per_class(train.labels, lambda size: each, number)
        kept = train.labels[chosen].to(rows.device)
        tries.append(_votes(rows, labels, rows_at(train.last_chunks(), chosen), kept, counts, settings))
    named = f"{each} a class, "
    found = {count: [votes[count] for votes in tries] for count in counts}
    return [figure for count in counts for figure in accuracies(f"{named}k {count}", found[count], (1, TOP))]


def _rows(test: Features, found: dict[int, Voted], classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row of each test image: its class, and for each k what was predicted and the rank, from 1, of its own class.

    The rank is empty where no neighbour is of that class.
    """
    names, labels = test.names(), test.labels.tolist()
    rows: list[dict[str, Any]] = [
        {"image": name, "class": classes[label]} for name, label in zip(names, labels, strict=True)
    ]
    for count, votes in found.items():
        for row, predicted, rank, has_votes in zip(
            rows, votes.predicted.tolist(), votes.rank.tolist(), votes.has_votes.tolist(), strict=True
        ):
            row |= {f"predicted, k {count}": classes[predicted], f"rank, k {count}": rank + 1 if has_votes else ""}
    return rows


def _notes(train_images: int, settings: KnnTask) -> list[str]:
    notes = ["Nothing is chosen: every k is reported."]
    above = [count for count in settings.neighbours if count > train_images]
    if above:
        notes.append(f"k {', '.join(map(str, above))}: all {train_images} training images vote, as there are no more.")
    return notes
