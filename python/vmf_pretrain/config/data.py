"""Which images a run trains on."""

from dataclasses import dataclass, field
from typing import Any, Literal

from vmf_pretrain.config.checks import require, require_not_negative, require_positive, require_share

BUNDLED = ("digits", "animals")  # kinds of data that come with the packages: small gray images on canvases
CACHED_SIDE = 512  # pixels: a global view of 224 shows at least 0.4 of the area, so this is seldom enlarged


@dataclass(frozen=True)
class DataConfig:
    """Which images a run trains on, and in what batches.

    Attributes:
        kind: "digits" (scikit-learn's bundled handwritten digits on a 16 x 16 canvas), "animals" (bundled silhouettes on a
            40 x 40 canvas), "folder" (a folder of images), "shards" (a folder of tar archives, as WebDataset writes them),
            "videos" (a folder of video files) or "dataset" (a torch Dataset of your own).
        folder: the folder of kinds "folder", "shards" and "videos", searched recursively; its sub-folders are the classes of
            k-NN.
        dataset: "module:attribute" of a map-style torch Dataset for kind "dataset", called with ``dataset_arguments``. It
            runs code, so it needs --allow-code.
        dataset_arguments: keyword arguments of ``dataset``.
        batch_size: images per optimizer step, over all ranks.
        workers: processes that prepare batches; 0 prepares them in the training process. It never changes a result.
        start_method: how workers start; null takes the platform's own. It never changes a result.
        held_out: share of the images held out for k-NN and linear accuracy; used only if the images have classes.
        max_bad_share: share of unreadable images among those read, above which the run ends.
        cache: folder for decoded images no larger than ``cache_side``, or null for none.
        cache_side: the shorter side of cached images, pixels.
        mean: what is subtracted from each channel of pixels in [0, 1] before the network sees them; null takes 0 for bundled
            images and ImageNet's for others.
        deviation: what the difference is divided by; null takes 1 for bundled images and ImageNet's for others.
    """

    kind: Literal["digits", "animals", "folder", "shards", "videos", "dataset"] = "folder"
    folder: str | None = None
    dataset: str | None = None
    dataset_arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    batch_size: int = 64
    workers: int = 2
    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    held_out: float = 0.1
    max_bad_share: float = 0.01
    cache: str | None = None
    cache_side: int = CACHED_SIDE
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        require_positive("data", batch_size=self.batch_size, cache_side=self.cache_side)
        require_not_negative("data", workers=self.workers)
        require(0 < self.held_out < 1, f"data.held_out is {self.held_out} but must lie strictly between 0 and 1.")
        require_share("data", max_bad_share=self.max_bad_share)
        self._require_scale()
        cached = self.cache is not None and self.kind in (*BUNDLED, "videos", "dataset")
        require(not cached, f'data.cache does not go with data.kind "{self.kind}"; only files on a disk are cached.')
        missing = self.kind == "dataset" and self.dataset is None
        require(not missing, 'data.dataset is missing; data.kind "dataset" needs the "module:attribute" of a Dataset.')

    def _require_scale(self) -> None:
        channels = 1 if self.kind in BUNDLED else 3
        for name, given in (("mean", self.mean), ("deviation", self.deviation)):
            wrong = given is not None and len(given) != channels
            require(
                not wrong,
                f'data.{name} is {list(given or ())}; expected {channels} numbers for data.kind "{self.kind}".',
            )
        for value in self.deviation or ():
            require_positive("data", deviation=value)
