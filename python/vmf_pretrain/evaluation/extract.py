"""Features of images, computed once for all tasks: by every rank, a file at a time, so that a killed evaluation goes on.

Legend: B images of a forward pass.
"""

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import ImageFile
from torch import Tensor

from vmf_pretrain.config.errors import PretrainError
from vmf_pretrain.config.tasks.features import FeaturesTask
from vmf_pretrain.data.bad_images import UnreadableImageError
from vmf_pretrain.data.images import Images
from vmf_pretrain.evaluation.evaluated import Evaluated
from vmf_pretrain.evaluation.outputs import DTYPES, Kinds, outputs, precision
from vmf_pretrain.evaluation.stored import Features, chunk_of, features_in, folder_for, missing, write_chunk
from vmf_pretrain.evaluation.views import View, view_facts
from vmf_pretrain.networks import ranks

Read = Tensor | UnreadableImageError


@dataclass(frozen=True)
class Wanted:
    """Features that a task wants of some images.

    Attributes:
        view: what the network is shown of an image.
        kinds: which of its outputs are kept.
    """

    view: View
    kinds: Kinds = Kinds()  # noqa: RUF009 -- frozen


@dataclass(frozen=True, eq=False)
class Extraction:
    """Computes the features of images, and keeps them on disk.

    Attributes:
        evaluated: the network.
        settings: how.
        store: folder of all features.
        advance: called with a number of images that are done.
    """

    evaluated: Evaluated
    settings: FeaturesTask
    store: Path
    advance: Callable[[int], None] = lambda count: None

    def features(self, images: Images, wanted: Wanted) -> Features:
        """The features of the images, computed where they are not on disk yet. Every rank must call it.

        Raises:
            PretrainError: no image can be read, a feature is not finite, or the ranks do not share a disk.
        """
        folder, kinds = self._folder(images, wanted)
        numbers = missing(folder, len(images))
        ranks.gathered(["looked"])  # before any rank writes, so that all divide the same files
        self.advance(len(images) - sum(len(chunk_of(number, len(images))) for number in numbers))
        mine = numbers[ranks.rank() :: ranks.count()]
        ranks.agreed(lambda: self._share(images, Wanted(wanted.view, kinds), folder, mine))
        if missing(folder, len(images)):
            raise PretrainError(f"ranks do not see each other's files in {folder}; expected one disk for all of them.")
        found = features_in(folder, images)
        if not len(found):
            name, reason = next(iter(found.bad.items()))
            raise PretrainError(f"none of {len(images)} images can be read; the first is {name} ({reason}).")
        return found

    def _base(self, images: Images, view: View) -> dict[str, Any]:
        """What the features are of, beside their kinds: weights, images in their order, view and precision."""
        return {
            "weights": self.evaluated.fingerprint,
            "images": images_facts(images),
            **view_facts(view),
            "dtype": self.settings.dtype,
        }

    def _folder(self, images: Images, wanted: Wanted) -> tuple[Path, Kinds]:
        """Where the features are kept, and which kinds; the first rank looks and makes it, for all."""

        def look() -> dict[str, Any]:
            try:
                folder, kinds = folder_for(self.store, self._base(images, wanted.view), wanted.kinds)
            except OSError as error:
                raise PretrainError(f"features cannot be written to {self.store}: {error.strerror or error}.") from None
            return {"folder": folder.name, **kinds.facts()}

        said = ranks.done_by_first(look)
        return self.store / said["folder"], Kinds.from_facts(said)

    def _share(self, images: Images, wanted: Wanted, folder: Path, numbers: Sequence[int]) -> None:
        """Compute this rank's files."""
        try:
            self._compute(images, wanted, folder, numbers)
        except OSError as error:
            raise PretrainError(f"features cannot be written to {folder}: {error.strerror or error}.") from None

    def _compute(self, images: Images, wanted: Wanted, folder: Path, numbers: Sequence[int]) -> None:
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        # decoding changes and restores both for each image, which threads would do in each other's way
        with warnings.catch_warnings():
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            try:
                self._compute_chunks(images, wanted, folder, numbers)
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = before

    def _compute_chunks(self, images: Images, wanted: Wanted, folder: Path, numbers: Sequence[int]) -> None:
        chunks = [chunk_of(number, len(images)) for number in numbers]
        if not chunks:
            return
        with ThreadPoolExecutor(self.settings.threads) as pool:

            def read(places: range) -> list["Future[Read]"]:
                return [pool.submit(_read, images, place, wanted.view) for place in places]

            ahead = read(chunks[0])
            for number, places, following in zip(numbers, chunks, [*chunks[1:], range(0)], strict=True):
                reading, ahead = ahead, read(following)  # while the network is busy
                rows, kept, bad = self._chunk(images, wanted.kinds, places, reading)
                write_chunk(folder, number, rows, kept, bad)
                self.advance(len(places))

    def _chunk(
        self, images: Images, kinds: Kinds, places: range, reading: Sequence["Future[Read]"]
    ) -> tuple[Tensor, dict[str, list[Tensor]], dict[str, str]]:
        """Places of the readable images, their features by name in that order, and why each other image is unreadable."""
        found: dict[int, dict[str, Tensor]] = {}
        bad: dict[str, str] = {}
        for batch in self._batches(images, places, reading, bad):
            features = self._features([pixels for _, pixels in batch], kinds)
            for row, (place, _) in enumerate(batch):
                found[place] = {name: values[row] for name, values in features.items()}
        rows = sorted(found)
        for row in rows:
            if not all(bool(values.isfinite().all()) for values in found[row].values()):
                raise PretrainError(f"the features of {images.name(row)} are NaN or infinite.")
        names = list(found[rows[0]]) if rows else []
        return torch.tensor(rows, dtype=torch.int64), {name: [found[row][name] for row in rows] for name in names}, bad

    def _batches(
        self, images: Images, places: range, reading: Sequence["Future[Read]"], bad: dict[str, str]
    ) -> Iterator[list[tuple[int, Tensor]]]:
        """At most B places and pixels of one size at a time; unreadable images go to ``bad``."""
        waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = defaultdict(list)
        for place, future in zip(places, reading, strict=True):
            pixels = future.result()
            if isinstance(pixels, UnreadableImageError):
                bad[images.name(place)] = str(pixels)
                continue
            batch = waiting[tuple(pixels.shape)]
            batch.append((place, pixels))
            if len(batch) == self.settings.batch_size:
                yield waiting.pop(tuple(pixels.shape))
        yield from waiting.values()

    @torch.no_grad()
    def _features(self, pixels: Sequence[Tensor], kinds: Kinds) -> dict[str, Tensor]:
        """Features of images of one size, on the CPU."""
        evaluated, dtype = self.evaluated, DTYPES[self.settings.dtype]
        inputs = evaluated.fed.of(torch.stack(list(pixels)).to(evaluated.device))
        with precision(evaluated.device, dtype):
            found = outputs(evaluated.network, inputs, kinds)
        return {name: values.to("cpu", dtype) for name, values in found.items()}


def images_facts(images: Images) -> dict[str, Any]:
    """The fingerprint of images and of their order, as JSON holds it."""
    names = hashlib.sha256()
    for place in range(len(images)):
        names.update(images.name(place).encode("utf-8", "surrogateescape") + b"\n")
    return {**images.facts(), "order": names.hexdigest()}


def _read(images: Images, place: int, view: View) -> Read:
    try:
        return images.viewed(place, view)
    except UnreadableImageError as error:
        return error
