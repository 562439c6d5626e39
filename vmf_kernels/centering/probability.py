"""DINO-vMF's centre: the running log of the teacher's mean probability.

Legend: R rows, K prototypes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vmf_kernels.centering.log_sums import LogSums
from vmf_kernels.centering.running_mean import RunningMean
from vmf_kernels.ranks import sum_number_over_ranks
from vmf_kernels.unstored.prototype_logits import PrototypeLogits

AVERAGES = ("log_probability", "probability")


class ProbabilityCenter(RunningMean):
    """DINO-vMF's centre: the running log of the teacher's mean probability, subtracted from the logits over temperature.

    This is reconstructed from the paper, whose code was not public. With average "log_probability",
    ``c <- m c + (1 - m) log mean_b softmax(l_b)`` over the uncentred logits l. With "probability", the running mean is over
    the probabilities, ``e^c <- m e^c + (1 - m) mean_b softmax(l_b)``. Both are stored in log space, where the value of a
    prototype far from every row is finite.

    Args:
        average: "log_probability" or "probability".
        num_prototypes, momentum, start, backend, prototype_group, row_group: as ``RunningMean``. "zero" means uniform over the
            prototypes of all ranks; so with a prototype group, all its ranks must construct their centres together.

    Source: Govindarajan et al., ICLR 2023 (arXiv:2405.10939), "probability-space centering".

    Example:
        >>> center = ProbabilityCenter(2, momentum=0.0)
        >>> center.update(torch.tensor([[0.75, 0.25]]).log(), temperature=1.0)
        >>> [round(probability, 2) for probability in center.center[0].exp().tolist()]
        [0.75, 0.25]
    """

    over_probabilities = True
    _no_rows = -math.inf

    def __init__(
        self,
        num_prototypes: int,
        momentum: float = 0.9,
        *,
        average: str = "log_probability",
        start: str = "zero",
        backend: str = "auto",
        prototype_group: ProcessGroup | None = None,
        row_group: ProcessGroup | None = None,
    ) -> None:
        groups = {"prototype_group": prototype_group, "row_group": row_group}
        super().__init__(num_prototypes, momentum, start=start, backend=backend, **groups)
        if average not in AVERAGES:
            raise ValueError(f"average is {average!r}; expected one of {', '.join(AVERAGES)}")
        self.average = average
        if average == "probability" and start == "zero":
            # here the scale of e^c matters: start at the uniform distribution; log_probability may start at any constant
            if prototype_group is not None:
                num_prototypes = sum_number_over_ranks(num_prototypes, prototype_group)
            self._start = -math.log(num_prototypes)
            self.reset_parameters()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # a class that records batches in its own way has to see the logits
        if {"accumulate", "_statistic"} & vars(cls).keys() and "accumulate_sums" not in vars(cls):
            cls.accumulate_sums = None  # type: ignore[assignment]

    def accumulate_sums(self, total: Tensor, rows: int) -> None:
        """As ``accumulate``, from sums that the loss's backend has formed.

        A rule may have this method: then a loss asks its backend for them (``backends/uncentered.py``).

        Args:
            total: [K] nats, log of the sum of the uncentred probabilities over this rank's rows; -inf without rows.
            rows: how many they are.
        """
        self._add(*self._over_ranks(total, rows))

    def bias(self, temperature: float | Tensor) -> Tensor:
        """[K] ``-c``, nats. It is in units of log-probability, so it is not divided by the temperature."""
        return -self._values

    @torch.no_grad()
    def _statistic(
        self, teacher: PrototypeLogits | Tensor, temperature: float | Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if temperature is None:
            raise ValueError(
                "a centre of probabilities depends on the teacher's temperature; expected a number > 0, got None"
            )
        rows = teacher.detach().flatten(0, -2)
        with LogSums(rows, temperature, bias, self.backend, self.prototype_group) as sums:
            total = sums.over_rows(sums.over_prototypes())
        return self._over_ranks(total, rows.shape[0])

    def _over_ranks(self, total: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        # sum probabilities over ranks, not their logs
        count = total.new_full((), float(rows))
        return self._row_ranks.log_sum_exp(total), self._row_ranks.sum(count)

    def _merge(self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.logaddexp(one[0], other[0]), one[1] + other[1]

    def _mean(self, total: Tensor, rows: Tensor) -> Tensor:
        return (total - rows.log()).to(self.center.dtype)

    def _step(self, center: Tensor, batch: Tensor) -> Tensor:
        if self.average == "log_probability":
            return super()._step(center, batch)
        kept = math.log(self.momentum) if self.momentum > 0 else -math.inf
        return torch.logaddexp(center + kept, batch + math.log1p(-self.momentum))
