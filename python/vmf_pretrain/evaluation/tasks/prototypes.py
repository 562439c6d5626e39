"""How the head of a run assigns images to prototypes, and what the prototypes show.

Legend: M images, K prototypes, D bottleneck dimension.
"""

from dataclasses import replace
from typing import Any

import torch

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.prototypes import PrototypesTask
from vmf_pretrain.data.images import Images
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.evaluation.evaluated import Evaluated, fingerprint_of
from vmf_pretrain.evaluation.extract import Wanted
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.pictures import plot_pictures
from vmf_pretrain.evaluation.prototypes import HeadReport, nearest_rows, report_head
from vmf_pretrain.evaluation.result import Figure, Result
from vmf_pretrain.evaluation.shown import ordinal, pixels
from vmf_pretrain.evaluation.task import Subject, Task
from vmf_pretrain.evaluation.views import CentreSquare
from vmf_pretrain.methods.method import Assignment, Place
from vmf_pretrain.storage.checkpoint import load_checkpoint

OWN = "method"  # group of a checkpoint: tensors that stand directly in a method
NO_PROTOTYPES = "has no prototypes; expected a run of a method that has, such as dino-vmf."


class PrototypesOfRun(Task[PrototypesTask]):
    """Needs a run whose method has prototypes."""

    name = "prototypes"

    def images(self, given: Given, settings: PrototypesTask) -> dict[str, Images]:
        """All of them."""
        return {"all": given.all}

    def depends_on_run(self, evaluated: Evaluated) -> dict[str, Any]:
        """The head, the centre, and whether a checkpoint has it."""
        if evaluated.method is None:
            return {}
        centred = _restored(evaluated)
        known = evaluated.method if centred else evaluated.method.exported  # the rest of it is drawn anew each time
        return {"centred": centred, "head": fingerprint_of(known, evaluated.fed)}

    def wants(self, settings: PrototypesTask, fed: NetworkInput) -> dict[str, Wanted]:
        """Their class features."""
        return {"all": Wanted(_view(fed.size, settings))}

    def run(self, subject: Subject, settings: PrototypesTask) -> Result:
        """Figures of the head, a row for each prototype, and the nearest images of those that are used most."""
        assignment, notes = _assignment(subject.evaluated)
        features = subject.features["all"]
        rows = features.last()
        report = report_head(assignment, rows, threshold=settings.eps)
        shown = report.usage.argsort(descending=True, stable=True)[: settings.shown]
        _, places = nearest_rows(assignment, rows, shown, min(settings.nearest, len(rows)))
        view = _view(subject.evaluated.fed.size, settings)
        columns = {
            ordinal(rank): pixels(features.images, features.rows[places[:, rank]].tolist(), view)
            for rank in range(places.shape[1])
        }
        kappa = report.norms / assignment.temperature
        titles = [f"{place}\n{100 * report.usage[place]:.2g} %\nκ {kappa[place]:.3g}" for place in shown.tolist()]
        return Result(
            _figures(report, assignment),
            _rows(report, assignment),
            {"prototypes": lambda path: plot_pictures(columns, path, titles)},
            [*notes, "Nearest images are those whose bottleneck feature has the largest cosine with the prototype."],
            {"images": len(rows), "prototypes": len(report.norms), "temperature": assignment.temperature},
        )


def _assignment(evaluated: Evaluated) -> tuple[Assignment, list[str]]:
    """The head at the end of its run, and what is to be said about its centre."""
    method, config = evaluated.method, evaluated.config
    if method is None or config is None:
        raise PretrainError(f"{evaluated.name} {NO_PROTOTYPES}")
    centred = _restored(evaluated)
    last = Place(
        config.train.epochs - 1, 1, config.train.epochs
    )  # as the loader built the method: of steps of one epoch each
    assignment = method.assignment(last)
    if assignment is None:
        raise PretrainError(f"{evaluated.name} {NO_PROTOTYPES}")
    notes = ["The temperature is that of the end of the run."]
    if not centred:
        assignment = replace(assignment, bias=None)  # before its first batch, a method's centre is no number
        notes.append(
            "The centre of the head is not in these weights, and no checkpoint of their step was found: none is used."
        )
    return assignment, notes


def _restored(evaluated: Evaluated) -> bool:
    """Whether the whole state of the method, with its centre, was found in a checkpoint of the same step, and is in place."""
    if evaluated.run is None or evaluated.method is None:
        return False
    try:
        found = load_checkpoint(evaluated.run.checkpoints)
    except PretrainError:  # a folder without one
        return False
    if found.step != evaluated.facts.get("step"):
        return False
    groups = {group: tensors for group, tensors in found.tensors.items() if group != OWN}
    flat = {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
    flat |= found.tensors.get(OWN, {})
    state = evaluated.method.state_dict()
    if any(name not in flat or flat[name].shape != tensor.shape for name, tensor in state.items()):
        return False
    evaluated.method.load_state_dict({name: flat[name] for name in state})
    return True


def _figures(report: HeadReport, assignment: Assignment) -> list[Figure]:
    count = len(report.norms)
    kappa = (report.norms / assignment.temperature).double()
    figures = [
        Figure("mutual information of images and prototypes", report.mutual_information, unit="nats"),
        Figure("entropy of their usage", report.usage_entropy, unit="nats"),
        Figure("mean entropy of an image's assignment", report.teacher_entropy, unit="nats"),
        Figure(f"used, of {count}", report.prototypes_used, unit="prototypes"),
        Figure(f"unique, of {count}", report.unique_prototypes, unit="prototypes"),
        Figure("largest set of duplicates", round(report.largest_duplicate_share * count), unit="prototypes"),
    ]
    for name, share in (("smallest", 0.0), ("median", 0.5), ("largest", 1.0)):
        figures.append(
            Figure(f"{name} precision (norm over temperature)", float(torch.quantile(kappa, share)), unit="")
        )
    return figures


def _rows(report: HeadReport, assignment: Assignment) -> list[dict[str, Any]]:
    """One of each prototype."""
    usage, norms = report.usage.tolist(), report.norms.tolist()
    return [
        {
            "prototype": place,
            "usage": usage[place],
            "norm": norms[place],
            "precision": norms[place] / assignment.temperature,
        }
        for place in range(len(norms))
    ]


def _view(size: int, settings: PrototypesTask) -> CentreSquare:
    return CentreSquare(size, round(size * settings.resize))
