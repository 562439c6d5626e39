"""What is kept of a network's outputs for one batch of images.

Legend: B images, n blocks, P prefix tokens (class token and registers), h x w patches, F features.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.networks.tubelets import TubeletEmbed

CLASS = "class"  # [n, F] an image: the network's feature after each of the last n blocks, the last one at the end
MEAN_PATCH: Final = "mean_patch"  # [F]: mean of the patches after the last norm
PATCHES: Final = "patches"  # [h, w, F] after the last norm
UNNORMED: Final = "unnormed"  # [F]: the class token before the last norm
Part = Literal["mean_patch", "patches", "unnormed"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of a forward pass
NEEDED = ("forward_intermediates", "forward_head", "norm", "num_prefix_tokens")  # of timm's transformers


@dataclass(frozen=True)
class Kinds:
    """Which features are kept beside the class feature of the last block.

    Attributes:
        blocks: n, the last blocks whose class feature is kept.
        parts: MEAN_PATCH, PATCHES, UNNORMED.
    """

    blocks: int = 1
    parts: frozenset[Part] = frozenset()

    def __post_init__(self) -> None:
        if self.blocks < 1 or not self.parts <= set(get_args(Part)):
            raise ValueError(f"{self} is none; expected blocks >= 1 and parts of {', '.join(get_args(Part))}")

    def __or__(self, other: "Kinds") -> "Kinds":
        return Kinds(max(self.blocks, other.blocks), self.parts | other.parts)

    def facts(self) -> dict[str, Any]:
        """These kinds as JSON holds them."""
        return {"blocks": self.blocks, "parts": sorted(self.parts)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Kinds":
        """The inverse of ``facts``.

        Raises:
            KeyError, TypeError, ValueError: they are none.
        """
        return cls(int(facts["blocks"]), frozenset(facts["parts"]))

    def covers(self, other: "Kinds") -> bool:
        """Whether all that ``other`` keeps is kept."""
        return self | other == self

    @property
    def plain(self) -> bool:
        """Whether the class feature of the last block is all."""
        return self == Kinds()


def outputs(network: nn.Module, inputs: Tensor, kinds: Kinds) -> dict[str, Tensor]:
    """The features of a batch by name, each [B, ...] as its constant says, from one forward pass.

    Args:
        network: to [B, F]; anything beside the class feature of the last block needs a vision transformer of timm.
        inputs: [B, C, H, W], on the network's device.
        kinds: what is kept.

    Raises:
        PretrainError: the network has no such features, or takes no such inputs.
    """
    require_kinds(network, kinds)
    require_inputs(network, tuple(inputs.shape))
    if kinds.plain:
        return {CLASS: network(inputs).unsqueeze(1)}
    vit: Any = network
    raw = vit.forward_intermediates(
        inputs, indices=kinds.blocks, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    blocks = [_joined(tokens) for tokens in raw]
    normed = [vit.norm(tokens) for tokens in blocks]
    found = {CLASS: torch.stack([vit.forward_head(tokens) for tokens in normed], dim=1)}
    patches = normed[-1][:, vit.num_prefix_tokens :]
    if MEAN_PATCH in kinds.parts:
        found[MEAN_PATCH] = patches.mean(dim=1)
    if PATCHES in kinds.parts:
        height, width = vit.patch_embed.dynamic_feat_size(tuple(inputs.shape[-2:]))
        found[PATCHES] = patches.unflatten(1, (height, width))
    if UNNORMED in kinds.parts:
        found[UNNORMED] = blocks[-1][:, 0]
    return found


def precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """What a forward pass on a device runs under, to compute in one of DTYPES."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def require_kinds(network: nn.Module, kinds: Kinds) -> None:
    """Raise PretrainError if the network has no such features."""
    if kinds.plain:
        return
    vit: Any = network
    if not all(hasattr(vit, name) for name in NEEDED) or isinstance(getattr(vit, "patch_embed", None), TubeletEmbed):
        raise PretrainError(
            f"features beside the last one need a vision transformer of images, which this {type(vit).__name__} is not."
        )
    if kinds.blocks > len(vit.blocks):
        raise PretrainError(
            f"the last {kinds.blocks} blocks are asked for, of a network of {len(vit.blocks)}; set linear.blocks."
        )
    if UNNORMED in kinds.parts and getattr(vit, "cls_token", None) is None:
        raise PretrainError(
            "the class token before the last norm is asked for, of a network without one; set few_shot.classifier to ibot."
        )


def require_inputs(network: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise PretrainError if the network takes no inputs of this shape, [B, C, H, W] or that of clips [B, T, C, H, W]."""
    embedding: Any = getattr(network, "patch_embed", None)
    if isinstance(embedding, TubeletEmbed) and len(shape) != 5:
        raise PretrainError("the network takes clips, not images; evaluate it on the clips of its run, without --data.")
    if not isinstance(embedding, PatchEmbed) or embedding.dynamic_img_pad:
        return
    sides, patches = shape[-2:], embedding.patch_size
    if embedding.img_size is not None and embedding.strict_img_size and sides != tuple(embedding.img_size):
        taken = " x ".join(map(str, embedding.img_size))
        raise PretrainError(f"the network takes images of {taken} pixels alone; it is shown {sides[0]} x {sides[1]}.")
    if any(side % patch for side, patch in zip(sides, patches, strict=True)):
        raise PretrainError(
            f"images are shown at {sides[0]} x {sides[1]} pixels, which the network's patches of {patches[0]} do not divide; "
            "set the task's size (or retrieval.patch), or features.size."
        )


def _joined(tokens: Tensor | Iterable[Tensor]) -> Tensor:
    """[B, P + h w, F] of timm's (patches, prefix), or of patches alone where there is no prefix."""
    if isinstance(tokens, Tensor):
        return tokens
    patches, prefix = tokens
    return torch.cat([prefix, patches], dim=1)
