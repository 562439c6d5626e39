"""Whether a head has collapsed, that of class tokens or that of patches, and how. No torch is needed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vmf_pretrain.config.run import Config
from vmf_pretrain.report import bands
from vmf_pretrain.report.bands import Curves

Form = Literal["one-hot", "uniform", "constant"]

PATCH = "patch_"  # begins the names of the patches' figures
FIGURES = ("mutual_information", "teacher_entropy", "prototypes_in_use")
LEADS: dict[Form, str] = {  # the figure that tells most
    "one-hot": "prototypes_in_use",
    "uniform": "teacher_entropy",
    "constant": "mutual_information",
}


@dataclass(frozen=True)
class Head:
    """What is logged of the assignments to prototypes of class tokens, or of patches.

    Attributes:
        curves: of the steps in which there were any.
        prefix: begins the names of its figures: nothing, or ``PATCH``.
        prototypes: how many there are.
    """

    curves: Curves
    prefix: str
    prototypes: int

    @classmethod
    def of_class_tokens(cls, curves: Curves, config: Config) -> "Head":
        """The head that every method with prototypes has."""
        return cls(curves, "", config.head.prototypes)

    @classmethod
    def of_patches(cls, curves: Curves, config: Config) -> "Head":
        """The head of masked patches, at the steps that had some."""
        begun = config.masks.start_epoch
        masked = [record for record in curves.records if int(record.get("epoch", 0)) > begun and _masked(record)]
        return cls(Curves(masked, ()), PATCH, config.patch_prototypes)

    @property
    def dead(self) -> bool:
        """Whether its last logged steps lie in a band of collapse."""
        curves, prefix = self.curves, self.prefix
        return (
            curves.held_below(f"{prefix}prototypes_in_use", bands.one_hot_use(self.prototypes))
            or curves.held_above(f"{prefix}teacher_entropy", bands.flat_entropy(self.prototypes))
            or curves.held_below(f"{prefix}mutual_information", bands.DEAD_INFORMATION)
        )

    @property
    def fell(self) -> bool:
        """Whether it has told more before: large untrained networks begin with nothing, and leave it."""
        information = self.curves.values(f"{self.prefix}mutual_information")
        return bool(information) and max(information) > bands.FELL * information[-1]

    @property
    def figures(self) -> dict[str, float]:
        """Those that are known, by their names in metrics.jsonl."""
        names = (f"{self.prefix}{name}" for name in FIGURES)
        return {name: value for name in names if (value := self.curves.now(name)) is not None}

    @property
    def form(self) -> Form:
        """How a dead head has collapsed."""
        figures = self.figures
        # runs of earlier versions have not logged the use; where the information is gone, it is that of a single row
        used = figures.get(f"{self.prefix}prototypes_in_use", math.exp(figures.get(f"{self.prefix}teacher_entropy", 0)))
        if used < bands.one_hot_use(self.prototypes):
            return "one-hot"
        return "uniform" if used > bands.UNIFORM_USE * self.prototypes else "constant"

    def said(self, form: Form) -> tuple[str, ...]:
        """The figures with their limits, the one that tells most of a form first."""
        few, most, flat = bands.one_hot_use(self.prototypes), bands.UNIFORM_USE * self.prototypes, self._flat
        limits = {
            "mutual_information": f"nats; gone below {bands.DEAD_INFORMATION}, and runs that learn stay above 0.3",
            "teacher_entropy": f"nats of at most {math.log(self.prototypes):.3g}; uniform above {flat:.3g}",
            "prototypes_in_use": f"of {self.prototypes}; one-hot below {few:g}, uniform above {most:.3g}",
        }
        known = {name: self.figures.get(f"{self.prefix}{name}") for name in FIGURES}
        names = sorted(FIGURES, key=lambda name: name != LEADS[form])
        return tuple(
            f"{self.prefix}{name} {known[name]:.3g} {limits[name]}" for name in names if known[name] is not None
        )

    @property
    def _flat(self) -> float:
        return bands.flat_entropy(self.prototypes)


def _masked(record: Mapping[str, Any]) -> bool:
    """Whether the batch had masked patches: without any, all their figures are 0, as no collapse makes them."""
    names = (*(f"{PATCH}{name}" for name in ("teacher_entropy", "student_entropy", "kl")), "masked_patch_accuracy")
    return any(record.get(name) for name in names)
