"""How features are evaluated."""

from dataclasses import dataclass

from vmf_pretrain.config.checks import require_positive


@dataclass(frozen=True)
class EvaluateConfig:
    """How features are evaluated during and after training.

    Attributes:
        every: epochs between two evaluations; there is always one before the first and one after the last step.
        neighbours: k of the k-NN classifier.
        temperature: temperature of its votes exp(cosine / temperature).
        max_images: largest number of images of each split that is evaluated.
        duplicate_threshold: cosine distance below which two prototypes count as duplicates.
    """

    every: int = 10
    neighbours: int = 20
    temperature: float = 0.07
    max_images: int = 10000
    duplicate_threshold: float = 0.025

    def __post_init__(self) -> None:
        require_positive(
            "evaluate",
            every=self.every,
            neighbours=self.neighbours,
            temperature=self.temperature,
            max_images=self.max_images,
            duplicate_threshold=self.duplicate_threshold,
        )
