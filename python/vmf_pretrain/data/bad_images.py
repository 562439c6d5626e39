"""Images that cannot be read: named, counted, listed in bad_files.jsonl, and too many of them end the run."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.data.batch import BadImage

NAMED = 10  # names in the error that ends a run
SUPPOSED = 1000  # a share is of at least this many images, so that one bad file among the first hundred is not 1 %


class UnreadableImageError(Exception):
    """One image cannot be read; its text is the reason, without the name."""


class BadImages:
    """The list of unreadable images of a run, one JSON object a line: name, reason, step.

    Every rank appends its own; the count is that of all ranks, so that all of them end at the same step.

    Args:
        path: the file; lines of ``first_step`` and later, which a resumed run reads again, are dropped.
        max_share: largest share of unreadable images among those read.
        first_step: the step that the run begins or goes on with.
        writes: whether this rank drops those lines.
    """

    def __init__(self, path: Path, max_share: float, first_step: int = 0, *, writes: bool = True) -> None:
        self.path = path
        self.max_share = max_share
        kept = [record for record in _records(path) if record["step"] < first_step]
        self.count = len(kept)  # one that is read again counts again, as it does among the images read
        if writes and path.exists():
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(part, path)

    def note(self, bad: Sequence[BadImage], step: int) -> None:
        """Write the bad images of this rank's batch of a step."""
        if bad:
            with self.path.open("a") as file:
                file.write("".join(json.dumps({**asdict(image), "step": step}) + "\n" for image in bad))

    def learn(self, count: int, images_read: int) -> None:
        """Take note of ``count`` bad images of a step on all ranks; ``images_read`` is that of the whole run so far.

        Raises:
            PretrainError: more than ``max_share`` of the images read (of SUPPOSED at least) are bad; names ten of them.
        """
        self.count += count
        if count and self.count > self.max_share * max(images_read, SUPPOSED):
            names = first_names([str(record["name"]) for record in _records(self.path)])
            raise PretrainError(
                f"{self.count} of {images_read} images cannot be read, more than data.max_bad_share, {self.max_share:g}, "
                f"allows (of at least {SUPPOSED}): {names}; {self.path} lists them with reasons."
            )


def first_names(names: Sequence[str]) -> str:
    """The first ten different names, and how many more there are."""
    different = list(dict.fromkeys(names))
    more = f" and {len(different) - NAMED} more" if len(different) > NAMED else ""
    return ", ".join(different[:NAMED]) + more


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of the file; a last line that a kill has cut is dropped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
