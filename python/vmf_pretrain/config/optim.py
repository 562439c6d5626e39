"""The optimizer and the schedules."""

import math
from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require, require_not_negative, require_positive, require_share

BASE = 0.0005  # DINO's learning rate for each 256 images
LINEAR_IMAGES = 256
ROOT_IMAGES = 1024


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the schedules, all per iteration.

    Attributes:
        learning_rate: peak learning rate, whatever the batch; null where ``base_learning_rate`` is given (I-JEPA gives this).
        base_learning_rate: peak learning rate that ``batch_rule`` takes to the batch; null where ``learning_rate`` is given.
            If neither is, 0.0005 (DINO).
        batch_rule: "linear_256" multiplies by the batch over 256 (DINO, iBOT, MAE), "sqrt_1024" by the root of the batch over
            1024 (DINOv2); null is "linear_256", or nothing with ``learning_rate``.
        start_learning_rate: learning rate at the start of its warm-up (I-JEPA: a fifth of the peak; others 0).
        final_learning_rate: learning rate at the end of the cosine.
        warmup_epochs: epochs of the learning rate's linear warm-up.
        layer_decay: factor on the learning rate from each layer of the backbone to the one before it (DINOv2: 0.9).
        patch_embed_rate: factor on the learning rate of the patch embedding (DINOv2: 0.2).
        weight_decay: weight decay at the start of its cosine.
        final_weight_decay: weight decay at the end.
        clip: largest L2 norm of a gradient; 0 never clips.
        clip_of: whose gradient that is: of each "parameter" (DINO, iBOT), or of each "module", that is backbone, head or
            predictor (DINOv2, V-JEPA).
        freeze_last_layer_epochs: epochs at the start in which the prototypes do not move.
        freeze_last_layer_by: without a "gradient" AdamW does not see them (DINO, iBOT); at a "rate" of 0 its moments go on
            (DINOv2).
        teacher_momentum: momentum of the teacher's moving average at the start of its cosine.
        final_teacher_momentum: the same at the end.
        betas: AdamW's (MAE: 0.9, 0.95).
        counting: which published trainer's way of counting steps the schedules follow: "dino" reaches the peak at the last step
            of the warm-up, "mae" one step later, "jepa" as "mae" with each step at the value of the next.
        stretch: length of the JEPAs' schedules and of the cosines as a multiple of the run's (V-JEPA: 1.25), so that they end
            before their final values.
    """

    learning_rate: float | None = None
    base_learning_rate: float | None = None
    batch_rule: Literal["linear_256", "sqrt_1024"] | None = None
    start_learning_rate: float = 0.0
    final_learning_rate: float = 1e-6
    warmup_epochs: int = 10
    layer_decay: float = 1.0
    patch_embed_rate: float = 1.0
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    clip: float = 3.0
    clip_of: Literal["parameter", "module"] = "parameter"
    freeze_last_layer_epochs: int = 1
    freeze_last_layer_by: Literal["gradient", "rate"] = "gradient"
    teacher_momentum: float = 0.996
    final_teacher_momentum: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    counting: Literal["dino", "mae", "jepa"] = "dino"
    stretch: float = 1.0

    def __post_init__(self) -> None:
        self._settle_rate()
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
        factors = {"layer_decay": self.layer_decay, "patch_embed_rate": self.patch_embed_rate}
        require_positive("optim", **factors)
        require_share("optim", **factors)
        for beta in self.betas:
            require(0 <= beta < 1, f"optim.betas has {beta} but each must lie in [0, 1).")
        require(self.stretch >= 1, f"optim.stretch is {self.stretch} but must be at least 1.")

    def peak(self, batch_size: int) -> float:
        """The peak learning rate for a global batch of so many images."""
        if self.learning_rate is not None:
            return self.learning_rate
        assert self.base_learning_rate is not None
        if self.batch_rule == "sqrt_1024":
            return self.base_learning_rate * math.sqrt(batch_size / ROOT_IMAGES)
        return self.base_learning_rate * batch_size / LINEAR_IMAGES

    def _settle_rate(self) -> None:
        """One of the two rates is given; the defaults stand in the fields, so that a written configuration shows them."""
        if self.learning_rate is None:
            base, rule = self.base_learning_rate, self.batch_rule
            object.__setattr__(self, "base_learning_rate", BASE if base is None else base)
            object.__setattr__(self, "batch_rule", rule or "linear_256")
            require_positive("optim", base_learning_rate=self.base_learning_rate or 0.0)
            return
        for name in ("base_learning_rate", "batch_rule"):
            twice = getattr(self, name) is not None
            require(not twice, f"optim.learning_rate and optim.{name} are both given; expected one of the two rates.")
        require_positive("optim", learning_rate=self.learning_rate)
