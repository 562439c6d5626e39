"""The state of a run, and one training step: DINO's algorithm 1 with KoLeo, clipping and schedules.

Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, and its published trainer.
"""

import math
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from vmf_kernels import DINOLoss, DINOvMFLoss, KoLeoLoss
from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.run import Config
from vmf_pretrain.config.views import GLOBAL_VIEWS
from vmf_pretrain.data.randomness import INITIALISATION, TRAINING_STEP, stream_seed
from vmf_pretrain.engine.optim import clip_each, drop_last_layer_gradients, gradients_of, parameter_groups, set_rates
from vmf_pretrain.engine.schedules import CosineSchedule
from vmf_pretrain.networks.backbone import build_networks, follow
from vmf_pretrain.storage.checkpoint import Checkpoint, flatten_optimizer, restore_optimizer


class Training:
    """Student, teacher, loss, optimizer and schedules of one run.

    Args:
        config: the whole run.
        steps_per_epoch: optimizer steps in an epoch.
        fabric: device and precision.
    """

    def __init__(self, config: Config, steps_per_epoch: int, fabric: Fabric) -> None:
        torch.manual_seed(stream_seed(config.seed, INITIALISATION))
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.fabric = fabric
        student, teacher = build_networks(config)
        self.student, self.teacher = student.to(fabric.device), teacher.to(fabric.device)
        self.loss = build_loss(config).to(fabric.device)
        self.koleo = KoLeoLoss()
        groups = parameter_groups(self.student)
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.learning_rate)
        self.total_steps = config.train.epochs * steps_per_epoch
        optim, warm_up = config.optim, config.optim.warmup_epochs * steps_per_epoch
        self.learning_rate = CosineSchedule(optim.learning_rate, optim.final_learning_rate, self.total_steps, warm_up)
        self.weight_decay = CosineSchedule(optim.weight_decay, optim.final_weight_decay, self.total_steps)
        self.momentum = CosineSchedule(optim.teacher_momentum, optim.final_teacher_momentum, self.total_steps)

    def teacher_temperature(self, epoch: int) -> float:
        """The teacher's temperature in ``epoch``; after the end, that of the last epoch."""
        schedule = self.loss.teacher_temp_schedule
        return float(schedule[min(epoch, len(schedule) - 1)])

    def step(self, step: int, views: list[Tensor]) -> dict[str, Tensor]:
        """Take one optimizer step; returns the numbers to log, as [] tensors on the device.

        Raises:
            PretrainError: the loss or a gradient is not finite; no weight has been changed by this step.
        """
        # stochastic depth draws from the global generator; seeding it by the step makes saving its state unnecessary
        torch.manual_seed(stream_seed(self.config.seed, TRAINING_STEP, step))
        epoch = step // self.steps_per_epoch
        views = [view.to(self.fabric.device, non_blocking=True) for view in views]
        with self.fabric.autocast():
            with torch.no_grad():
                _, targets = self.teacher(views[:GLOBAL_VIEWS])
            features, logits = self.student(views)
            loss = self.loss(logits, targets, epoch)
            koleo = self._koleo(features)
        total = loss + self.config.loss.koleo_weight * koleo
        _require_finite(total, "loss", step)
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(total)
        norm = self._update(step, epoch)
        return {**self._statistics(), "loss": loss.detach(), "koleo": koleo.detach(), "gradient_norm": norm}

    def rates(self, step: int) -> dict[str, float]:
        """The values of the schedules at a step."""
        return {
            "learning_rate": self.learning_rate.at(step),
            "weight_decay": self.weight_decay.at(step),
            "teacher_momentum": self.momentum.at(step),
            "teacher_temperature": self.teacher_temperature(step // self.steps_per_epoch),
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint has to hold."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": flatten_optimizer(self.optimizer),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint.

        Raises:
            PretrainError: its tensors do not fit this configuration.
        """
        try:
            for name in ("student", "teacher", "loss"):
                getattr(self, name).load_state_dict(checkpoint.tensors[name])
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise PretrainError(f"checkpoint {checkpoint.path} does not fit the configuration: {reason}.") from None
        restore_optimizer(self.optimizer, checkpoint.tensors["optimizer"])

    def _koleo(self, features: Tensor) -> Tensor:
        """Sum over the global views, as published."""
        if self.config.loss.koleo_weight == 0:
            return features.new_zeros(())
        crops = features.chunk(self.config.view_count)[:GLOBAL_VIEWS]
        return torch.stack([self.koleo(crop) for crop in crops]).sum()

    def _update(self, step: int, epoch: int) -> Tensor:
        set_rates(self.optimizer, self.learning_rate.at(step), self.weight_decay.at(step))
        norm = clip_each(gradients_of(self.student), self.config.optim.clip)
        _require_finite(norm, "gradient's norm", step)
        if epoch < self.config.optim.freeze_last_layer_epochs:
            drop_last_layer_gradients(self.student)
        self.optimizer.step()
        follow(self.teacher, self.student, self.momentum.at(step))
        return norm

    def _statistics(self) -> dict[str, Tensor]:
        found = self.loss.statistics
        assert found is not None
        return {
            "teacher_entropy": found.teacher_entropy,
            "student_entropy": found.student_entropy,
            "kl": found.kl,
            "mutual_information": found.mutual_information,
        }


def _require_finite(value: Tensor, name: str, step: int) -> None:
    if not math.isfinite(value.item()):
        raise PretrainError(
            f"the {name} is {value.item()} at step {step}; lower optim.learning_rate or set train.precision to 32-true in the "
            "run folder's config.yaml, and go on from the last checkpoint with --resume."
        )


def build_loss(config: Config) -> DINOLoss:
    """The loss of the configured method."""
    loss = config.loss
    published: tuple[Any, ...] = (
        config.head.prototypes,
        config.view_count,
        loss.warmup_teacher_temp,
        loss.teacher_temp,
        loss.warmup_teacher_temp_epochs,
        config.train.epochs,
        loss.student_temp,
        loss.center_momentum,
    )
    if config.method == "dino":
        return DINOLoss(*published, center_start=loss.center_start)
    return DINOvMFLoss(*published, centering=loss.centering, center_start=loss.center_start)
