"""A backbone with a projection head, applied to the views of a batch.

Legend: V views, B images of this rank, F features of the backbone.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from vmf_kernels import DINOHead, PrototypeLogits
from vmf_pretrain.networks.parts import in_parts


class Headed(nn.Module):
    """Backbone and head.

    Args:
        backbone: [B, C, side, side] to [B, F].
        head: [R, F] to logits.
        parts: in how many parts the backbone sees the rows of a size; the head sees all at once.
    """

    def __init__(self, backbone: nn.Module, head: DINOHead, *, parts: int = 1) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.parts = parts

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, PrototypeLogits]:
        """Class features [V * B, F], view-major, of views [B, C, side, side], and their logits; one pass per size."""
        images = len(views[0])
        groups = [torch.cat(list(group)) for _, group in groupby(views, key=lambda view: view.shape[-1])]
        features = torch.cat([in_parts(self.backbone, rows, images=images, parts=self.parts) for rows in groups])
        return features, self.head(features)
