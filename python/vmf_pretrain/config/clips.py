"""How a clip is cut out of a video."""

from dataclasses import dataclass

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class ClipsConfig:
    """Clips of data.kind "videos".

    Attributes:
        frames: of a clip; a multiple of ``tubelet``.
        step: frames of the video from one frame of the clip to the next.
        tubelet: frames that one token covers.
    """

    frames: int = 16
    step: int = 4
    tubelet: int = 2

    def __post_init__(self) -> None:
        require_positive("clips", frames=self.frames, step=self.step, tubelet=self.tubelet)
        whole = self.frames % self.tubelet == 0
        require(whole, f"clips.frames is {self.frames} but must be a multiple of clips.tubelet, {self.tubelet}.")
