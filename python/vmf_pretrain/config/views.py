"""How views of an image are drawn."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from vmf_pretrain.config.checks import require, require_not_negative, require_positive, require_range, require_share

GLOBAL_VIEWS = 2  # the ones the teacher sees


CANVASES = {"digits": 16, "animals": 40}  # pixels: side of the canvas that a bundled image is put on


@dataclass(frozen=True)
class DigitViewConfig:
    """How a view of a digit is drawn.

    Attributes:
        global_zoom: range of the magnification of a global view.
        local_zoom: range of the magnification of a local view.
        local_shift: how far a local view's middle may lie from the digit's middle, in canvas pixels along each axis.
        rotation: largest rotation either way, degrees.
        gain: largest relative change of brightness either way.
        noise: standard deviation of the added normal noise, in units of full ink.
        flip: probability of a horizontal flip.
    """

    section: ClassVar[str] = "views.digits"

    global_zoom: tuple[float, float] = (0.8, 1.25)
    local_zoom: tuple[float, float] = (1.0, 1.25)
    local_shift: float = 2.0
    rotation: float = 12.0
    gain: float = 0.1
    noise: float = 0.02
    flip: float = 0.0

    def __post_init__(self) -> None:
        require_range(self.section, global_zoom=self.global_zoom, local_zoom=self.local_zoom)
        amounts = {"local_shift": self.local_shift, "rotation": self.rotation, "gain": self.gain, "noise": self.noise}
        require_not_negative(self.section, **amounts)
        require_share(self.section, flip=self.flip)


@dataclass(frozen=True)
class AnimalViewConfig(DigitViewConfig):
    """How a view of an animal's silhouette is drawn: as that of a digit, in other ranges.

    Attributes:
        global_zoom: range of the magnification of a global view.
        local_zoom: range of the magnification of a local view.
        local_shift: how far a local view's middle may lie from the silhouette's middle, in canvas pixels along each axis.
        rotation: largest rotation either way, degrees.
        gain: largest relative change of brightness either way.
        noise: standard deviation of the added normal noise, in units of white.
        flip: probability of a horizontal flip.
    """

    section: ClassVar[str] = "views.animals"

    global_zoom: tuple[float, float] = (0.6, 1.0)
    local_zoom: tuple[float, float] = (0.7, 1.2)
    local_shift: float = 8.0
    flip: float = 0.5


@dataclass(frozen=True)
class PhotoViewConfig:
    """How a view of a photograph is drawn; the defaults are DINO's augmentation.

    Attributes:
        global_area: range of the share of the image's area that a global view shows.
        local_area: the same for a local view.
        aspect: range of the width over the height of what a view shows; its logarithm is uniform.
        interpolation: how a crop is resized: "bicubic", or "bilinear" (I-JEPA, V-JEPA).
        flip: probability of a horizontal flip.
        jitter: probability of a colour jitter.
        brightness: largest relative change of brightness within a jitter.
        contrast: largest relative change of contrast within a jitter.
        saturation: largest relative change of saturation within a jitter.
        hue: largest shift of hue within a jitter, in turns of the colour circle (at most 0.5).
        grayscale: probability of losing colour.
        blur: probabilities of a Gaussian blur for the first global view, the second, and the local views (DINOv2's code blurs
            with 1 minus the probability that it is given: 0, 0.9, 0.5).
        solarize: probability of inverting bright pixels, in the second global view only.
    """

    global_area: tuple[float, float] = (0.4, 1.0)
    local_area: tuple[float, float] = (0.05, 0.4)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    solarize: float = 0.2

    def __post_init__(self) -> None:
        ranges = {"global_area": self.global_area, "local_area": self.local_area}
        require_range("views.photos", **ranges, aspect=self.aspect)
        for name, (_, high) in ranges.items():
            require(high <= 1.0, f"views.photos.{name} reaches {high} but an area's share is at most 1.")
        require_share(
            "views.photos", flip=self.flip, jitter=self.jitter, grayscale=self.grayscale, solarize=self.solarize
        )
        require_share("views.photos", brightness=self.brightness, contrast=self.contrast, saturation=self.saturation)
        require(0 <= self.hue <= 0.5, f"views.photos.hue is {self.hue} but must lie between 0 and 0.5.")
        for value in self.blur:
            require_share("views.photos", blur=value)


@dataclass(frozen=True)
class ViewsConfig:
    """Multi-crop: two global views that teacher and student see, and local views that only the student sees.

    Attributes:
        global_size: side of a global view, pixels; a multiple of the patch size.
        local_size: side of a local view, pixels; a multiple of the patch size.
        local_count: local views per image; 0 trains on the two global views alone.
        digits: the augmentation for data.kind "digits".
        animals: the augmentation for data.kind "animals".
        photos: the augmentation for data.kind "folder".
    """

    global_size: int = 224
    local_size: int = 96
    local_count: int = 8
    digits: DigitViewConfig = field(default_factory=DigitViewConfig)
    animals: AnimalViewConfig = field(default_factory=AnimalViewConfig)
    photos: PhotoViewConfig = field(default_factory=PhotoViewConfig)

    def __post_init__(self) -> None:
        require_positive("views", global_size=self.global_size, local_size=self.local_size)
        require_not_negative("views", local_count=self.local_count)
