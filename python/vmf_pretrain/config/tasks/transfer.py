"""The task of transfer to other images."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class TransferTask:
    """Logistic regression on other images, as the comparison of Ericsson et al. has it.

    Attributes:
        metric: "accuracy", for Cars, CIFAR, DTD, Food and SUN397; "mean_per_class", the mean of the classes' accuracies, for
            Aircraft, Caltech101, Flowers and Pets; "ap11", the mean of the classes' 11-point average precisions, for
            VOC2007, whose images have several classes: the folder holds ``ImageSets/Main`` and ``JPEGImages``, as published.
        costs: number of values of C, from 1e-5 to 1e6.
        held_out: share of the training images on which C is chosen, unless the folder has train, val and test.
        resize: shorter side that an image is resized to before the central square is cut, as a multiple of the square.
    """

    metric: Literal["accuracy", "mean_per_class", "ap11"] = "accuracy"
    costs: int = 45
    held_out: float = 0.2
    resize: float = 1.0

    def __post_init__(self) -> None:
        require_positive("transfer", costs=self.costs)
        require(0 < self.held_out < 1, f"transfer.held_out is {self.held_out} but must lie strictly between 0 and 1.")
        require(self.resize >= 1, f"transfer.resize is {self.resize} but must be at least 1, the cut square itself.")
