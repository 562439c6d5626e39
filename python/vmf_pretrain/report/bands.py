"""The bands by which a run is judged: beyond which value of which logged figure it has collapsed. No torch is needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from vmf_pretrain.config.run import Config

HELD = 3  # logged steps in a row that have to lie in a band: a single batch may be odd
WATCHED = 7  # logged steps in which jumps are counted, and for which a low rank has to last
SHORT = 50  # optimizer steps before which nothing is said: even a forced collapse takes 50 to 150
DEAD_INFORMATION = (
    0.05  # nats; runs that learn stay above 0.3, and forced collapses pass through to 1e-3 within tens of steps
)
ONE_HOT_USE = 2.0  # prototypes in use (exp of the entropy of usage) below which all images share one
FLAT = 0.98  # of ln K: entropy of an assignment above which it is uniform; runs that learn stay below 0.95
FELL = 4.0  # times: the highest mutual information over the last, by which a head that tells nothing yet is no dead one
UNIFORM_USE = 0.9  # share of the prototypes in use above which all images get all alike
HELD_RANK = (
    0.75  # of the feature rank at the start: without a regulariser the features follow a collapsed head below this
)
LEAST_RANK = 1.5  # feature rank below which one direction holds most; untrained networks have 2 to 3 on the digits
LOST_RANK = 0.1  # of the highest feature rank of the run
LEAST_VARIANCE = (
    1e-3  # share of the features' mean square that is not their mean's; untrained networks have 0.01 to 0.3
)
NO_VARIANCE = 1e-4  # of tokens of unit variance: less than a hundredth of a standard deviation tells them apart
CONSTANT_PREDICTION = 0.01  # variance of predicted tokens over that of their targets
AS_CONSTANT = 0.9  # loss over that of predicting a constant, above which nothing is predicted
RISEN = (
    1.1  # loss over its value at the start; all methods start from an untrained network, so above it nothing is left
)
WORSE_THAN_CONSTANT = 1.05  # relative loss, after it was below AS_CONSTANT
JUMPS = 0.2  # rise from one logged loss to the next over the loss at the start; those of steady runs are below 0.1
CHANGING = 0.02  # change of the last quarter's figures over that of the quarter before, above which a run still learns


@dataclass(frozen=True)
class Band:
    """Values of a figure that tell of a fault.

    Attributes:
        figure: its name in metrics.jsonl.
        low, high: the band's ends, None where it is open; in the unit of the figure.
        what: the fault, in words.
    """

    figure: str
    low: float | None
    high: float | None
    what: str

    def holds(self, value: float) -> bool:
        """Whether a value lies in the band."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def one_hot_use(prototypes: int) -> float:
    """The prototypes in use below which all rows share one; of a few prototypes, a healthy run may use two."""
    return min(ONE_HOT_USE, prototypes / 4)


def flat_entropy(prototypes: int) -> float:
    """The entropy, nats, above which an assignment to prototypes is uniform."""
    return FLAT * math.log(prototypes)


def bands(config: Config) -> tuple[Band, ...]:
    """The bands to draw beside a run's curves; those of figures that its method does not log are of no use."""
    return (
        *_of_head("", config.head.prototypes),
        *_of_head("patch_", config.patch_prototypes),
        Band("feature_rank", None, LEAST_RANK, "rank collapse"),
        Band("feature_variance", None, LEAST_VARIANCE, "all images have the same features"),
        Band("target_variance", None, NO_VARIANCE, "all target tokens are alike"),
        Band("predicted_variance", None, NO_VARIANCE, "the predictor is constant"),
    )


def _of_head(prefix: str, prototypes: int) -> tuple[Band, ...]:
    """The bands of the figures of class tokens, or of patches, whose names begin with ``prefix``."""
    used, unless = f"{prefix}prototypes_in_use", "uniform collapse, if the mutual information is gone too"
    return (
        Band(f"{prefix}mutual_information", None, DEAD_INFORMATION, "collapse: prototypes tell nothing"),
        Band(used, None, one_hot_use(prototypes), "one-hot collapse"),
        Band(used, UNIFORM_USE * prototypes, None, unless),
        Band(f"{prefix}teacher_entropy", flat_entropy(prototypes), None, "uniform collapse"),
    )


@dataclass(frozen=True)
class Curves:
    """Logged figures by name, with their steps.

    Attributes:
        records: of training steps, in order.
        evaluations: the other records.
    """

    records: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> "Curves":
        """Curves of ``read_metrics``."""
        trained = [record for record in records if "total" in record or "loss" in record]
        return cls(trained, [record for record in records if "total" not in record and "loss" not in record])

    @property
    def step(self) -> int:
        """The last logged step; 0 before the first."""
        return int(self.records[-1]["step"]) if self.records else 0

    def values(self, name: str) -> list[float]:
        """Finite values, in order."""
        found = (record.get(name) for record in self.records)
        return [float(value) for value in found if isinstance(value, int | float) and math.isfinite(value)]

    def start(self, name: str) -> float | None:
        """Median of the first HELD values."""
        values = self.values(name)
        return median(values[:HELD]) if values else None

    def now(self, name: str) -> float | None:
        """Median of the last HELD values."""
        values = self.values(name)
        return median(values[-HELD:]) if values else None

    def held_below(self, name: str, limit: float, count: int = HELD) -> bool:
        """Whether each of the last ``count`` values is below a limit."""
        last = self.values(name)[-count:]
        return len(last) == count and max(last) < limit

    def held_above(self, name: str, limit: float) -> bool:
        """Whether each of the last HELD values is above a limit."""
        last = self.values(name)[-HELD:]
        return len(last) == HELD and min(last) > limit

    def evaluated(self, name: str) -> list[float]:
        """Values of evaluations, in order."""
        found = (record.get(name) for record in self.evaluations)
        return [float(value) for value in found if isinstance(value, int | float) and math.isfinite(value)]
