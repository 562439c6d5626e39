"""DINO-vMF whose second rank is killed once, in the middle of a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from torch import Tensor

from vmf_pretrain.data.batch import Batch
from vmf_pretrain.methods.dino import DINOvMF
from vmf_pretrain.methods.method import Place
from vmf_pretrain.networks import ranks

STEP = 7


class Dying(DINOvMF):
    """The file that the options name says that it has happened."""

    def forward(self, batch: Batch, place: Place) -> dict[str, Tensor]:
        died = Path(self.config.options["died"])
        if place.step == STEP and ranks.rank() == 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch, place)
