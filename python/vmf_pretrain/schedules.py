"""Schedules per iteration, each a closed form of the step: nothing to save, nothing to fast-forward on resume."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """A linear warm-up from 0 to ``start``, then half a cosine from ``start`` to ``end``.

    Attributes:
        start: value right after the warm-up.
        end: value that the last step approaches, and the value after ``total_steps``.
        total_steps: length of the whole schedule in optimizer steps, warm-up included.
        warmup_steps: steps of the warm-up; if there are any, step 0 has value 0.
    """

    start: float
    end: float
    total_steps: int
    warmup_steps: int = 0

    def at(self, step: int) -> float:
        """Value at ``step`` >= 0."""
        if step < self.warmup_steps:
            # DINO's linspace(0, start, warmup_steps): its last entry is ``start`` itself.
            return self.start * step / max(1, self.warmup_steps - 1)
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / decay_steps)
        return self.end + 0.5 * (self.start - self.end) * (1.0 + math.cos(math.pi * progress))
