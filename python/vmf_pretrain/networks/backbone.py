"""Student and teacher: each is a timm vision transformer with a DINO head.

Legend: B images, F features of the backbone.
"""

import copy
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vmf_kernels import DINOHead, DINOvMFHead, PrototypeLogits
from vmf_pretrain.config.backbone import BackboneConfig
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.network_input import network_input
from vmf_pretrain.engine.optim import update_average


class Network(nn.Module):
    """Backbone and head, applied to the views of a batch."""

    def __init__(self, backbone: nn.Module, head: DINOHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, PrototypeLogits]:
        """Class features [views * B, F], view-major, of views [B, C, side, side], and their logits; one pass per size."""
        groups = (torch.cat(list(group)) for _, group in groupby(views, key=lambda view: view.shape[-1]))
        features = torch.cat([self.backbone(group) for group in groups])
        return features, self.head(features)


def build_networks(config: Config) -> tuple[Network, Network]:
    """The student, and a teacher with the same weights, without gradients and without stochastic depth.

    Raises:
        PretrainError: timm does not know the backbone, or it is not a vision transformer of the configured shape.
    """
    backbone = _backbone(config, config.backbone.drop_path)
    size = config.head
    dims = int(backbone.num_features), size.prototypes
    options: dict[str, Any] = {
        "use_bn": size.batch_norm,
        "nlayers": size.layers,
        "hidden_dim": size.hidden_dim,
        "bottleneck_dim": size.bottleneck_dim,
    }
    if config.method == "dino-vmf":
        head: DINOHead = DINOvMFHead(*dims, **options)
    else:
        head = DINOHead(*dims, **options, norm_last_layer=config.norm_prototypes)
    student = Network(backbone, head)
    if config.backbone.initialisation == "xavier":
        _xavier(student)
    teacher = Network(_backbone(config, drop_path=0.0), copy.deepcopy(head))
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def follow(teacher: Network, student: Network, momentum: float) -> None:
    """Update the teacher's parameters, a moving average of the student's; its buffers are not changed."""
    update_average(teacher.parameters(), student.parameters(), momentum)


def _backbone(config: Config, drop_path: float) -> timm.models.VisionTransformer:
    chosen = config.backbone
    options: dict[str, Any] = {"embed_dim": chosen.width, "depth": chosen.depth, "num_heads": chosen.heads}
    try:
        backbone = timm.create_model(
            chosen.name,
            img_size=config.views.global_size,
            patch_size=chosen.patch_size,
            in_chans=network_input(config).channels,
            num_classes=0,
            drop_path_rate=drop_path,
            dynamic_img_size=True,
            **{name: value for name, value in options.items() if value is not None},
        )
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise PretrainError(_unfit(chosen, " ".join(str(error).split()))) from None
    if not isinstance(backbone, timm.models.VisionTransformer):
        raise PretrainError(_unfit(chosen, f"it is a {type(backbone).__name__}"))
    return backbone


def _unfit(chosen: BackboneConfig, reason: str) -> str:
    return f"backbone.name {chosen.name} cannot be built as a vision transformer of that shape: {reason}."


def _xavier(network: Network) -> None:
    """Xavier's uniform initialisation of every linear layer except the prototypes."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
