"""What a run knows while it measures: the device and its rates, when it ends, and how long steps and compilations take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from vmf_bench.plan import Case
from vmf_bench.roof import Rates, operations_of

TYPICAL_SHARE = 0.5  # of the rate of torch.mm that a step reaches, before anything is known
FIRST_COMPILATION = 20.0  # seconds, before one is known
CANNOT_RUN = ("not available", "failed")  # statuses of a loss that takes no time when it is tried again


@dataclass
class Session:
    """State of a run."""

    device: torch.device
    rates: dict[torch.dtype, Rates]
    end: float  # of ``time.monotonic``
    longest_compilation: float = 0.0  # seconds; 0 before there was one
    waiting: list[Case] = field(default_factory=list)  # cases that come later
    steps: dict[tuple[str, torch.dtype], tuple[int, float]] = field(default_factory=dict)  # operations, seconds
    cannot_run: set[str] = field(default_factory=set)  # names of losses
    left_out: list[str] = field(default_factory=list)  # sentences: the cases without a record, and why

    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def operations(self, case: Case) -> int:
        """Of a step."""
        return operations_of(case.shape)

    def products_seconds(self, case: Case) -> float:
        """Seconds that torch.mm takes for the products of a step."""
        return self.operations(case) / self.rates[case.dtype].operations

    def remember(self, name: str, case: Case, seconds: float) -> None:
        """A step of a loss took so long."""
        self.steps[name, case.dtype] = self.operations(case), seconds

    @property
    def compilation(self) -> float:
        """Seconds that a compilation takes: those of the longest so far, or a guess before there was one."""
        return self.longest_compilation or FIRST_COMPILATION

    def compiled(self, seconds: float, *, whole: bool) -> None:
        """A compilation took so long; one that broke off tells something only where it took longer than expected."""
        if whole or seconds > self.compilation:
            self.longest_compilation = max(self.longest_compilation, seconds)

    def prepared(self, name: str, status: str) -> None:
        """What came of preparing a loss."""
        if status in CANNOT_RUN:
            self.cannot_run.add(name)

    def may_run(self, name: str) -> bool:
        """Whether a loss takes time: it ran before, or it has not been seen to be unable to run."""
        return name not in self.cannot_run or any(known == name for known, _ in self.steps)

    def predicted(self, name: str, case: Case) -> float:
        """Seconds of a step of a loss, from one at another size, or in another dtype, or else from the rate of torch.mm."""
        of_other_dtypes = [value for (known, _), value in self.steps.items() if known == name]
        known = self.steps.get((name, case.dtype)) or next(iter(of_other_dtypes), None)
        if known is None:
            rates = self.rates.get(case.dtype) or next(iter(self.rates.values()))
            return self.operations(case) / rates.operations / TYPICAL_SHARE
        operations, seconds = known
        return self.operations(case) * seconds / operations
