"""Whether the log and the summary of a run agree about the mutual information between images and prototypes.

Legend: B images of a training batch.

The log has the value of training batches, each of B images seen twice; the summary has the value of evaluated images. The
value grows with the number of rows and is at most the logarithm of that number. If the network responds to evaluated images
as to training views, the value of a training batch lies between those of B and of 2 B evaluated images: with two views of
each image, usage is averaged over at least B and at most 2 B independent rows. A value that lies further off than batches
differ from one another means that the network is evaluated on other inputs than it was trained on.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BATCHES_LOGGED = 10  # the newest lines of the log that are compared
SPREADS = 4.0  # standard deviations of single batches within which log and summary agree


@dataclass(frozen=True)
class Agreement:
    """Mutual information of the log's last batches, and of evaluated images in batches of the same size, nats.

    Attributes:
        logged: mean over the log's last batches.
        judged: means over batches of B and of 2 B evaluated images.
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
    """Compare a log with evaluated images; None if either has too few batches for a spread, or a non-finite value.

    Args:
        logged: mutual information of the last training batches, nats.
        once: that of batches of B evaluated images.
        twice: that of batches of 2 B evaluated images.
    """
    if len(logged) < 2 or len(once) < 2 or not twice or not all(map(math.isfinite, (*logged, *once, *twice))):
        return None
    tolerance = SPREADS * math.hypot(statistics.stdev(logged), statistics.stdev(once))
    return Agreement(statistics.fmean(logged), (statistics.fmean(once), statistics.fmean(twice)), tolerance)


def compared(records: Sequence[Mapping[str, Any]], judged: tuple[Sequence[float], Sequence[float]]) -> dict[str, Any]:
    """The summary's comparison of mutual information in the log and in evaluated images; nulls if it is impossible.

    Args:
        records: of the log.
        judged: mutual information of batches of B, and of 2 B, evaluated images.
    """
    lines = [record["mutual_information"] for record in records if "mutual_information" in record]
    logged = [math.nan if value is None else value for value in lines[-BATCHES_LOGGED:]]
    found = agreement(logged, *judged)
    return {
        "mutual_information_logged": None if found is None else found.logged,
        "mutual_information_judged": None if found is None else list(found.judged),
        "mutual_information_tolerance": None if found is None else found.tolerance,
        "mutual_information_agrees": None if found is None else found.holds,
    }
