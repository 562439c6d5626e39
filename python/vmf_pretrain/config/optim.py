"""The optimizer and the schedules."""

from dataclasses import dataclass

from vmf_pretrain.config.checks import require_not_negative, require_positive, require_share


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the schedules, all per iteration.

    Attributes:
        learning_rate: peak learning rate for the batch size as configured (DINO: 0.0005 per 256 images).
        final_learning_rate: learning rate at the end of the cosine.
        warmup_epochs: epochs of the learning rate's linear warm-up.
        weight_decay: weight decay at the start of its cosine.
        final_weight_decay: weight decay at the end.
        clip: largest L2 norm of each parameter's gradient; 0 never clips.
        freeze_last_layer_epochs: epochs at the start in which the prototypes do not move.
        teacher_momentum: momentum of the teacher's moving average at the start of its cosine.
        final_teacher_momentum: the same at the end.
    """

    learning_rate: float = 0.0005
    final_learning_rate: float = 1e-6
    warmup_epochs: int = 10
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    clip: float = 3.0
    freeze_last_layer_epochs: int = 1
    teacher_momentum: float = 0.996
    final_teacher_momentum: float = 1.0

    def __post_init__(self) -> None:
        require_positive("optim", learning_rate=self.learning_rate)
        require_not_negative(
            "optim",
            final_learning_rate=self.final_learning_rate,
            warmup_epochs=self.warmup_epochs,
            weight_decay=self.weight_decay,
            final_weight_decay=self.final_weight_decay,
            clip=self.clip,
            freeze_last_layer_epochs=self.freeze_last_layer_epochs,
        )
        first, last = self.teacher_momentum, self.final_teacher_momentum
        require_share("optim", teacher_momentum=first, final_teacher_momentum=last)
