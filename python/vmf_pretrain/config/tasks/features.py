"""How features are computed, for all tasks of an evaluation."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require_positive


@dataclass(frozen=True)
class FeaturesTask:
    """How features are computed. Only ``size`` and ``dtype`` change a result beyond rounding.

    Attributes:
        size: side of the square that the network sees, pixels; null takes that of its training.
        dtype: of the forward pass (by autocast) and of the stored features.
        batch_size: images a forward pass.
        threads: that decode images.
        device: "auto" takes a GPU if there is one.
    """

    size: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 64
    threads: int = 4
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        given = {} if self.size is None else {"size": self.size}
        require_positive("features", batch_size=self.batch_size, threads=self.threads, **given)
