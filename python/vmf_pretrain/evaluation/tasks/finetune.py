"""Fine-tuning of all weights, as iBOT has it; transfer with frozen weights is another protocol, in no table with this one.

Legend: N training images, M test images, F features, C classes.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.finetune import FinetuneTask, Protocol
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.evaluation.accuracy import accuracies
from vmf_pretrain.evaluation.extract import Wanted, images_facts
from vmf_pretrain.evaluation.finetuning.network import Classifier
from vmf_pretrain.evaluation.finetuning.state import Kept, found_once
from vmf_pretrain.evaluation.finetuning.train import Labelled, Machine, fine_tuned, logits_of
from vmf_pretrain.evaluation.pictures import plot_curves
from vmf_pretrain.evaluation.result import Result
from vmf_pretrain.evaluation.scores import Known, Predicted, predicted
from vmf_pretrain.evaluation.splits import held_out_per_class
from vmf_pretrain.evaluation.stored import Features, fingerprint
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.views import CentreSquare
from vmf_pretrain.storage.durable import remove

SEED = 0  # of the images held out for the choice
SPLITS = ("train", "test")
RESIZE = 256 / 224  # of the shorter side of test images, as a multiple of the square, as published
UNFINISHED = "unfinished"  # folder of what a killed evaluation goes on from
Curve = list[tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Split:
    """Readable images of a split.

    Attributes:
        images: N.
        labels: [N] int64, as they are.
    """

    images: Images
    labels: Tensor

    @classmethod
    def of(cls, features: Features) -> "Split":
        """Those whose features could be computed."""
        return cls(features.images.subset(features.rows), features.labels)

    def some(self, places: Tensor) -> "Split":
        """Those at some places."""
        return Split(self.images.subset(places), self.labels[places])

    def facts(self) -> dict[str, Any]:
        """What tells it from others, as JSON holds it."""
        return {**images_facts(self.images), "labels": self.labels.tolist()}


class Finetune(Task[FinetuneTask]):
    """Top-1 and top-5 accuracy after the last epoch. It is computed by the first rank, on one device.

    One that was killed goes on: rates that were tried are not tried again, and a training goes on after an epoch that is on
    disk.

    Source: repository bytedance/ibot, evaluation/classification_layer_decay and evaluation/eval_cls.py. Those report the epoch
    and the rate that are best on the images they report; here a rate is chosen on a share of the training images, and the last
    epoch counts.
    """

    name = "finetune"
    version = 2  # each step draws from a stream of its own

    def wants(self, settings: FinetuneTask, fed: NetworkInput) -> dict[str, Wanted]:
        """The class feature of both splits, which shows what can be read and how long a feature is."""
        return dict.fromkeys(SPLITS, Wanted(_view(settings.chosen(), fed)))

    def run(self, subject: Subject, settings: FinetuneTask) -> Result:
        """Accuracies on the test split."""
        train, test = (Split.of(subject.features[name]) for name in SPLITS)
        known, protocol = Known.of(train.labels), settings.chosen()
        curve = _curve(subject, train, known, settings)
        if curve:
            protocol = replace(protocol, rate=max(curve, key=lambda pair: pair[1])[0])
        fitted = _fitted(subject, train, known, protocol, settings)
        answers = _answers(subject, fitted, test, known, protocol)
        remove(subject.folder / UNFINISHED)
        classes = subject.given.labelled.classes
        names = subject.features["test"].names()
        rows: list[dict[str, Any]] = [
            {"image": name, "class": classes[label], "predicted": classes[best], "rank": rank + 1 if there else ""}
            for name, label, best, rank, there in zip(
                names,
                test.labels.tolist(),
                answers.label.tolist(),
                answers.rank.tolist(),
                answers.known.tolist(),
                strict=True,
            )
        ]
        across, up = "learning rate", "accuracy on the images held out for the choice, %"
        pictures = {"rates": functools.partial(plot_curves, {"fine-tuning": curve}, across, up)} if curve else {}
        facts = {"rate": protocol.rate, "held_out_accuracy": curve, "train_images": len(train.labels)}
        return Result(
            accuracies("fine-tuned", [answers], (1, 5)), rows, pictures, [_note(settings, protocol, curve)], facts
        )


def _curve(subject: Subject, train: Split, known: Known, settings: FinetuneTask) -> Curve:
    """Accuracy with each rate on the images held out for the choice, percent; none where there is one rate."""
    if len(settings.rates) < 2:
        return []
    kept, out = (train.some(places) for places in held_out_per_class(train.labels, settings.held_out, SEED))
    if not len(out.labels):
        raise PretrainError("every class has one training image; expected two of some class, to choose on one of them.")
    found: Curve = []
    for rate in settings.rates:
        protocol = replace(settings.chosen(), rate=rate)
        path = subject.folder / UNFINISHED / f"rate_{rate:g}.json"
        judged = functools.partial(_judged, subject, kept, out, known, protocol, settings)
        found.append((rate, found_once(path, _fingerprint(subject, (kept, out), protocol), judged)))
    return found


def _judged(
    subject: Subject, train: Split, out: Split, known: Known, protocol: Protocol, settings: FinetuneTask
) -> float:
    """Percent of ``out`` that are right after training."""
    fitted = _fitted(subject, train, known, protocol, settings)
    return 100 * float(_answers(subject, fitted, out, known, protocol).correct().mean())


def _fitted(subject: Subject, train: Split, known: Known, protocol: Protocol, settings: FinetuneTask) -> Classifier:
    evaluated = subject.evaluated
    length = next(subject.features["train"].last_chunks()).shape[1]
    labelled = Labelled(train.images, torch.searchsorted(known.classes, train.labels), len(known))
    state = Kept(subject.folder / UNFINISHED / "training.safetensors", _fingerprint(subject, (train,), protocol))
    machine = Machine(subject.dtype, settings.workers, state)
    return fine_tuned(evaluated.network, length, evaluated.fed, labelled, protocol, machine)


def _fingerprint(subject: Subject, splits: Sequence[Split], protocol: Protocol) -> str:
    """Of all that a training, or what it is judged by, depends on beside the versions of libraries."""
    return fingerprint(
        {
            "weights": subject.evaluated.fingerprint,
            "input": subject.evaluated.fed.facts(),
            "images": [split.facts() for split in splits],
            "protocol": asdict(protocol),
            "dtype": str(subject.dtype),
        }
    )


def _answers(subject: Subject, fitted: Classifier, some: Split, known: Known, protocol: Protocol) -> Predicted:
    fed = subject.evaluated.fed
    found = logits_of(fitted, fed, some.images, _view(protocol, fed), protocol.part, subject.dtype)
    return predicted(lambda rows: rows, torch.cat([part.cpu() for part in found]), some.labels, known)


def _view(protocol: Protocol, fed: NetworkInput) -> CentreSquare:
    return CentreSquare(fed.size, int(fed.size * RESIZE), protocol.resize_by)


def _note(settings: FinetuneTask, protocol: Protocol, curve: Curve) -> str:
    """How it came about."""
    best = dict(curve).get(protocol.rate)
    chosen = (
        "nothing is chosen" if best is None else f"the best of {len(curve)} on held-out training images ({best:.2f} %)"
    )
    return (
        f"All weights trained as iBOT's {settings.protocol}: {protocol.epochs} epochs, rate {protocol.rate:g} ({chosen}), "
        f"layer decay {protocol.layer_decay:g}, drop path {protocol.drop_path:g}; the last epoch counts. Not comparable with "
        "frozen weights."
    )
