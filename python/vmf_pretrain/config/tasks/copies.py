"""The task of copy detection."""

from dataclasses import dataclass

from vmf_pretrain.config.checks import require, require_positive


@dataclass(frozen=True)
class CopiesTask:
    """Altered copies found among originals: those of a folder like Copydays, and copies that are made here.

    Attributes:
        size: side of the square that an image is squashed to, pixels.
        made: copies that are made of the originals (``original/``, or all images of the folder): ``jpegqual/`` and a quality,
            ``crops/`` and the percentage of the surface that is removed.
        distractors: folder of images that are no originals but stand in the database; null has none.
        whitening: folder of other images on which features are whitened; null does not whiten.
    """

    size: int = 320
    made: tuple[str, ...] = ("jpegqual/3", "jpegqual/10", "jpegqual/30", "crops/20", "crops/50", "crops/80")
    distractors: str | None = None
    whitening: str | None = None

    def __post_init__(self) -> None:
        require_positive("copies", size=self.size)
        for name in self.made:
            kind, _, amount = name.partition("/")
            require(
                kind in ("jpegqual", "crops") and amount.isdigit() and 0 < int(amount) < 100,
                f"copies.made has {name!r}; expected jpegqual/ or crops/ and a number from 1 to 99.",
            )
