"""The loss between teacher and student."""

from dataclasses import dataclass
from typing import Literal

from vmf_pretrain.config.checks import require, require_not_negative, require_positive


@dataclass(frozen=True)
class LossConfig:
    """The loss between the teacher's and the student's prototype distributions.

    Attributes:
        student_temp: the student's temperature.
        warmup_teacher_temp: the teacher's temperature in the first epoch.
        teacher_temp: the teacher's temperature after its warm-up; must be below the student's, or the run collapses to uniform.
        warmup_teacher_temp_epochs: epochs of the teacher temperature's linear warm-up.
        center_momentum: momentum of the teacher's centre.
        center_start: "zero" as published, or "first_batch", which spares a small model some steps toward a constant.
        centering: "probability" or "logit", for methods with concentrations (-vmf); the others centre logits. For ibot and
            dinov2 also "sinkhorn_knopp", which makes each batch use all prototypes alike and keeps no centre.
        koleo_weight: weight of the KoLeo regulariser on the student's features of each global view; 0 disables it.
        koleo_group: where KoLeo looks for an image's neighbours: in the whole "batch", or among the images of its "rank".
        warmup_patch_teacher_temp: for ibot, as ``warmup_teacher_temp``, of the patches; its warm-up is as long.
        patch_teacher_temp: for ibot, as ``teacher_temp``, of the patches; dinov2 has one temperature for both.
        patch_center_momentum: momentum of the centre of the patches.
        class_weight: weight of the loss of the class tokens, for ibot and dinov2.
        patch_weight: weight of the loss of the masked patches.
        implementation: "ours", or "published" for stored logits and one softmax a pair, to compare with.
    """

    student_temp: float = 0.1
    warmup_teacher_temp: float = 0.04
    teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: int = 0
    center_momentum: float = 0.9
    center_start: Literal["zero", "first_batch"] = "zero"
    centering: Literal["probability", "logit", "sinkhorn_knopp"] = "probability"
    koleo_weight: float = 0.0
    koleo_group: Literal["batch", "rank"] = "batch"
    warmup_patch_teacher_temp: float = 0.04
    patch_teacher_temp: float = 0.07
    patch_center_momentum: float = 0.9
    class_weight: float = 1.0
    patch_weight: float = 1.0
    implementation: Literal["ours", "published"] = "ours"

    def __post_init__(self) -> None:
        require_positive(
            "loss",
            student_temp=self.student_temp,
            warmup_teacher_temp=self.warmup_teacher_temp,
            teacher_temp=self.teacher_temp,
            warmup_patch_teacher_temp=self.warmup_patch_teacher_temp,
            patch_teacher_temp=self.patch_teacher_temp,
        )
        epochs, weight = self.warmup_teacher_temp_epochs, self.koleo_weight
        require_not_negative("loss", warmup_teacher_temp_epochs=epochs, koleo_weight=weight)
        require_not_negative("loss", class_weight=self.class_weight, patch_weight=self.patch_weight)
        momenta = {"center_momentum": self.center_momentum, "patch_center_momentum": self.patch_center_momentum}
        for name, momentum in momenta.items():
            require(0 <= momentum < 1, f"loss.{name} is {momentum} but must lie in [0, 1).")
