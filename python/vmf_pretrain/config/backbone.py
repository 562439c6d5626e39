"""The vision transformer."""

import re
from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require, require_not_negative, require_positive


@dataclass(frozen=True)
class BackboneConfig:
    """The vision transformer, a timm model.

    Attributes:
        name: a timm vision transformer's name.
        patch_size: side of a patch, pixels.
        width: embedding dimension; null keeps the named model's.
        depth: number of blocks; null keeps the named model's.
        heads: attention heads per block; null keeps the named model's.
        initialisation: "timm" (the model's own, and DINOv2's), "dino" (the same with a class token of deviation 0.02; also
            iBOT's) or "xavier" (of backbone and head, for widths far below 384, where a deviation of 0.02 is too small).
        resize_positions: how positions get to the grid of smaller views: "timm" with antialiasing, or "dino" without and by a
            factor that is off by 0.1 patches (DINO, iBOT, DINOv2).
        drop_path: rate of stochastic depth in the student; the teacher has none.
        drop_path_rates: "rising" from 0 in the first block to ``drop_path`` in the last, or "uniform" (DINOv2).
        drop_path_of: each "row" is dropped with that probability, or a "subset" of the rows of fixed size is computed (DINOv2).
        layer_scale: start of the scale of each residual branch; null keeps the named model's (mostly none).
        registers: tokens beside the class token that no loss sees.
    """

    name: str = "vit_small_patch16_224"
    patch_size: int = 16
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    initialisation: Literal["timm", "dino", "xavier"] = "timm"
    resize_positions: Literal["timm", "dino"] = "timm"
    drop_path: float = 0.1
    drop_path_rates: Literal["rising", "uniform"] = "rising"
    drop_path_of: Literal["row", "subset"] = "row"
    layer_scale: float | None = None
    registers: int = 0

    def __post_init__(self) -> None:
        fetched = re.match(r"[A-Za-z][\w-]*:\S", self.name)  # hf-hub:..., local-dir:...: the settings of a stranger
        require(not fetched, f"backbone.name is {self.name} but must be the plain name of a timm model.")
        shape: dict[str, float | None] = {"width": self.width, "depth": self.depth, "heads": self.heads}
        shape["layer_scale"] = self.layer_scale
        given = {name: value for name, value in shape.items() if value is not None}
        require_positive("backbone", patch_size=self.patch_size, **given)
        require_not_negative("backbone", registers=self.registers)
        require(0 <= self.drop_path < 1, f"backbone.drop_path is {self.drop_path} but must lie in [0, 1).")
