"""Schedules per iteration, each a closed form of the step: nothing to save, nothing to fast-forward on resume."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CosineSchedule:
    """A linear warm-up from ``first`` to ``start``, then half a cosine from ``start`` to ``end``.

    Attributes:
        start: value right after the warm-up.
        end: value that the last step approaches, and the value after ``total_steps``.
        total_steps: length of the whole schedule in optimizer steps, warm-up included.
        warmup_steps: steps of the warm-up; if there are any, step 0 has value ``first``, unless ``counting`` is "jepa".
        first: value that the warm-up starts from.
        counting: as the published trainer does. DINO's warm-up reaches ``start`` at its own last step, MAE's one step later;
            the JEPAs' is MAE's, with each step at the value of the next.
    """

    start: float
    end: float
    total_steps: int
    warmup_steps: int = 0
    first: float = 0.0
    counting: Literal["dino", "mae", "jepa"] = "dino"

    def at(self, step: int) -> float:
        """Value at ``step`` >= 0."""
        step += self.counting == "jepa"
        if step < self.warmup_steps:
            # DINO's linspace(0, start, warmup_steps): its last entry is ``start`` itself.
            intervals = max(1, self.warmup_steps - (self.counting == "dino"))
            return self.first + (self.start - self.first) * step / intervals
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / decay_steps)
        return self.end + 0.5 * (self.start - self.end) * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class LinearSchedule:
    """A straight line.

    Attributes:
        start: value at step 0.
        end: value at step ``total_steps`` and after.
        total_steps: its length in optimizer steps, any positive number.
    """

    start: float
    end: float
    total_steps: float

    def at(self, step: int) -> float:
        """Value at ``step`` >= 0."""
        return self.start + (self.end - self.start) * min(1.0, step / self.total_steps)
