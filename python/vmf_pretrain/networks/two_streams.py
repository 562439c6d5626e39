"""A backbone with heads for class tokens and for patches.

Legend: V views, G of them global, B images of this rank, C = G B, N patches of a global view, M chosen patches, F features of
the backbone, K prototypes.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from vmf_kernels import DINOHead, PrototypeLayer, PrototypeLogits
from vmf_pretrain.networks.headed import Headed
from vmf_pretrain.networks.parts import in_parts
from vmf_pretrain.networks.tokens import Hidden


class StreamHead(DINOHead):
    """DINO's head whose layers also serve the patches; these have the same prototypes, or some of their own.

    Its parameters have the names of iBOT's published head: ``last_layer2`` holds the patches' prototypes.

    Args:
        features: F.
        prototypes: K.
        patch_prototypes: number of the patches' own prototypes; None for the same ones.
        vmf: whether the prototypes are von Mises-Fisher components.
        norm_last_layer, use_bn, nlayers, hidden_dim, bottleneck_dim: as for ``DINOHead``.

    Source: Zhou et al., "iBOT: image BERT pre-training with online tokenizer", ICLR 2022, section 3.2.
    """

    def __init__(
        self,
        features: int,
        prototypes: int,
        patch_prototypes: int | None,
        *,
        vmf: bool,
        norm_last_layer: bool,
        **size: Any,
    ) -> None:
        super().__init__(features, prototypes, norm_last_layer=norm_last_layer, **size)
        self.vmf = vmf
        self.last_layer2: nn.Module | None = None
        if patch_prototypes is not None:
            bottleneck = self.last_layer.in_features
            self.last_layer2 = PrototypeLayer(bottleneck, patch_prototypes, frozen_norm=norm_last_layer)

    @overload
    def forward(self, x: Tensor) -> PrototypeLogits: ...

    @overload
    def forward(self, x: Tensor, patches: Tensor) -> tuple[PrototypeLogits, PrototypeLogits]: ...

    def forward(
        self, x: Tensor, patches: Tensor | None = None
    ) -> PrototypeLogits | tuple[PrototypeLogits, PrototypeLogits]:
        """Logits of class tokens [R, F]; with patches [M, F], theirs too. All rows go through the layers together."""
        if patches is None:
            return self._as_components(super().forward(x))
        both, rows = super().forward(torch.cat([x, patches])), len(x)
        own = self.last_layer2
        of_patches = both[rows:] if own is None else own(both.features[rows:])
        return self._as_components(both[:rows]), self._as_components(of_patches)

    def _as_components(self, logits: PrototypeLogits) -> PrototypeLogits:
        return logits.with_vmf() if self.vmf else logits


class Streams(NamedTuple):
    """What a network makes of a batch."""

    features: Tensor  # [V B, F] of class tokens, view-major
    of_class: PrototypeLogits  # [V B, K]
    patches: PrototypeLogits  # [M, K'] of the chosen patches, or of all C N


class TwoStreams(Headed):
    """Backbone, a head for class tokens and patches, and perhaps a head of the patches' own.

    Args:
        backbone: a ``TokenTransformer``.
        head: of class tokens, and of patches if they have none of their own.
        patch_head: the patches' own head, or None.
        parts: as for ``Headed``.
    """

    head: StreamHead

    def __init__(self, backbone: nn.Module, head: StreamHead, patch_head: DINOHead | None, *, parts: int) -> None:
        super().__init__(backbone, head, parts=parts)
        self.patch_head = patch_head

    def streams(
        self, whole: Sequence[Tensor], local: Sequence[Tensor], *, mask: Tensor | None, chosen: Tensor | None
    ) -> Streams:
        """Both streams of global and local views.

        Args:
            whole: G global views [B, channels, side, side].
            local: local views, whose patches nothing needs.
            mask: [C, H, W] bool, the hidden patches of the global views, or None.
            chosen: [M] which of the C N patches go through the head; None for all.
        """
        tokens = self._tokens(torch.cat(list(whole)), mask, len(whole[0]))
        features = torch.cat([tokens[:, 0], *self._local(local)])
        patches = tokens[:, 1:].flatten(0, 1)
        if chosen is not None:
            patches = patches.index_select(0, chosen)
        if self.patch_head is None:
            return Streams(features, *self.head(features, patches))
        return Streams(features, self.head(features), self.patch_head(patches))

    def _tokens(self, views: Tensor, mask: Tensor | None, images: int) -> Tensor:
        """[C, 1 + N, F] features and patches of the global views."""

        def call(rows: Tensor, place: slice) -> Tensor:
            tokens: Tensor = self.backbone(rows, hidden=Hidden(None if mask is None else mask[place]))
            return tokens

        return in_parts(self.backbone, views, images=images, parts=self.parts, call=call)

    def _local(self, views: Sequence[Tensor]) -> list[Tensor]:
        """[views * B, F] features of the local views, a tensor for each size."""
        groups = (torch.cat(list(group)) for _, group in groupby(views, key=lambda view: view.shape[-1]))
        return [in_parts(self.backbone, rows, images=len(views[0]), parts=self.parts) for rows in groups]


def placed(logits: PrototypeLogits, chosen: Tensor, images: int, patches: int) -> PrototypeLogits:
    """[C, N, K] logits with the rows [M, K] at the chosen of C N places, and zeros elsewhere; only features are copied."""
    features = logits.features.new_zeros(images * patches, logits.features.shape[-1])
    rows = features.index_copy(0, chosen, logits.features)
    return PrototypeLogits(rows.view(images, patches, -1), logits.prototypes)
