"""Steps without a finite loss and gradient: they are skipped, written down, and end the run if they do not stop."""

import json
import warnings
from collections.abc import Callable

import torch.distributed

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.engine.votes import Taken
from vmf_pretrain.networks import ranks
from vmf_pretrain.storage.run_folder import RunFolder


class Skipping:
    """Counts skipped steps in a row; the same on every rank.

    Args:
        folder: where skipped_steps.jsonl gets a line for each.
        name: what the data set calls an image.
        most: how many in a row end the run.
        scaled: whether the loss is scaled (fp16): then a gradient alone that is not finite is a matter of the scale.
    """

    def __init__(self, folder: RunFolder, name: Callable[[int], str], most: int, *, scaled: bool) -> None:
        self.folder, self.name, self.most, self.scaled = folder, name, most, scaled
        self.row = 0

    def learn(self, taken: Taken) -> None:
        """Take note of a step.

        Raises:
            PretrainError: it is the last one of too many in a row.
        """
        counts = taken.counts
        if not counts.not_finite:
            self.row = 0
            return
        if self.scaled and not counts.bad_losses:
            return
        self.row += 1
        what = "loss" if counts.bad_losses else "gradient"
        self._write(taken, what)
        if self.row >= self.most:
            raise PretrainError(
                f"the {what} is not finite at step {taken.step}, the last of {self.row} such steps in a row; no weight has "
                "been changed by them, and the images are listed in skipped_steps.jsonl. Lower optim.learning_rate or set "
                "train.precision to fp32, and go on from the last checkpoint with --resume."
            )

    def _write(self, taken: Taken, what: str) -> None:
        images = [self.name(index) for index in taken.indices]
        everyone: list[list[str]] = [images] * ranks.count()
        if ranks.grouped():
            torch.distributed.all_gather_object(everyone, images)
        if ranks.rank():
            return
        warnings.warn(f"Step {taken.step} is skipped: its {what} is not finite.", stacklevel=2)
        line = {"step": taken.step, "what": what, "images": [image for part in everyone for image in part]}
        with (self.folder.path / "skipped_steps.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
