"""DINOv2: iBOT with masks of an even size, a centre of masked patches or Sinkhorn-Knopp, and schedules per iteration.

What else belongs to it are settings: KoLeo, a head of the patches' own, registers, the scale of branches, stochastic depth of a
subset, DINOv3's linear last layer.

Source: Oquab et al., "DINOv2: learning robust visual features without supervision", TMLR 2024, and its published trainer.
"""

from vmf_pretrain.config.run import Config
from vmf_pretrain.data.masks import SpreadMasks
from vmf_pretrain.data.plan import MaskSampler
from vmf_pretrain.methods.dino import GLOBAL_VIEWS
from vmf_pretrain.methods.ibot import IBOT
from vmf_pretrain.methods.method import Place

WITHOUT_LOCAL_VIEWS = 2 / 3  # the published divisor counts one local view even if there is none


class DINOv2(IBOT):
    """Student and teacher of DINOv2. Only masked patches go through the heads, the teacher's too."""

    center_tokens = "masked"

    @classmethod
    def sampler(cls, config: Config, grid: tuple[int, int]) -> MaskSampler:
        """What draws the masks of views of H x W patches."""
        return SpreadMasks(grid, GLOBAL_VIEWS, config.masks.views, config.masks.shares)

    def _moment(self, place: Place) -> int:
        """The entry of the temperatures' schedules: one for each step."""
        return min(place.step, self.start.steps - 1)

    def _schedule(self) -> tuple[int, int, int]:
        warm_up = self.config.loss.warmup_teacher_temp_epochs * self.start.steps_per_epoch
        return warm_up, 0, self.start.steps

    def _teacher_temps(self) -> tuple[float, float, float, float]:
        """One schedule for both streams."""
        loss = self.config.loss
        return (loss.warmup_teacher_temp, loss.teacher_temp) * 2

    def _class_weight(self) -> float:
        weight = self.config.loss.class_weight
        return weight if self.config.views.local_count else weight * WITHOUT_LOCAL_VIEWS


class DINOv2vMF(DINOv2):
    """DINOv2 whose prototypes are von Mises-Fisher components of free precision."""

    vmf = True
