"""The settings of a stage: device, sizes and time limit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.workloads import HEAD_SHAPES, TOY_HEAD_SHAPES
from vmf_bench.inputs import HeadShape
from vmf_bench.peers.peer import Compile

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings:
    """Arguments of every stage.

    Attributes:
        backend: of the library, what is measured as "ours".
        dry: toy sizes on the CPU, nothing compiled by inductor: proves the script, measures nothing.
        deadline: ``time.monotonic()`` at which the stage should have finished.
        out: folder of the results.
        call: "first", "second" or "all"; names the log.
    """

    backend: str
    dry: bool
    deadline: float
    out: Path
    call: str = "first"

    @property
    def log(self) -> Path:
        """What every process of the call prints, line by line."""
        return self.out / f"{self.call}.log"

    @property
    def journal(self) -> Path:
        """A line for each test that starts or ends: ``share``."""
        return self.out / f"{self.call}_tests.jsonl"

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def shapes(self) -> tuple[HeadShape, ...]:
        """Workloads, the most wanted first."""
        return TOY_HEAD_SHAPES if self.dry else HEAD_SHAPES

    def shapes_at(self, places: Sequence[int]) -> tuple[HeadShape, ...]:
        """The workloads at these places; in a dry run there are fewer, each of which stands for several."""
        return tuple(dict.fromkeys(self.shapes[place % len(self.shapes)] for place in places))

    def compiler(self) -> Compile:
        """``torch.compile`` for static shapes; a dry run traces, and runs what it traced eagerly."""
        options = {"backend": "eager"} if self.dry else {"dynamic": False}
        return lambda function: torch.compile(function, **options)

    def seconds_left(self) -> float:
        """Until the deadline; negative after it."""
        return self.deadline - time.monotonic()
