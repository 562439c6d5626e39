"""What a task of an evaluation says; the suite does the rest.

A task is one file in ``evaluation/tasks/``, one line in its table, and one dataclass of settings: a section of
``EvaluationConfig`` under the task's name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from vmf_pretrain.data.images import Images
from vmf_pretrain.data.network_input import NetworkInput
from vmf_pretrain.evaluation.evaluated import Evaluated
from vmf_pretrain.evaluation.extract import Wanted
from vmf_pretrain.evaluation.given import Given
from vmf_pretrain.evaluation.result import Result
from vmf_pretrain.evaluation.stored import Features

Settings = TypeVar("Settings")


@dataclass(frozen=True, eq=False)
class Subject:
    """What a task works on.

    Attributes:
        evaluated: the network.
        given: the images and folders.
        images: by name, as the task named them.
        features: of those that the task wanted features of, under the same names.
        folder: of the result, for files of the task's own; it exists.
        dtype: that a forward pass of the task's own is to compute in, as that of the features does (``outputs.precision``).
    """

    evaluated: Evaluated
    given: Given
    images: Mapping[str, Images]
    features: Mapping[str, Features]
    folder: Path
    dtype: torch.dtype = torch.float32


class Task(ABC, Generic[Settings]):
    """A task. It has no state.

    Attributes:
        name: of the task, of its section of the settings, and of its files.
        version: raised by whoever changes its figures, so that what an earlier version found is not taken for them.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    def images(self, given: Given, settings: Settings) -> dict[str, Images]:
        """The images that the task reads, by name; by default "train" and "test" with labels.

        Raises:
            PretrainError: there are no such images.
        """
        splits = given.labelled
        return {"train": splits.train, "test": splits.test}

    def depends(self, given: Given, settings: Settings) -> dict[str, Any]:
        """What else the result depends on, as JSON holds it: digests of ground truth, masks, predictions."""
        return {}

    def depends_on_run(self, evaluated: Evaluated) -> dict[str, Any]:
        """What the result depends on of the run beside its evaluated network, as JSON holds it: its head, its checkpoint."""
        return {}

    def wants(self, settings: Settings, fed: NetworkInput) -> dict[str, Wanted]:
        """Which features the task wants, under the names of its images; features of equal images are computed once for all.

        Args:
            settings: of the task.
            fed: the network's input; its size is that of the square it is to see.
        """
        return {}

    @abstractmethod
    def run(self, subject: Subject, settings: Settings) -> Result:
        """The result. It is deterministic: what is drawn comes from generators seeded with constants or settings.

        Raises:
            PretrainError: the task cannot be done on these images, in one sentence.
        """
