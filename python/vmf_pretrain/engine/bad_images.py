"""Images that cannot be read: counted over all ranks, listed, and too many of them end the run."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from vmf_pretrain.data.bad_images import first_names
from vmf_pretrain.engine.votes import AgreedError, Taken
from vmf_pretrain.networks import ranks

SUPPOSED = 1000  # a share is of at least this many images, so that one bad file among the first hundred is not 1 %


class BadImages:
    """The count of unreadable images of a run, each time that one was read; the same on every rank.

    Args:
        write: appends a record to bad_files.jsonl, on the first rank.
        max_share: largest share of unreadable images among those read.
        count: of the steps before this process.
    """

    def __init__(self, write: Callable[[dict[str, Any]], None], max_share: float, count: int) -> None:
        self._write, self._max_share, self.count = write, max_share, count
        self._names: list[str] = []

    def learn(self, taken: Taken, images_read: int) -> None:
        """Take note of a step; ``images_read`` is that of the whole run so far.

        Raises:
            AgreedError: more than ``max_share`` of the images read (of SUPPOSED at least) are bad; names ten of them.
        """
        if not taken.counts.bad_images:
            return
        self.count += taken.counts.bad_images
        for image in ranks.gathered(taken.bad):
            self._names.append(image.name)
            self._write({**asdict(image), "step": taken.step})
        if self.count > self._max_share * max(images_read, SUPPOSED):
            raise AgreedError(
                f"{self.count} of {images_read} readings met an image that cannot be read, more than data.max_bad_share, "
                f"{self._max_share:g}, allows (of at least {SUPPOSED}): {first_names(self._names)}; bad_files.jsonl lists them "
                "with reasons, and --resume --data.max_bad_share with a larger share goes on."
            )
