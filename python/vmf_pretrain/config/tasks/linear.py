"""The task of linear probes."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require, require_not_negative, require_positive

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


@dataclass(frozen=True)
class LinearTask:
    """Linear probes, as DINO and DINOv2 have them: heads trained with SGD, and logistic regression.

    DINO's own head is ``blocks`` [4], ``mean_patch`` [false] and ``rates`` [0.001]; for a ViT-B [1] and [true].

    Attributes:
        probes: "heads" trained with SGD, "logistic" regression.
        blocks: a head reads the class features of the last n blocks; a head for each n, a list.
        mean_patch: whether the mean of the patches is appended; a head for each choice, a list.
        rates: learning rates at 256 images a batch, scaled with the batch; a head for each.
        iterations: of SGD with momentum 0.9, the rate falling to 0 along a cosine.
        batch_size: of SGD, images.
        views: random squares of each training image, flipped or not, that heads are trained on; 0 takes the central square.
        costs: number of values of C of the logistic regression, from 1e-6 to 1e5, evenly spaced in the logarithm.
        held_out: share of each class of the training images, at least one, on which head and C are chosen.
        resize: of the images of heads, shorter side before the central square is cut, as a multiple of the square.
        logistic_resize: the same, of the images of the logistic regression.
    """

    probes: tuple[Literal["heads", "logistic"], ...] = ("heads", "logistic")
    blocks: tuple[int, ...] = (1, 4)
    mean_patch: tuple[bool, ...] = (False, True)
    rates: tuple[float, ...] = RATES
    iterations: int = 12500
    batch_size: int = 128
    views: int = 0
    costs: int = 45
    held_out: float = 0.1
    resize: float = 256 / 224
    logistic_resize: float = 1.0

    def __post_init__(self) -> None:
        for name in ("probes", "blocks", "mean_patch", "rates"):
            values = getattr(self, name)
            require(
                len(values) > 0 and len(set(values)) == len(values),
                f"linear.{name} is {list(values)}; expected at least one, and all different.",
            )
        require(min(self.blocks) > 0, f"linear.blocks is {list(self.blocks)}; expected numbers greater than 0.")
        require(min(self.rates) > 0, f"linear.rates is {list(self.rates)}; expected numbers greater than 0.")
        require_positive("linear", iterations=self.iterations, batch_size=self.batch_size, costs=self.costs)
        require_not_negative("linear", views=self.views)
        require(0 < self.held_out < 1, f"linear.held_out is {self.held_out} but must lie strictly between 0 and 1.")
        for name in ("resize", "logistic_resize"):
            require(
                getattr(self, name) >= 1, f"linear.{name} is {getattr(self, name)} but must be at least 1, the square."
            )
