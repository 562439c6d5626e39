"""What a method of pretraining says; the engine does the rest.

A method has no loop, no checkpoint and no log of its own. It is a module: its parameters that require a gradient are
trained, and its state dict is what a checkpoint holds.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vmf_kernels import DINOHead
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.plan import Plan

MINIMISED = "total"  # the name of the loss that is minimised


@dataclass(frozen=True)
class Place:
    """Where in a run a step is.

    Attributes:
        step: optimizer steps done before it.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: of the run.
    """

    step: int
    steps_per_epoch: int
    epochs: int

    @property
    def epoch(self) -> int:
        """From 0; after the last step of a run, its last epoch."""
        return min(self.step // self.steps_per_epoch, self.epochs - 1)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.steps_per_epoch * self.epochs


@dataclass(frozen=True, eq=False)
class Assignment:
    """How the evaluated network assigns images to prototypes.

    Attributes:
        head: from its features to prototypes.
        temperature: of the teacher at this step.
        bias: [K] nats added to the logits, or None.
    """

    head: DINOHead
    temperature: float
    bias: Tensor | None


class Method(nn.Module, ABC):
    """What is trained.

    Args:
        config: the whole run.
        start: the place of step 0.

    A method's constructor draws its weights from the global generator, which the engine has seeded. On more than one rank it
    is constructed the same everywhere; ``forward`` gets this rank's images, and the engine averages gradients over the ranks.

    Attributes:
        evaluated_name: which network ``evaluated`` is, in words.
    """

    evaluated_name: ClassVar[str] = "the evaluated backbone"

    def __init__(self, config: Config, start: Place) -> None:
        super().__init__()
        self.config = config
        self.start = start

    @classmethod
    @abstractmethod
    def plan(cls, config: Config) -> Plan:
        """The views and masks of an image."""

    @property
    @abstractmethod
    def evaluated(self) -> nn.Module:
        """The backbone that is evaluated and exported: network inputs [B, C, H, W] to features [B, F]."""

    @property
    def exported(self) -> nn.Module:
        """The module whose state dict is written as the run's weights; ``evaluated`` is part of it."""
        return nn.ModuleDict({"backbone": self.evaluated})

    @property
    def trained(self) -> nn.Module:
        """The network whose children ``backbone``, ``head``, ``decoder`` and others take the weights that a run starts from.

        Raises:
            PretrainError: a run is to start from weights, and the method does not say which network takes them.
        """
        raise PretrainError(
            f"start_from.weights is given but {type(self).__name__} does not say what takes them: it has no property trained."
        )

    def begin(self) -> None:
        """Weights were loaded into ``trained``; what follows that network takes them over."""

    @abstractmethod
    def forward(self, batch: Batch, place: Place) -> dict[str, Tensor]:
        """[] losses of this rank's images by name, each a mean over images: "total" is minimised, and all are logged."""

    def numbers(self) -> dict[str, Tensor]:
        """[] numbers of the last batch to log, over all ranks; called on every rank, at the steps that are logged."""
        return {}

    def adjust_gradients(self, place: Place) -> None:
        """Change gradients after clipping, before the optimizer's step; setting one to None leaves its parameter out."""

    def after_step(self, place: Place, share: Tensor | float) -> None:
        """What follows the optimizer's step, such as a moving average.

        Args:
            place: of the step.
            share: 1, or 0 if the step is skipped: what follows moves by this share of its usual way.
        """

    def rates(self, place: Place) -> dict[str, float]:
        """Values of the method's own schedules, to log."""
        return {}

    def pictures(self, inputs: Tensor) -> dict[str, Tensor]:
        """Pictures to draw beside evaluated inputs [N, C, H, W], by title, of their shape and scale, in evaluation mode."""
        return {}

    def assignment(self, place: Place) -> Assignment | None:
        """How images are assigned to prototypes; None if there are none."""
        return None
