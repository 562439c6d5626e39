"""What all ranks must know of a step before they stop, skip or save: one small sum over ranks a step.

On a GPU the sum is copied to the host without waiting, and read a step later.
"""

import signal
from collections import deque
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.batch import BadImage, Batch
from vmf_pretrain.networks import ranks


class AgreedError(PretrainError):
    """What the ranks voted of a step ends the run; raised on all of them, after the same step."""


@dataclass(frozen=True)
class Counts:
    """Over ranks.

    Attributes:
        bad_images: images that could not be read.
        terminate: ranks that got SIGTERM.
        interrupt: ranks that got SIGINT.
        save: ranks that were asked for a checkpoint by SIGUSR1.
        collapsed: 1 if the first rank has seen a collapse that is to stop the run.
        not_finite: ranks whose loss or gradient is not finite.
        bad_losses: ranks whose loss is not finite.
    """

    bad_images: int = 0
    terminate: int = 0
    interrupt: int = 0
    save: int = 0
    collapsed: int = 0
    not_finite: int = 0
    bad_losses: int = 0

    @property
    def stop(self) -> signal.Signals | None:
        """The signal that stops the run on all ranks."""
        if self.terminate:
            return signal.SIGTERM
        return signal.SIGINT if self.interrupt else None


COUNTS = len(fields(Counts))
FROM_HOST = COUNTS - 2  # those that are known on the host; the last two are of the device


@dataclass(frozen=True, eq=False)
class Taken:
    """What is known of a step.

    Attributes:
        step: its number.
        counts: what the ranks voted, summed.
        indices: image numbers of this rank's batch.
        bad: images of this rank's batch that could not be read.
        numbers: by name; empty if the step is not logged.
    """

    step: int
    counts: Counts
    indices: list[int]
    bad: list[BadImage]
    numbers: dict[str, float]


@dataclass(frozen=True, eq=False)
class _Waiting:
    step: int
    batch: Batch  # without its views
    names: list[str]
    copy: Tensor  # float64, on the host
    event: torch.cuda.Event | None


class Votes:
    """The votes of each step.

    Args:
        device: of the collective.
        late: whether a step's sum is read when the next one's has been cast.
    """

    def __init__(self, device: torch.device, *, late: bool) -> None:
        self.device, self.late = device, late
        self._waiting: deque[_Waiting] = deque()
        self._summed: Tensor | None = None

    def cast(self, mine: Counts, finite: Tensor, finite_loss: Tensor) -> Tensor:
        """Sum over ranks; returns [] float32 on the device, 1 if some rank's loss or gradient is not finite, else 0."""
        host = torch.tensor(astuple(mine)[:FROM_HOST], dtype=torch.float32)
        vote = torch.cat([host.to(self.device, non_blocking=True), torch.stack([~finite, ~finite_loss]).float()])
        self._summed = ranks.summed(vote)
        return self._summed[FROM_HOST].clamp(max=1.0)

    def keep(self, step: int, batch: Batch, numbers: Mapping[str, Tensor]) -> list[Taken]:
        """Keep what belongs to the step whose votes were cast; returns the steps whose votes are on the host."""
        assert self._summed is not None
        values = torch.stack([*self._summed.double(), *(value.detach().double() for value in numbers.values())])
        on_gpu = self.device.type == "cuda"
        copy = torch.empty(values.shape, dtype=torch.float64, device="cpu", pin_memory=on_gpu)
        copy.copy_(values, non_blocking=on_gpu)
        event: Any = torch.cuda.Event() if on_gpu else None
        if event is not None:
            event.record()
        self._waiting.append(_Waiting(step, replace(batch, views=[], masks={}), list(numbers), copy, event))
        return self._read(keep=1 if self.late else 0)

    def drain(self) -> list[Taken]:
        """Everything that waits."""
        return self._read(keep=0)

    def _read(self, keep: int) -> list[Taken]:
        read = []
        while len(self._waiting) > keep:
            one = self._waiting.popleft()
            if one.event is not None:
                one.event.synchronize()
            values = one.copy.tolist()
            counts, numbers = values[:COUNTS], values[COUNTS:]
            known = Counts(*(int(value) for value in counts)), one.batch.indices, one.batch.bad
            read.append(Taken(one.step, *known, dict(zip(one.names, numbers, strict=True))))
        return read
