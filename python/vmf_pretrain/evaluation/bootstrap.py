"""95 % intervals of figures, by resampling what they are means of."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
LEVEL = 0.95
AT_ONCE = 1 << 22  # counts of resampled values in memory: 32 MiB
SEED = 0


def mean_interval(values: ArrayLike) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent values.

    Args:
        values: [N], at least one.

    Returns:
        The 2.5 and the 97.5 percentile of the means of RESAMPLES draws of N values with replacement.
    """
    different, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    total, numbers = int(counts.sum()), np.random.default_rng(SEED)
    means: list[NDArray[np.float64]] = []
    # how often each different value is drawn; the same distribution as drawing places, and fast for right and wrong
    at_once = max(1, AT_ONCE // len(different))
    for start in range(0, RESAMPLES, at_once):
        drawn = numbers.multinomial(total, counts / total, size=min(at_once, RESAMPLES - start))
        means.append(drawn @ different / total)
    return _percentiles(np.concatenate(means))


def interval(statistic: Callable[[NDArray[np.int64]], float], count: int) -> tuple[float, float]:
    """The same for any statistic of ``count`` independent things.

    Args:
        statistic: of those at the given places, [count] with repetitions.
        count: of things, at least one.
    """
    numbers = np.random.default_rng(SEED)
    draws = (numbers.integers(count, size=count) for _ in range(RESAMPLES))
    return _percentiles(np.array([statistic(places) for places in draws]))


def _percentiles(statistics: NDArray[np.float64]) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(statistics, [tail, 100 - tail])
    return float(low), float(high)
