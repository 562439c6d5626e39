"""A method from outside the package: which quarter turn was an image given?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.plan import Plan
from vmf_pretrain.methods.method import MINIMISED, Method, Place
from vmf_pretrain.networks.backbone import build_backbone


class Turns(Method):
    """Gidaris et al., ICLR 2018, with a turn that follows from the image's place in the batch."""

    def __init__(self, config: Config, start: Place) -> None:
        super().__init__(config, start)
        self.student = build_backbone(config)
        self.classifier = nn.Linear(int(self.student.num_features), 4)
        self.scale = nn.Parameter(torch.ones(()))

    @classmethod
    def plan(cls, config: Config) -> Plan:
        return Plan(global_views=1)

    @property
    def evaluated(self) -> nn.Module:
        return self.student

    def forward(self, batch: Batch, place: Place) -> dict[str, Tensor]:
        (view,) = batch.views
        turns = torch.arange(len(view), device=view.device) % 4
        turned = torch.stack([torch.rot90(image, int(turn), (1, 2)) for image, turn in zip(view, turns, strict=True)])
        loss = functional.cross_entropy(self.scale * self.classifier(self.student(turned)), turns)
        return {MINIMISED: loss}
