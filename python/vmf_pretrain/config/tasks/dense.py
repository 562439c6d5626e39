"""The task of segmentation."""

from dataclasses import dataclass

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class DenseTask:
    """Classes of pixels from the features of patches.

    Attributes:
        size: side of the square that an image is squashed to, pixels; null takes that of the network's training.
        ignored: the number of pixels that do not count; null has none.
        max_patches: training patches that are kept, drawn at random.
        neighbours: k of k-NN.
        temperature: of its votes exp(cosine / temperature).
        inverse_penalty: C of the logistic regression.
        iterations: of the logistic regression at most.
    """

    size: int | None = None
    ignored: int | None = 255
    max_patches: int = 50_000
    neighbours: int = 30
    temperature: float = 0.07
    inverse_penalty: float = 1.0
    iterations: int = 1000

    def __post_init__(self) -> None:
        require_positive(
            "dense",
            max_patches=self.max_patches,
            neighbours=self.neighbours,
            temperature=self.temperature,
            inverse_penalty=self.inverse_penalty,
            iterations=self.iterations,
            **({} if self.size is None else {"size": self.size}),
        )
        require(
            self.ignored is None or 0 <= self.ignored <= 255,
            f"dense.ignored is {self.ignored}; expected 0 to 255 or null.",
        )
