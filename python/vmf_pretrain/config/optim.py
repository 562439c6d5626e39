"""The optimizer and the schedules."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require, require_not_negative, require_positive, require_share


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the schedules, all per iteration.

    Attributes:
        learning_rate: peak learning rate for the batch size as configured (DINO: 0.0005 per 256 images).
        start_learning_rate: learning rate at the start of its warm-up (I-JEPA: a fifth of the peak; others 0).
        final_learning_rate: learning rate at the end of the cosine.
        warmup_epochs: epochs of the learning rate's linear warm-up.
        weight_decay: weight decay at the start of its cosine.
        final_weight_decay: weight decay at the end.
        clip: largest L2 norm of each parameter's gradient; 0 never clips.
        freeze_last_layer_epochs: epochs at the start in which the prototypes do not move.
        teacher_momentum: momentum of the teacher's moving average at the start of its cosine.
        final_teacher_momentum: the same at the end.
        betas: AdamW's (MAE: 0.9, 0.95).
        counting: which published trainer's way of counting steps the schedules follow: "dino" reaches the peak at the last step
            of the warm-up, "mae" one step later, "jepa" as "mae" with each step at the value of the next.
        stretch: length of the JEPAs' schedules and of the cosines as a multiple of the run's (V-JEPA: 1.25), so that they end
            before their final values.
    """

    learning_rate: float = 0.0005
    start_learning_rate: float = 0.0
    final_learning_rate: float = 1e-6
    warmup_epochs: int = 10
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    clip: float = 3.0
    freeze_last_layer_epochs: int = 1
    teacher_momentum: float = 0.996
    final_teacher_momentum: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    counting: Literal["dino", "mae", "jepa"] = "dino"
    stretch: float = 1.0

    def __post_init__(self) -> None:
        require_positive("optim", learning_rate=self.learning_rate)
        require_not_negative(
            "optim",
            start_learning_rate=self.start_learning_rate,
            final_learning_rate=self.final_learning_rate,
            warmup_epochs=self.warmup_epochs,
            weight_decay=self.weight_decay,
            final_weight_decay=self.final_weight_decay,
            clip=self.clip,
            freeze_last_layer_epochs=self.freeze_last_layer_epochs,
        )
        first, last = self.teacher_momentum, self.final_teacher_momentum
        require_share("optim", teacher_momentum=first, final_teacher_momentum=last)
        for beta in self.betas:
            require(0 <= beta < 1, f"optim.betas has {beta} but each must lie in [0, 1).")
        require(self.stretch >= 1, f"optim.stretch is {self.stretch} but must be at least 1.")
