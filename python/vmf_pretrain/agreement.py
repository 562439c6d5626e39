"""Whether a run's log and its summary tell the same of the mutual information between images and prototypes.

Legend: B images of a training batch.

The log holds it for training batches, each of B images seen twice; the summary for images as they are judged. A batch of few
rows tells less than one of many, at most the logarithm of their number. If the images judged are to the network what views
in training are, a batch's value lies between those of B and of 2 B images judged: the usage of two views of each image is
averaged over at least as many, and at most twice as many, independent rows. What lies further off than batches differ from
one another is a network that is judged on something else than it was trained on.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BATCHES_LOGGED = 10  # the newest lines of the log that are compared
SPREADS = 4.0  # deviations of single batches that still count as the same


@dataclass(frozen=True)
class Agreement:
    """Mutual information of the log's last batches beside that of judged images in batches of the same size, nats.

    Attributes:
        logged: mean of the log's last batches.
        judged: means over batches of B and of 2 B images judged.
        tolerance: how far ``logged`` may lie outside ``judged``.
    """

    logged: float
    judged: tuple[float, float]
    tolerance: float

    @property
    def distance(self) -> float:
        """From ``logged`` to the nearest end of ``judged``; 0 between them."""
        return max(0.0, min(self.judged) - self.logged, self.logged - max(self.judged))

    @property
    def holds(self) -> bool:
        """Whether log and summary agree."""
        return self.distance <= self.tolerance


def agreement(logged: Sequence[float], once: Sequence[float], twice: Sequence[float]) -> Agreement | None:
    """Compare a log with what is judged; None where either is too short to have a spread, or is not finite.

    Args:
        logged: of the last training batches.
        once: of batches of B images judged.
        twice: of batches of 2 B images judged.
    """
    if len(logged) < 2 or len(once) < 2 or not twice or not all(map(math.isfinite, (*logged, *once, *twice))):
        return None
    tolerance = SPREADS * math.hypot(statistics.stdev(logged), statistics.stdev(once))
    return Agreement(statistics.fmean(logged), (statistics.fmean(once), statistics.fmean(twice)), tolerance)
