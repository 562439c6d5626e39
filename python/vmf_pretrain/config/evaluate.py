"""How features are evaluated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vmf_pretrain.config.checks import require, require_positive

Online = Literal["knn", "linear", "few_shot"]


@dataclass(frozen=True)
class EvaluateConfig:
    """How features are evaluated during and after training.

    Attributes:
        every: epochs between two evaluations; there is always one before the first and one after the last step.
        neighbours: k of the k-NN classifier.
        temperature: temperature of its votes exp(cosine / temperature).
        max_images: largest number of images of each split that is evaluated.
        online: what is evaluated during training: k-NN, logistic regression, and the same with ``shots`` images of each
            class; a list.
        sets: folders of other images on which that is done too, with sub-folders as classes, or ``train/`` and ``val/`` with
            those; a list. Figures of a set are named after its folder, such as ``knn/flowers``.
        best: the figure that chooses the best weights: one of ``online`` on the images that the run holds out, or on a set,
            such as ``knn/flowers``.
        shots: labelled images of each class of few_shot.
        duplicate_threshold: cosine distance below which two prototypes count as duplicates.
    """

    every: int = 10
    neighbours: int = 20
    temperature: float = 0.07
    max_images: int = 10000
    online: tuple[Online, ...] = ("knn",)
    sets: tuple[str, ...] = ()
    best: str = "knn"
    shots: int = 5
    duplicate_threshold: float = 0.025

    def __post_init__(self) -> None:
        require_positive(
            "evaluate",
            every=self.every,
            neighbours=self.neighbours,
            temperature=self.temperature,
            max_images=self.max_images,
            shots=self.shots,
            duplicate_threshold=self.duplicate_threshold,
        )
        names = [Path(folder).name for folder in self.sets]
        require(
            len(set(names)) == len(names), f"evaluate.sets is {list(self.sets)}; expected folders of different names."
        )
        known = [f"{name}{end}" for end in ("", *(f"/{name}" for name in names)) for name in self.online]
        require(self.best in known, f"evaluate.best is {self.best}; expected one of {', '.join(known)}.")
