"""A network that is fine-tuned: a copy with a classifier and stochastic depth, and its parameters by learning rate.

Legend: B images, F features, C classes, D blocks.
"""

import copy
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.models import VisionTransformer
from torch import Tensor, nn

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.finetune import Protocol
from vmf_pretrain.networks.backbone import layers_above
from vmf_pretrain.networks.tubelets import TubeletEmbed

HEAD_SPREAD = 0.02  # standard deviation of the classifier's initial weights, before head_scale


class Classifier(nn.Module):
    """A backbone and a linear layer on its feature.

    Args:
        backbone: [B, C, H, W] to [B, F].
        head: [B, F] to [B, C].
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, C] logits of inputs [B, C, H, W]."""
        logits: Tensor = self.head(self.backbone(inputs))
        return logits


def classifier_of(network: nn.Module, features: int, classes: int, protocol: Protocol) -> Classifier:
    """A copy of the network to be trained, with a new classifier; the initial weights are drawn from the global generator.

    Args:
        network: a vision transformer of timm; it stays as it is.
        features: F.
        classes: C.
        protocol: rate of stochastic depth, and scale of the classifier.

    Raises:
        PretrainError: the network is no vision transformer of images with a branch that can be dropped in each block.
    """
    backbone: Any = copy.deepcopy(network)
    fits = isinstance(backbone, VisionTransformer) and not isinstance(backbone.patch_embed, TubeletEmbed)
    if not fits or not all(hasattr(block, "drop_path1") for block in backbone.blocks):
        raise PretrainError(
            f"fine-tuning needs a vision transformer of images with plain blocks, which this {type(network).__name__} is not."
        )
    for block, rate in zip(backbone.blocks, torch.linspace(0, protocol.drop_path, len(backbone.blocks)), strict=True):
        block.drop_path1, block.drop_path2 = DropPath(float(rate)), DropPath(float(rate))
    head = nn.Linear(features, classes).to(next(network.parameters()).device)
    nn.init.trunc_normal_(head.weight, 0.0, HEAD_SPREAD)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.weight.mul_(protocol.head_scale)
    return Classifier(backbone.requires_grad_(True), head)


def rate_groups(classifier: Classifier, protocol: Protocol) -> list[dict[str, Any]]:
    """Groups of AdamW, each with its share of the rate, "share": ``layer_decay`` to the power of the layers above.

    Biases, vectors, positions and tokens have no weight decay.

    Source: repository bytedance/ibot, evaluation/classification_layer_decay/optim_factory.py.
    """
    above = layers_above(classifier)
    backbone: Any = classifier.backbone
    plain = {f"backbone.{name}" for name in backbone.no_weight_decay()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        decay = 0.0 if parameter.ndim == 1 or name.endswith(".bias") or name in plain else protocol.weight_decay
        groups.setdefault((protocol.layer_decay ** above.get(name, 0), decay), []).append(parameter)
    return [{"params": some, "share": share, "weight_decay": decay} for (share, decay), some in groups.items()]
