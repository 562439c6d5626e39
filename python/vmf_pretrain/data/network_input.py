"""The only way from an image's pixels to the input of a network, and back: used in training, evaluation, plots and export.

Legend: C channels, H x W pixels.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from vmf_pretrain.config.checks import require, require_positive
from vmf_pretrain.config.run import Config

FULL_BYTE = 255.0
# Mean and deviation of each channel by kind of data, unless data.mean and data.deviation say others: bundled images stay as
# they are; photographs use ImageNet's, as published.
PHOTOGRAPHS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SCALES = {
    "digits": ((0.0,), (1.0,)),
    "animals": ((0.0,), (1.0,)),
    "folder": PHOTOGRAPHS,
    "shards": PHOTOGRAPHS,
    "videos": PHOTOGRAPHS,
    "dataset": PHOTOGRAPHS,
}


@dataclass(frozen=True)
class NetworkInput:
    """Size and scale of a network's input. It is stored beside the weights, which are useless without it.

    Attributes:
        size: side of a global view, and of the square that is evaluated, pixels.
        mean: one number per channel, subtracted from pixels in [0, 1].
        deviation: one number per channel, by which the difference is divided.
    """

    size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __post_init__(self) -> None:
        require_positive("input", size=self.size)
        channels = len(self.mean), len(self.deviation)
        require(
            0 < channels[0] == channels[1],
            f"input.mean has {channels[0]} channels and input.deviation {channels[1]}; expected the same number, at least 1.",
        )
        for value in self.deviation:
            require_positive("input", deviation=value)

    @property
    def channels(self) -> int:
        """1 for bundled images, 3 for photographs."""
        return len(self.mean)

    def of(self, pixels: Tensor) -> Tensor:
        """[..., C, H, W] float32 input of the network for ``pixels`` of the same shape, uint8 or floating in [0, 1].

        Raises:
            PretrainError: the number of channels differs from the network's.
            ValueError: it is no image.
        """
        scaled = pixels.float() if pixels.is_floating_point() else pixels.float() / FULL_BYTE
        mean, deviation = self._scale(scaled)
        return scaled.sub(mean).div_(deviation)

    def pixels(self, inputs: Tensor) -> Tensor:
        """[..., C, H, W] pixels in [0, 1]: the inverse of ``of``, for pictures of the network's input."""
        mean, deviation = self._scale(inputs)
        return inputs.mul(deviation).add_(mean)

    def facts(self) -> dict[str, Any]:
        """This input as JSON holds it."""
        return {**asdict(self), "mean": list(self.mean), "deviation": list(self.deviation), "channels": self.channels}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "NetworkInput":
        """The inverse of ``facts``.

        Raises:
            PretrainError: an entry is missing, or the numbers make no sense.
        """
        missing = [name for name in ("size", "channels", "mean", "deviation") if name not in facts]
        require(not missing, f"input lacks {', '.join(missing)}; expected size, channels, mean and deviation.")
        read = cls(int(facts["size"]), tuple(map(float, facts["mean"])), tuple(map(float, facts["deviation"])))
        require(
            read.channels == facts["channels"],
            f"input.channels is {facts['channels']} but input.mean has {read.channels}.",
        )
        return read

    def _scale(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[C, 1, 1] mean and deviation, on the device of the images."""
        if images.ndim < 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [..., {self.channels}, H, W]")
        require(
            images.shape[-3] == self.channels,
            f"images have {images.shape[-3]} channels but the network was trained on {self.channels}.",
        )
        mean, deviation = images.new_tensor(self.mean), images.new_tensor(self.deviation)
        return mean.view(-1, 1, 1), deviation.view(-1, 1, 1)


def network_input(config: Config) -> NetworkInput:
    """The network input of a configuration."""
    mean, deviation = SCALES[config.data.kind]
    data = config.data
    return NetworkInput(config.views.global_size, data.mean or mean, data.deviation or deviation)
