"""DINO and DINO-vMF: a student learns a teacher's assignments to prototypes; the teacher is its moving average.

Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, algorithm 1, and its published
trainer; Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vmf_kernels import DINOHead, DINOLoss, DINOvMFHead, DINOvMFLoss, DistributedKoLeoLoss, KoLeoLoss
from vmf_pretrain.config.run import Config
from vmf_pretrain.data.batch import Batch
from vmf_pretrain.data.plan import Plan
from vmf_pretrain.methods.method import MINIMISED, Assignment, Method, Place
from vmf_pretrain.methods.published import PublishedLoss
from vmf_pretrain.methods.spread import feature_numbers
from vmf_pretrain.networks import ranks
from vmf_pretrain.networks.average import follow
from vmf_pretrain.networks.backbone import build_backbone, xavier
from vmf_pretrain.networks.headed import Headed
from vmf_pretrain.schedules import CosineSchedule

GLOBAL_VIEWS = 2  # the ones the teacher sees


class DINO(Method):
    """Student and teacher with a DINO head each, and the loss between their views."""

    evaluated_name = "the teacher's backbone"
    vmf = False
    student: Headed
    teacher: Headed

    def __init__(self, config: Config, start: Place) -> None:
        super().__init__(config, start)
        self.student, self.teacher = self._networks()
        self.loss: Any = self._loss()
        self.koleo = DistributedKoLeoLoss() if config.loss.koleo_group == "batch" else KoLeoLoss()
        optim = config.optim
        self.momentum = CosineSchedule(optim.teacher_momentum, optim.final_teacher_momentum, start.steps)
        # of the teacher in the last batch: the norms of its prototypes [K], and its class features [GLOBAL_VIEWS * B, F]
        self._norms: Tensor | None = None
        self._features: Tensor | None = None

    @classmethod
    def plan(cls, config: Config) -> Plan:
        """Two global views, and local ones that only the student sees."""
        return Plan(GLOBAL_VIEWS, config.views.local_count)

    @property
    def evaluated(self) -> nn.Module:
        """The teacher's backbone."""
        return self.teacher.backbone

    @property
    def exported(self) -> nn.Module:
        """The teacher."""
        return self.teacher

    @property
    def trained(self) -> nn.Module:
        """The student."""
        return self.student

    def begin(self) -> None:
        """The teacher becomes the student, as at any start."""
        teach(self.teacher, self.student)

    def forward(self, batch: Batch, place: Place) -> dict[str, Tensor]:
        """The cross-entropy between views, and KoLeo."""
        with torch.no_grad():
            self._features, targets = self.teacher(batch.views[:GLOBAL_VIEWS])
            self._norms = targets.prototypes.norms()
        features, logits = self.student(batch.views)
        loss = self.loss(logits, targets, place.epoch)
        koleo = self._koleo(features)
        total = loss + self.config.loss.koleo_weight * koleo
        return {MINIMISED: total, "loss": loss, "koleo": koleo}

    def numbers(self) -> dict[str, Tensor]:
        """Entropies, divergence and mutual information of the last batch, nats; what shows a collapse; norms of prototypes.

        ``prototypes_in_use`` is exp of the entropy of the mean assignment, and ``largest_share`` is that of the prototype that
        is used most. They, the norms and ``feature_rank`` and ``feature_variance`` are the teacher's.
        """
        found, norms, features = self.loss.statistics, self._norms, self._features
        assert found is not None
        assert norms is not None
        assert features is not None
        teacher_entropy, student_entropy, kl = (
            ranks.averaged(value) for value in (found.teacher_entropy, found.student_entropy, found.kl)
        )
        usage = ranks.averaged(found.usage)
        usage_entropy = -torch.xlogy(usage, usage).sum()
        return {
            "teacher_entropy": teacher_entropy,
            "student_entropy": student_entropy,
            "kl": kl,
            "mutual_information": usage_entropy - teacher_entropy,
            "prototypes_in_use": usage_entropy.exp(),
            "largest_share": usage.max(),
            **feature_numbers(features),
            "least_norm": norms.min(),
            "median_norm": norms.median(),
            "largest_norm": norms.max(),
        }

    def adjust_gradients(self, place: Place) -> None:
        """Leave the prototypes out at first, as published: without a gradient there is no weight decay either."""
        optim = self.config.optim
        if optim.freeze_last_layer_by == "gradient" and place.epoch < optim.freeze_last_layer_epochs:
            for name, parameter in self.student.named_parameters():
                if "last_layer" in name:
                    parameter.grad = None

    def after_step(self, place: Place, share: Tensor | float) -> None:
        """Move the teacher."""
        follow(self.teacher, self.student, (1.0 - self.momentum.at(place.step)) * share)

    def rates(self, place: Place) -> dict[str, float]:
        """Momentum and temperature of the teacher."""
        return {
            "teacher_momentum": self.momentum.at(place.step),
            "teacher_temperature": self._teacher_temperature(place),
        }

    def assignment(self, place: Place) -> Assignment:
        """The teacher's head at its temperature, with the centre."""
        temperature = self._teacher_temperature(place)
        return Assignment(self.teacher.head, temperature, self._centering.bias(temperature))

    @property
    def _centering(self) -> Any:
        """The centring rule of the class tokens."""
        return self.loss.centering

    def _teacher_temperature(self, place: Place) -> float:
        return float(self.loss.teacher_temp_schedule[place.epoch])

    def _koleo(self, features: Tensor) -> Tensor:
        """Sum over the global views, as published."""
        if self.config.loss.koleo_weight == 0:
            return features.new_zeros(())
        crops = features.chunk(self.config.view_count)[:GLOBAL_VIEWS]
        return torch.stack([self.koleo(crop) for crop in crops]).sum()

    def _networks(self) -> tuple[Headed, Headed]:
        """The student, and a teacher with the same weights, without gradients and without stochastic depth."""
        config = self.config
        backbone = build_backbone(config, drop_path=config.backbone.drop_path)
        head = self._head(int(backbone.num_features))
        parts = config.train.accumulate
        student = Headed(backbone, head, parts=parts)
        if config.backbone.initialisation == "xavier":
            xavier(student)
        teacher = Headed(build_backbone(config), copy.deepcopy(head), parts=parts)
        teach(teacher, student)
        return student, teacher.requires_grad_(False)

    def _head(self, features: int) -> DINOHead:
        size = self.config.head
        options: dict[str, Any] = {
            "use_bn": size.batch_norm,
            "nlayers": size.layers,
            "hidden_dim": size.hidden_dim,
            "bottleneck_dim": size.bottleneck_dim,
        }
        if self.vmf:
            return DINOvMFHead(features, size.prototypes, **options)
        return DINOHead(features, size.prototypes, **options, norm_last_layer=self.config.norm_prototypes)

    def _loss(self) -> nn.Module:
        loss = self.config.loss
        published: tuple[Any, ...] = (
            self.config.head.prototypes,
            self.config.view_count,
            loss.warmup_teacher_temp,
            loss.teacher_temp,
            loss.warmup_teacher_temp_epochs,
            self.start.epochs,
            loss.student_temp,
            loss.center_momentum,
        )
        options: dict[str, Any] = {"center_start": loss.center_start}
        if self.vmf:
            options["centering"] = loss.centering
        ours = DINOvMFLoss(*published, **options) if self.vmf else DINOLoss(*published, **options)
        return PublishedLoss(ours) if loss.implementation == "published" else ours


def teach(teacher: nn.Module, student: nn.Module) -> None:
    """Give a teacher the student's tensors, buffers too; it may lack some, such as a mask token."""
    tensors = student.state_dict()
    teacher.load_state_dict({name: tensors[name] for name in teacher.state_dict()})


class DINOvMF(DINO):
    """DINO whose prototypes are von Mises-Fisher components of free precision."""

    vmf = True
